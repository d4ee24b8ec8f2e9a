"""More than one process, many sources, and kills: what a long run meets."""
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench_kill import kill_loop
from conftest import (ROOT, TINY, log_rows, markov, result_json, run, start, wait_for_step,
                      write_set)

FLAGS = [*TINY, "--sources", "a,b,noise", "--target", "target"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return str(s.getsockname()[1])


def torchrun(*args, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", free_port(), ROOT / "fastmix.py", *args]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def two_processes(*args, cwd, second=()):
    """
    What torchrun starts, without its three imports of torch; `second`, more flags of the second
    process. Returns the two.
    """
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank, more in (("0", ()), ("1", second)):
        processes.append(start("fastmix.py", *args, *more, cwd=cwd, picture=True,
                               env=env | {"RANK": rank, "LOCAL_RANK": rank}))
    return processes


def assert_close(found, expected, allowed, where):
    """Two rows' {name: number or None} agree."""
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, (where, name)
        else:
            assert abs(found[name] - value) < allowed, (where, name)


def test_two_processes_follow_the_trajectory_of_one(synthetic):
    """The same global batch, micro-batches and all: alphas within 1e-4 after 20 steps."""
    flags = [*FLAGS, "--max_steps", 20, "--log_every", 1, "--batch_size", 4, "--grad_accum", 2]
    processes = two_processes(*flags, "--out_dir", "two", cwd=synthetic)
    ended = [process.communicate(100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    stdout, _ = ended[0]
    assert stdout.count("target target: test loss") == 1
    assert stdout.endswith("drew two/mixture.png\n")
    assert ended[1][0] == ""  # the second process prints nothing
    run("fastmix.py", *flags, "--out_dir", "one", cwd=synthetic)
    one = log_rows(synthetic / "one")
    two = log_rows(synthetic / "two")
    assert len(one) == len(two) == 21
    assert one[20]["alpha"]["b"] > 0.4
    for row, other in zip(one, two):
        step = row["step"]
        alignments = [abs(value) for value in row["alignment"].values() if value is not None]
        largest = max(alignments, default=0)
        assert_close(other["alpha"], row["alpha"], 1e-4, (step, "alpha"))
        assert_close(other["alignment"], row["alignment"], 1e-4 * largest, (step, "alignment"))
        assert_close(other["source_loss"], row["source_loss"], 1e-3, (step, "source_loss"))
        # each process evaluates a part
        assert abs(row["target_val_loss"] - other["target_val_loss"]) < 1e-3
        if step > 0:
            assert abs(row["train_loss"] - other["train_loss"]) < 1e-3
    one = result_json(synthetic / "one")
    two = result_json(synthetic / "two")
    assert one["sources"].keys() == two["sources"].keys()
    for name in one["sources"]:
        assert one["sources"][name]["tokens_seen"] == two["sources"][name]["tokens_seen"]
    assert_close(two["mixture"], one["mixture"], 1e-4, "mixture")
    assert abs(two["test_loss"] - one["test_loss"]) < 1e-3
    files = {path.name for path in (synthetic / "two").iterdir()}
    assert files == {"log.jsonl", "ckpt.pt", "mixture.json", "mixture.png"}


def is_rank_1(pid, out):
    try:
        environment = Path("/proc", pid, "environ").read_text()
        command = Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return False
    return "\0RANK=1\0" in environment and out in command


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(synthetic):
    """By torchrun. One process resumes the run, which ends where an undisturbed one does."""
    out = synthetic / "orphaned"
    flags = [*FLAGS, "--max_steps", 200, "--learning_rate_mixture", 0.05, "--log_every", 10]
    process = torchrun(*flags, "--out_dir", out.name, cwd=synthetic)
    wait_for_step(process, out, 10)
    (rank_1,) = [pid for pid in os.listdir("/proc") if pid.isdigit() and is_rank_1(pid, out.name)]
    os.kill(int(rank_1), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert log_rows(out)[-1]["step"] < 200
    run("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
    assert [row["step"] for row in log_rows(out)] == list(range(0, 201, 10))
    assert log_rows(out)[-1]["alpha"]["b"] > 0.9


@pytest.mark.parametrize("flags", [["--batch_size", 7], ["--target_batch_size", 1]])
def test_batches_that_cannot_be_shared(synthetic, flags):
    """Each process finds it, and says so in one line."""
    processes = two_processes(*FLAGS, *flags, "--out_dir", "odd", cwd=synthetic)
    for process in processes:
        _, err = process.communicate(100)
        assert process.returncode == 2
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: 2 processes share a batch: --batch_size ")
        assert f"{flags[0]} {flags[1]}" in err
    assert not (synthetic / "odd").exists()


def test_an_error_of_another_rank_reaches_the_screen(synthetic, tmp_path):
    """The second process has a machine of its own, where a set is missing."""
    first, second = two_processes(*FLAGS, "--out_dir", "other", cwd=synthetic,
                                  second=["--data_dir", tmp_path])
    _, err = second.communicate(100)
    first.kill()  # as torchrun does
    first.communicate()
    assert second.returncode == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: no set 'a' in ")
    assert "prepare_data.py a=PATH" in err


def test_ninety_sources_within_256_open_files(tmp_path):
    """Each has six files, for it has masks."""
    names = [f"s{k}" for k in range(90)]
    for k in range(90):
        ids = markov(k, 300)
        splits = {"train": ids, "val": ids[:60], "test": ids[:60]}
        masks = {split: np.ones(len(part), np.uint8) for split, part in splits.items()}
        write_set(tmp_path / "data" / names[k], splits, masks=masks)
    run("fastmix.py", *TINY, "--batch_size", 90, "--sources", ",".join(names), "--target", "s3",
        "--max_steps", 12, cwd=tmp_path, limit=(resource.RLIMIT_NOFILE, 256))
    assert list(log_rows(tmp_path / "out")[-1]["alpha"]) == names
    assert len(result_json(tmp_path / "out")["mixture"]) == 90


def test_killed_at_random_moments(tmp_path):
    """A short form of bench_kill.py."""
    found = kill_loop(tmp_path, runs=1, seed=3, say=lambda *_, **__: None)
    assert None not in found
    assert sum(map(len, found)) >= 2, found
