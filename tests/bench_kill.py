"""
kill -9 at random moments: every run, resumed as often as it takes, ends where the undisturbed one
does, bit for bit.

    python tests/bench_kill.py              30 runs
    python tests/bench_kill.py --runs 100 --seed 7

Prints how often each run was killed, and at which steps. Exit status 1 if any result differs.
"""
import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import TINY, assert_same, chain_set, run, start  # noqa: E402

MAX_STEPS = 60
FLAGS = [*TINY, "--sources", "a,b", "--target", "target", "--max_steps", MAX_STEPS,
         "--log_every", 5]
KILLS = 3  # of a run, at most


def steps_logged(out):
    """Steps done at the last report, -1 before the first."""
    log = out / "log.jsonl"
    if not log.exists():
        return -1
    steps = [-1]
    for line in log.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # the last may be cut short
            steps.append(json.loads(line)["step"])
    return max(steps)


def kill_at_random(process, out, rng):
    """
    Kills a run around a random step. Most of a run's time is its start, so a random time would
    hardly ever hit a step.
    """
    step = rng.randint(min(MAX_STEPS - 5, max(0, steps_logged(out))), MAX_STEPS - 5)
    # at once, within a few steps, or later
    delay = rng.choice((0.0, rng.uniform(0, 0.03), rng.uniform(0, 0.3)))
    while process.poll() is None and steps_logged(out) < step:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()


def check_files(out):
    """What a killed run left is whole, or not there."""
    if (out / "ckpt.pt").exists():
        torch.load(out / "ckpt.pt", weights_only=True)
    if (out / "mixture.json").exists():
        json.loads((out / "mixture.json").read_text())


def killed_run(out, folder, rng):
    """Runs to the end, killed up to KILLS times -> the steps at which it was killed."""
    killed = []
    while True:
        if (out / "ckpt.pt").exists():
            flags = ["--resume"]
        else:  # killed before its first checkpoint, that of step 0
            shutil.rmtree(out, ignore_errors=True)
            flags = FLAGS
        process = start("fastmix.py", *flags, "--out_dir", out, cwd=folder)
        if len(killed) < KILLS:
            kill_at_random(process, out, rng)
        _, err = process.communicate()
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL, err
        killed.append(steps_logged(out))
        check_files(out)


def kill_loop(folder, runs, seed, say=print):
    """For each of so many runs: the steps at which it was killed, None where its result differs."""
    rng = random.Random(seed)
    for i, name in enumerate(("a", "b", "target")):
        chain_set(folder / "data" / name, i)
    run("fastmix.py", *FLAGS, "--out_dir", "undisturbed", cwd=folder)
    found = []
    for i in range(runs):
        out = folder / f"run-{i}"
        killed = killed_run(out, folder, rng)
        try:
            assert_same(out, folder / "undisturbed")
            verdict = "the same, bit for bit"
            found.append(killed)
        except AssertionError:
            verdict = "DIFFERS"
            found.append(None)
        say(f"run {i + 1}: killed {len(killed)} times, at steps {killed}: {verdict}", flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_loop(Path(folder), args.runs, args.seed)
    good = [killed for killed in found if killed is not None]
    times = sum(len(killed) for killed in good)
    print(f"{len(good)} of {len(found)} runs, killed {times} times in all, ended as the "
          "undisturbed one")
    sys.exit(len(good) < len(found))


if __name__ == "__main__":
    main()
