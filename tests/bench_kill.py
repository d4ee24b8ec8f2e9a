"""
kill -9 at random moments: every run, resumed as often as it takes, ends where the undisturbed one does, bit for bit.

    python tests/bench_kill.py              30 runs
    python tests/bench_kill.py --runs 100 --seed 7

Prints how many runs were killed how often, and at which steps; exit status 1 if any result differs.
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

FLAGS = [*TINY, "--sources", "a,b", "--target", "target", "--max_steps", 60, "--log_every", 5]


def steps_logged(out):
    """Steps done at the last report, -1 before the first."""
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True) if (out / "log.jsonl").exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith(b"\n")], default=-1)


def kill_loop(folder, runs, seed, say=print):
    """Returns [(steps at which a run was killed)] of each run, None where its result differs."""
    rng = random.Random(seed)
    for i, name in enumerate(("a", "b", "target")):
        chain_set(folder / "data" / name, i)
    run("fastmix.py", *FLAGS, "--out_dir", "undisturbed", cwd=folder)
    found = []
    for i in range(runs):
        out, killed = folder / f"run-{i}", []
        while True:
            if (out / "ckpt.pt").exists():
                flags = ["--resume"]
            else:  # killed before its first checkpoint, that of step 0
                shutil.rmtree(out, ignore_errors=True)
                flags = FLAGS
            aim = rng.randint(min(55, max(0, steps_logged(out))), 55)  # most of a run is its start: aim at a step, and
            later = rng.choice((0.0, rng.uniform(0, 0.03), rng.uniform(0, 0.3)))  # then at once, within a few, or later
            process = start("fastmix.py", *flags, "--out_dir", out, cwd=folder)
            if len(killed) < 3:
                while process.poll() is None and steps_logged(out) < aim:
                    time.sleep(0.001)
                time.sleep(later)
                process.kill()
            _, err = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
            killed.append(steps_logged(out))
            for path in (out / "ckpt.pt", out / "mixture.json"):  # whole, or not there
                if path.exists():
                    torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())
        try:
            assert_same(out, folder / "undisturbed")
            found.append(killed)
        except AssertionError:
            found.append(None)
        say(f"run {i + 1}: killed {len(killed)} times, at steps {killed}: "
            f"{'DIFFERS' if found[-1] is None else 'the same, bit for bit'}", flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_loop(Path(folder), args.runs, args.seed)
    good = [k for k in found if k is not None]
    print(f"{len(good)} of {len(found)} runs, killed {sum(map(len, good))} times in all, ended as the undisturbed one")
    sys.exit(len(good) < len(found))


if __name__ == "__main__":
    main()
