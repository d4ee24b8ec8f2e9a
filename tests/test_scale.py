"""More than one process, many sources, and kills: what a long run meets."""
import json
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
from conftest import ROOT, TINY, chain_set, log_rows, run, start, wait_for_step, write_set

FLAGS = [*TINY, "--sources", "a,b,noise", "--target", "target"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return str(s.getsockname()[1])


def torchrun(*args, cwd):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                             free_port(), str(ROOT / "fastmix.py"), *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def environment(port):
    """What torchrun says to each of two processes, but for their numbers."""
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def two_ranks(*args, cwd):
    """What torchrun starts, without its three imports of torch: [(status, stdout, stderr)] of both ranks."""
    env = environment(free_port())
    ranks = [start("fastmix.py", *args, cwd=cwd, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
    ended = [rank.communicate(60) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, ended)]


def test_two_processes_follow_the_trajectory_of_one(synthetic):
    """The same global batch, micro-batches and all: alphas within 1e-4 after 20 steps, one set of files."""
    flags = [*FLAGS, "--max_steps", 20, "--log_every", 1, "--batch_size", 4, "--grad_accum", 2]
    ended = two_ranks(*flags, "--out_dir", "two", cwd=synthetic)
    run("fastmix.py", *flags, "--out_dir", "one", cwd=synthetic)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert sum(stdout.count("target target: test loss") for _, stdout, _ in ended) == 1
    rows = [log_rows(synthetic / out) for out in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 21 and rows[0][20]["alpha"]["b"] > 0.4
    for a, b in zip(*rows):
        largest = max([abs(value) for value in a["alignment"].values() if value is not None], default=0)
        for key, allowed in (("alpha", 1e-4), ("alignment", 1e-4 * largest), ("source_loss", 1e-3)):
            for name, value in a[key].items():
                assert (value is None) == (b[key][name] is None)
                assert value is None or abs(value - b[key][name]) < allowed, (a["step"], key, name)
        assert a["train_loss"] is None or abs(a["train_loss"] - b["train_loss"]) < 1e-3
        assert abs(a["target_val_loss"] - b["target_val_loss"]) < 1e-3  # each evaluates a part
    one, two = (json.loads((synthetic / out / "mixture.json").read_text()) for out in ("one", "two"))
    assert one["sources"].keys() == two["sources"].keys()
    for name in one["sources"]:
        assert one["sources"][name]["tokens_seen"] == two["sources"][name]["tokens_seen"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(synthetic):
    """By torchrun, as in the README. The run goes on with one process, and ends where an undisturbed one does."""
    out = synthetic / "orphaned"
    flags = [*FLAGS, "--max_steps", 200, "--learning_rate_mixture", 0.05, "--log_every", 10]
    process = torchrun(*flags, "--out_dir", out.name, cwd=synthetic)
    wait_for_step(process, out, 10)

    def is_rank_1(pid):
        try:
            return ("\0RANK=1\0" in Path("/proc", pid, "environ").read_text()
                    and str(out.name) in Path("/proc", pid, "cmdline").read_text())
        except OSError:
            return False
    (rank_1,) = [pid for pid in os.listdir("/proc") if pid.isdigit() and is_rank_1(pid)]
    os.kill(int(rank_1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert log_rows(out)[-1]["step"] < 200
    run("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
    assert [r["step"] for r in log_rows(out)] == list(range(0, 201, 10))
    assert log_rows(out)[-1]["alpha"]["b"] > 0.9


def test_batches_that_cannot_be_shared(synthetic):
    """Both processes find it; by torchrun, the first to say so ends the other."""
    process = torchrun(*FLAGS, "--batch_size", 7, "--out_dir", "odd", cwd=synthetic)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = [line for line in stderr.splitlines() if "2 processes share a batch" in line]
    assert line.startswith("error: 2 processes share a batch: --batch_size 7 must be a multiple of 2")
    assert not (synthetic / "odd").exists()


def test_an_error_of_another_rank_reaches_the_screen(synthetic, tmp_path):
    """Rank 1 has a machine of its own, where a set is missing."""
    process = start("fastmix.py", *FLAGS, "--data_dir", tmp_path, "--out_dir", "other", cwd=synthetic,
                    env=environment("29500") | {"RANK": "1", "LOCAL_RANK": "0"})
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and len(stderr.splitlines()) == 1
    assert stderr.startswith("error: rank 1: no set 'a' in ") and "prepare_data.py a=PATH" in stderr


def test_sixty_four_sources_within_256_file_handles(tmp_path):
    for k in range(64):
        chain_set(tmp_path / "data" / f"s{k}", k, n=2000)
    names = ",".join(f"s{k}" for k in range(64))
    run("fastmix.py", *TINY, "--batch_size", 64, "--sources", names, "--target", "s3", "--max_steps", 3, cwd=tmp_path,
        limit=(resource.RLIMIT_NOFILE, 256))
    assert len(log_rows(tmp_path / "out")[-1]["alpha"]) == 64


def test_a_sparse_file_of_20_gb_is_not_read_through(tmp_path):
    """A hole reads as zeros; only the windows drawn are touched, so the run is as quick as on a small file."""
    zeros = np.zeros(2000, np.uint8)
    write_set(tmp_path / "data" / "big", {"train": zeros, "val": zeros, "test": zeros})
    meta = json.loads((tmp_path / "data" / "big" / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] = 10**10
    (tmp_path / "data" / "big" / "meta.json").write_text(json.dumps(meta))
    os.truncate(tmp_path / "data" / "big" / "train.bin", 2 * 10**10)
    limit = 6 << 30  # of addresses, beside the map itself
    run("fastmix.py", *TINY, "--sources", "big", "--max_steps", 3, cwd=tmp_path,
        limit=(resource.RLIMIT_AS, 2 * 10**10 + limit))


def test_killed_at_random_moments(tmp_path):
    """A short form of bench_kill.py."""
    found = kill_loop(tmp_path, runs=1, seed=3, say=lambda *_, **__: None)
    assert None not in found and sum(map(len, found)) >= 2, found
