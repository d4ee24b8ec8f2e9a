"""Helpers of the tests: the programs as a user starts them, and small token sets."""
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # models this small only lose by threads
torch.set_num_threads(1)

import child  # noqa: E402  after the lines above: its server inherits the environment

TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "16",
        "--batch_size", "8", "--target_batch_size", "4", "--warmup_steps", "5",
        "--eval_tokens", "256", "--log_every", "5", "--device", "cpu"]


# ---- the programs --------------------------------------------------------------------------------

def start(script, *args, cwd, picture=False, **kw):
    """
    Starts a script of the repository, and does not wait for it. Without `picture` fastmix.py finds
    no matplotlib: its picture at the end takes longer than most runs of the tests.
    """
    missing = ()
    if script == "fastmix.py" and not picture:
        missing = ("matplotlib",)
    return child.Child([str(ROOT / script), *map(str, args)], cwd, missing=missing, **kw)


def run(script, *args, cwd, status=0, **kw):
    """Runs a script; returns its stdout, or its stderr if a status other than 0 is expected."""
    process = start(script, *args, cwd=cwd, **kw)
    out, err = process.communicate()
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out if status == 0 else err


def refused(script, *args, cwd, **kw):
    """Runs a script on bad input: status 2 and one clear line. Returns the line."""
    err = run(script, *args, cwd=cwd, status=2, **kw)
    lines = err.strip().splitlines()
    assert "Traceback" not in err, err
    if err.startswith("usage: "):  # argparse prints the usage before its own line
        lines = lines[1:]
    assert len(lines) == 1, err
    assert "error: " in lines[0], err
    return lines[0]


def wait_for_step(process, out, step):
    """Waits until the log shows a step; the run must not have ended by then."""
    while not (out / "log.jsonl").exists() or not any(r["step"] >= step for r in log_rows(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# ---- token sets ----------------------------------------------------------------------------------

def write_set(folder, splits, vocab_size=64, tokenizer="synthetic", dtype="uint16", masks=None,
              schema="text"):
    """A prepared set from {split: ids} and, where some tokens are not learned, {split: mask}."""
    folder.mkdir(parents=True)
    counts = {}
    for split, ids in splits.items():
        np.asarray(ids, dtype=dtype).tofile(folder / f"{split}.bin")
        counts[split] = {
            "tokens": len(ids),
            "bytes": len(ids),
            "documents": 1,
            "sha256": str(hash(bytes(ids)))}
        if masks:
            mask = np.asarray(masks[split], dtype=np.uint8)
            mask.tofile(folder / f"{split}.mask.bin")
            counts[split]["learned"] = int(mask.sum())
            counts[split]["learned_bytes"] = int(mask.sum())
            counts[split]["mask_sha256"] = str(hash(bytes(mask)))
    meta = {"name": folder.name, "schema": schema, "tokenizer": tokenizer, "dtype": dtype,
            "vocab_size": vocab_size, "eot_token": vocab_size - 1, "splits": counts}
    (folder / "meta.json").write_text(json.dumps(meta))


def markov(seed, n, vocab_size=64, successors=4, draw_seed=0):
    """n tokens of a random Markov chain; `seed` sets its transitions, `draw_seed` the path."""
    table = np.random.default_rng(seed).integers(0, vocab_size, (vocab_size, successors))
    choice = np.random.default_rng(1000 * seed + draw_seed).integers(0, successors, n)
    ids = np.empty(n, np.uint8)
    state = 0
    for i in range(n):
        state = table[state, choice[i]]
        ids[i] = state
    return ids


def chain_set(folder, seed, n=20_000, draw_seed=0):
    """A set of n tokens of a Markov chain: half of them train, a quarter each val and test."""
    ids = markov(seed, n, draw_seed=draw_seed)
    train, val, test = np.split(ids, [n // 2, 3 * n // 4])
    write_set(folder, {"train": train, "val": val, "test": test})


def example_set(folder, prompt_seed, response_seed, n=1500, vocab_size=65):
    """
    A set of n examples: 4 to 6 prompt tokens of one Markov chain, 5 to 9 response tokens of
    another, and the last id. Half of them are train, a quarter each val and test.
    """
    rng = np.random.default_rng(100 * prompt_seed + response_seed)
    prompt = markov(prompt_seed, 10 * n, draw_seed=9)
    response = markov(response_seed, 10 * n, draw_seed=9)
    ids = []
    mask = []
    ends = []
    for i in range(n):
        n_prompt = rng.integers(4, 7)
        n_response = rng.integers(5, 10)
        ids += [*prompt[10 * i: 10 * i + n_prompt], *response[10 * i: 10 * i + n_response]]
        ids.append(vocab_size - 1)
        mask += [0] * n_prompt + [1] * (n_response + 1)
        ends.append(len(ids))
    cuts = [ends[n // 2], ends[3 * n // 4]]
    splits = dict(zip(("train", "val", "test"), np.split(np.array(ids, np.uint8), cuts)))
    masks = dict(zip(("train", "val", "test"), np.split(np.array(mask, np.uint8), cuts)))
    write_set(folder, splits, vocab_size, schema="prompt/response", masks=masks)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """
    data/ with three Markov chains a, b, c, uniform `noise`, b again under another name, and
    targets drawn from b's chain and from c's.
    """
    folder = tmp_path_factory.mktemp("synthetic")
    for seed, name in enumerate("abc", 1):
        chain_set(folder / "data" / name, seed)
    chain_set(folder / "data" / "target", 2, draw_seed=7)
    chain_set(folder / "data" / "target_c", 3, draw_seed=7)
    chain_set(folder / "data" / "b2", 2)
    noise = np.random.default_rng(0).integers(0, 64, 20_000).astype(np.uint8)
    train, val, test = np.split(noise, [10_000, 15_000])
    write_set(folder / "data" / "noise", {"train": train, "val": val, "test": test})
    return folder


# ---- what a run wrote ----------------------------------------------------------------------------

def log_rows(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def result_json(out):
    return json.loads(Path(out, "mixture.json").read_text())


def results(out):
    """
    What a run leaves, but for times and flags -> (log rows, mixture.json, {name: all that is in the
    checkpoint}). These must not depend on how often a run was looked at or interrupted.
    """
    rows = log_rows(out)
    mixture = result_json(out)
    ckpt = torch.load(Path(out, "ckpt.pt"), weights_only=True)
    mixture.pop("settings")
    for record in (mixture, ckpt["state"], *rows):
        record.pop("seconds")
    moments = {}
    for number, state in ckpt["optimizer"]["state"].items():
        for name, tensor in state.items():
            moments[f"{number}.{name}"] = tensor
    return rows, mixture, {**ckpt["model"], **moments, **ckpt["state"]}


def assert_same(out, reference, with_log=True):
    """Bit for bit: the mixture, the model, the optimizer's moments and all state of the loop."""
    rows, mixture, found = results(out)
    expected_rows, expected_mixture, expected = results(reference)
    if not with_log:  # nor how many rows there are
        found.pop("rows")
        expected.pop("rows")
    assert mixture == expected_mixture
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if torch.is_tensor(value):
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name], name
    if with_log:
        assert rows == expected_rows
