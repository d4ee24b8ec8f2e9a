"""Runs through the command line: resume, kill, schedules, and what a run writes."""
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import TINY, assert_same, log_rows, refused, results, run, start

BASE = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", 60]


RUNS = {  # out_dir: flags
    "reference": BASE,
    "every": [*BASE, "--log_every", 1],
    "looking": [*BASE, "--eval_every", 7, "--log_every", 3, "--source_losses"],
    "fixed": [*BASE, "--mixture", "a=3,b=1"],
    "whole": [*BASE, "--max_steps", 20],
    "parts": [*BASE, "--max_steps", 20, "--batch_size", 2, "--grad_accum", 4],
    "own": [*TINY, "--sources", "a,b", "--max_steps", 2],
    "entropy": [*BASE, "--dtype", "bfloat16", "--entropy", 30],  # strong enough to hold the mixture near uniform
    "diverged": [*BASE, "--max_steps", 40],
    "at-uniform": [*BASE, "--max_steps", 2, "--mixture", "uniform", "--alignment", "all", "--dtype", "bfloat16"],
    "started": [*BASE, "--max_steps", 5, "--log_every", 1, "--start_mixture", "a=7,b=2,noise=1"],
    "far": [*BASE, "--learning_rate_mixture", 1000, "--log_every", 1],
    "at-proportional": [*BASE, "--max_steps", 2, "--mixture", "proportional"],
}


