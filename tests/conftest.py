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

import child  # noqa: E402  its server takes over the environment

TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "16", "--batch_size", "8",
        "--target_batch_size", "4", "--warmup_steps", "5", "--eval_tokens", "256", "--log_every", "5", "--device",
        "cpu"]


def start(script, *args, cwd, **kw):
    return child.Child([str(ROOT / script), *map(str, args)], cwd, **kw)


def run(script, *args, cwd, status=0, **kw):
    """Runs a script of the repository; returns its stdout, or its stderr where a non-zero status is expected."""
    process = start(script, *args, cwd=cwd, **kw)
    out, err = process.communicate()
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out if status == 0 else err


def refused(script, *args, cwd, **kw):
    """Runs a script on bad input: status 2 and one clear line. Returns the line."""
    err = run(script, *args, cwd=cwd, status=2, **kw).strip()
    line = err.splitlines()[-1]
    assert "error: " in line and "Traceback" not in err, err
    assert len(err.splitlines()) == 1 or err.startswith("usage: ") and len(err.splitlines()) == 2, err
    return line


def write_set(folder, splits, vocab_size=64, tokenizer="synthetic", dtype="uint16", masks=None, schema="text"):
    """A prepared set from {split: ids} and, where some tokens are not learned, {split: mask}."""
    folder.mkdir(parents=True)
    counts = {}
    for split, ids in splits.items():
        np.asarray(ids, dtype=dtype).tofile(folder / f"{split}.bin")
        counts[split] = {"tokens": len(ids), "bytes": len(ids), "documents": 1, "sha256": str(hash(bytes(ids)))}
        if masks:
            np.asarray(masks[split], dtype=np.uint8).tofile(folder / f"{split}.mask.bin")
            learned = int(np.sum(masks[split]))
            counts[split] |= {"learned": learned, "learned_bytes": learned,
                              "mask_sha256": str(hash(bytes(masks[split])))}
    (folder / "meta.json").write_text(json.dumps({"name": folder.name, "schema": schema, "tokenizer": tokenizer,
                                                  "dtype": dtype, "vocab_size": vocab_size,
                                                  "eot_token": vocab_size - 1, "splits": counts}))


def example_set(folder, prompt_seed, response_seed, n=1500, vocab_size=65):
    """Examples of 4 to 6 prompt tokens of one Markov chain, 5 to 9 response tokens of another, and the last id."""
    rng = np.random.default_rng(100 * prompt_seed + response_seed)
    prompt, response = (markov(seed, 10 * n, draw_seed=9) for seed in (prompt_seed, response_seed))
    ids, mask = [], []
    for i in range(n):
        a, b = rng.integers(4, 7), rng.integers(5, 10)
        ids += [*prompt[10 * i: 10 * i + a], *response[10 * i: 10 * i + b], vocab_size - 1]
        mask += [0] * a + [1] * (b + 1)
    ends = np.flatnonzero(np.array(ids) == vocab_size - 1) + 1
    cut = [0, ends[n // 2], ends[3 * n // 4], len(ids)]
    parts = {split: slice(cut[i], cut[i + 1]) for i, split in enumerate(("train", "val", "test"))}
    write_set(folder, {k: np.uint8(ids[v]) for k, v in parts.items()}, vocab_size, schema="prompt/response",
              masks={k: np.uint8(mask[v]) for k, v in parts.items()})


def markov(seed, n, vocab_size=64, successors=4, draw_seed=0):
    """n tokens of a random Markov chain; `seed` sets its transitions, `draw_seed` the path."""
    table = np.random.default_rng(seed).integers(0, vocab_size, (vocab_size, successors))
    choice = np.random.default_rng(1000 * seed + draw_seed).integers(0, successors, n)
    ids, state = np.empty(n, np.uint8), 0
    for i, c in enumerate(choice):
        ids[i] = state = table[state, c]
    return ids


def chain_set(folder, seed, n=20_000, draw_seed=0):
    ids = markov(seed, n, draw_seed=draw_seed)
    write_set(folder, {"train": ids[: n // 2], "val": ids[n // 2: 3 * n // 4], "test": ids[3 * n // 4:]})


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """data/ with three Markov chains a, b, c, uniform `noise`, and targets drawn from b's chain and from c's."""
    folder = tmp_path_factory.mktemp("synthetic")
    for i, name in enumerate("abc", 1):
        chain_set(folder / "data" / name, i)
    chain_set(folder / "data" / "target", 2, draw_seed=7)
    chain_set(folder / "data" / "target_c", 3, draw_seed=7)
    chain_set(folder / "data" / "b2", 2)  # b again under another name
    noise = np.random.default_rng(0).integers(0, 64, 20_000).astype(np.uint8)
    write_set(folder / "data" / "noise", {"train": noise[:10_000], "val": noise[10_000:15_000],
                                          "test": noise[15_000:]})
    return folder


def log_rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def wait_for_step(process, out, step):
    """Blocks until the log shows a step; the run must still be going on."""
    while not (out / "log.jsonl").exists() or not any(r["step"] >= step for r in log_rows(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def results(out):
    """What a run leaves, however often it was looked at or interrupted: (log rows, mixture, {name: all other})."""
    out = Path(out)
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    rows, mixture = log_rows(out), json.loads((out / "mixture.json").read_text())
    for d in (mixture, ckpt["state"], *rows):
        d.pop("seconds")
    mixture.pop("settings")
    moments = {f"{p}.{name}": t for p, s in ckpt["optimizer"]["state"].items() for name, t in s.items()}
    return rows, mixture, {**ckpt["model"], **moments, **ckpt["state"]}


def assert_same(out, reference, with_log=True):
    """Bit for bit: the mixture, the model, the optimizer's moments and all state of the loop."""
    (rows, mixture, found), (rows_r, mixture_r, found_r) = results(out), results(reference)
    assert mixture == mixture_r and found.keys() == found_r.keys()
    for name, value in found.items():
        assert torch.equal(value, found_r[name]) if torch.is_tensor(value) else value == found_r[name], name
    if with_log:
        assert rows == rows_r