@pytest.fixture(scope="module")
def stdout(synthetic):
    """{out_dir: stdout} of all the runs above, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(lambda r: (r[0], run("fastmix.py", *r[1], "--out_dir", r[0], cwd=synthetic)),
                             RUNS.items()))


@pytest.fixture(scope="module")
def reference(synthetic, stdout):
    assert "test loss" in stdout["reference"] and "epochs" in stdout["reference"]
    return synthetic / "reference"


def wait_for_step(process, out, step):
    """Blocks until the log shows a step; the run must still be going on."""
    while not (out / "log.jsonl").exists() or not any(r["step"] >= step for r in log_rows(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_what_a_run_writes(reference):
    mixture = json.loads((reference / "mixture.json").read_text())
    for weights in (mixture["mixture"], *mixture["mixtures"].values()):
        assert list(weights) == ["a", "b", "noise"] and math.isclose(sum(weights.values()), 1, abs_tol=1e-12)
    assert mixture["mixture"] == mixture["mixtures"][mixture["recommended"]]
    assert mixture["unit"] == "tokens" and mixture["target"] == ["target"] and mixture["settings"]["n_layer"] == 1
    tokens = 60 * 8 * 16
    assert mixture["tokens"] == tokens == sum(s["tokens_seen"] for s in mixture["sources"].values())
    for s in mixture["sources"].values():
        assert s["epochs"] == s["tokens_seen"] / s["tokens_available"]
    rows = log_rows(reference)
    assert [r["step"] for r in rows] == list(range(0, 61, 5))
    assert all(math.isclose(sum(r["alpha"].values()), 1, rel_tol=1e-6) for r in rows)
    assert rows[0]["alpha"] == dict.fromkeys(["a", "b", "noise"], rows[0]["alpha"]["a"]) and rows[0]["train_loss"] is None
    assert rows[-1]["tokens"] == tokens and rows[-1]["target_val_loss"] is not None
    assert all(v is not None for r in rows[1:] for v in (*r["alignment"].values(), *r["source_loss"].values()))
    # one byte a token in these sets, so bits a byte is the loss in bits
    assert math.isclose(mixture["test_bits_per_byte"], mixture["test_loss"] / math.log(2))


def test_mixture_json_follows_from_the_log(synthetic, stdout):
    """The three named mixtures, recomputed from a log that holds every step."""
    mixtures = json.loads((synthetic / "every" / "mixture.json").read_text())["mixtures"]
    alphas = np.array([list(r["alpha"].values()) for r in log_rows(synthetic / "every")])  # (61, K), last: after training
    for name, expected in (("last", alphas[60]), ("last_half_average", alphas[30:60].mean(0)),
                           ("run_average", alphas[:60].mean(0))):
        np.testing.assert_allclose(list(mixtures[name].values()), expected, rtol=1e-6)


def test_looking_more_often_changes_nothing(synthetic, reference):
    assert_same(synthetic / "looking", reference, with_log=False)


def test_killed_and_resumed_is_bit_for_bit_the_same(synthetic, reference):
    """SIGKILL somewhere after the checkpoint of step 20, log lines after it and all."""
    out = synthetic / "killed"
    process = start("fastmix.py", *BASE, "--out_dir", "killed", cwd=synthetic)
    wait_for_step(process, out, 30)
    process.kill()
    process.communicate()
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 3')  # a line cut short
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] < 60
    run("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic)
    assert_same(out, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_says_how_to_go_on(synthetic, reference, number):
    """Stops between log lines, so the meters of the interval must survive too."""
    out = synthetic / f"interrupted-{number}"
    process = start("fastmix.py", *BASE, "--out_dir", out.name, cwd=synthetic)
    wait_for_step(process, out, 5)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and f"python fastmix.py --resume --out_dir {out.name}" in stdout, (stdout, stderr)
    assert not stderr
    run("fastmix.py", *BASE, "--resume", "--out_dir", out.name, cwd=synthetic)
    assert_same(out, reference)


def test_resuming_a_finished_run_repeats_its_result(synthetic, reference):
    before = results(reference)[1]
    run("fastmix.py", "--resume", "--out_dir", "reference", cwd=synthetic)
    assert results(reference)[1] == before


def test_fixed_mixture_is_resumed_too(synthetic, stdout):
    process = start("fastmix.py", *RUNS["fixed"], "--out_dir", "fixed-killed", cwd=synthetic)
    wait_for_step(process, synthetic / "fixed-killed", 25)
    process.kill()
    process.communicate()
    run("fastmix.py", "--resume", "--out_dir", "fixed-killed", cwd=synthetic)
    assert_same(synthetic / "fixed-killed", synthetic / "fixed")
    rows = log_rows(synthetic / "fixed")
    assert all(r["alpha"] == {"a": 0.75, "b": 0.25, "noise": 0.0} for r in rows)
    seen = json.loads((synthetic / "fixed" / "mixture.json").read_text())["sources"]
    assert seen["a"]["tokens_seen"] == 3 * seen["b"]["tokens_seen"] and seen["noise"]["tokens_seen"] == 0
    assert rows[-1]["source_loss"]["noise"] is None and rows[-1]["alignment"]["a"] is None


def test_gradient_accumulation_is_a_larger_batch(synthetic, stdout):
    """8 sequences at once, or 4 micro-batches of 2: the same search up to rounding."""
    whole, parts = synthetic / "whole", synthetic / "parts"
    for a, b in zip(log_rows(whole), log_rows(parts)):
        for key in ("alpha", "alignment", "source_loss"):
            for name in a[key]:
                if a[key][name] is not None:
                    assert math.isclose(a[key][name], b[key][name], rel_tol=2e-3, abs_tol=1e-5), (a["step"], key, name)


def test_replayed_trajectory(synthetic, reference):
    """--mixture log.jsonl follows the recorded weights by fraction of training, in a run of another length."""
    run("fastmix.py", *BASE, "--max_steps", 120, "--mixture", "reference/log.jsonl", "--out_dir", "replay",
        cwd=synthetic)
    recorded = {r["step"]: r["alpha"] for r in log_rows(reference)}
    for row in log_rows(synthetic / "replay"):
        if row["step"] % 10 == 0:
            assert row["alpha"] == pytest.approx(recorded[row["step"] // 2], rel=1e-6)


def test_found_mixture_uniform_and_proportional(synthetic, reference):
    found = json.loads((reference / "mixture.json").read_text())["mixture"]
    run("fastmix.py", *BASE, "--max_steps", 2, "--mixture", "reference/mixture.json", "--out_dir", "at-reference",
        cwd=synthetic)
    for out, expected in (("at-reference", found), ("at-uniform", dict.fromkeys(found, 1 / 3)),
                          ("at-proportional", dict.fromkeys(found, 1 / 3))):
        assert log_rows(synthetic / out)[0]["alpha"] == pytest.approx(expected, rel=1e-6)


def test_search_from_another_start(synthetic, stdout):
    rows = log_rows(synthetic / "started")
    assert rows[0]["alpha"] == pytest.approx({"a": 0.7, "b": 0.2, "noise": 0.1}, rel=1e-6)
    for before, row in zip(rows, rows[1:]):  # a logit moves by about the learning rate a step
        for name, share in row["alpha"].items():
            assert 0.9 < share / before["alpha"][name] < 1.1 and share != before["alpha"][name]


def test_a_share_below_every_number_is_no_end(synthetic, stdout):
    """Steps so long that shares underflow: the search collapses, but goes on with finite numbers and every source."""
    alphas = np.array([list(r["alpha"].values()) for r in log_rows(synthetic / "far")])
    assert alphas.min() < 1e-20 and alphas.max() > 0.999 and (alphas > 0).all()  # at 0 a source is lost
    np.testing.assert_allclose(alphas.sum(1), 1, rtol=1e-6)


def test_own_sources_without_a_target(synthetic, stdout):
    assert "own val splits in equal parts" in stdout["own"]
    assert json.loads((synthetic / "own" / "mixture.json").read_text())["target"] == ["a", "b"]


def test_bfloat16_and_entropy(synthetic, stdout):
    assert "bfloat16" in stdout["entropy"]
    assert log_rows(synthetic / "entropy")[-1]["alpha"] == pytest.approx(dict.fromkeys(["a", "b", "noise"], 1 / 3), abs=0.05)


def test_a_strangers_checkpoint_runs_no_code(synthetic, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    (tmp_path / "out").mkdir()
    torch.save({"args": Payload()}, tmp_path / "out" / "ckpt.pt")
    line = refused("fastmix.py", "--resume", "--out_dir", tmp_path / "out", cwd=synthetic)
    assert "cannot be read" in line and not (tmp_path / "owned").exists()


def test_diverged_run_stops_and_keeps_its_checkpoint(synthetic, stdout):
    """A run goes on from weights blown up by hand."""
    out = synthetic / "diverged"
    state = torch.load(out / "ckpt.pt", weights_only=True)
    state["args"]["max_steps"], state["step"] = 80, 40
    state["model"]["lm_head.weight"][0, 0] = math.nan
    torch.save(state, out / "ckpt.pt")
    before = (out / "ckpt.pt").read_bytes()
    line = refused("fastmix.py", "--resume", "--out_dir", "diverged", cwd=synthetic)
    assert "no longer finite at step 41;" in line, line
    assert (out / "ckpt.pt").read_bytes() == before


def test_full_disk_keeps_the_last_checkpoint(synthetic, reference):
    """A limit on file size fails the write in the middle, as a full disk does."""
    import resource
    out = synthetic / "full"
    process = start("fastmix.py", *BASE, "--out_dir", "full", cwd=synthetic)
    wait_for_step(process, out, 25)
    process.kill()
    process.communicate()
    before = (out / "ckpt.pt").read_bytes()
    limit = len(before) // 2
    line = refused("fastmix.py", "--resume", "--out_dir", "full", cwd=synthetic,
                   limit=(resource.RLIMIT_FSIZE, limit))
    assert "cannot write" in line and "--resume" in line
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.partial"))
    run("fastmix.py", "--resume", "--out_dir", "full", cwd=synthetic)
    assert_same(out, reference)
