"""A run of fastmix.py: what it writes and prints, how it resumes, and what may disturb it."""
import ast
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix
import prepare_data
from conftest import (ROOT, TINY, assert_same, chain_set, example_set, log_rows, markov, refused,
                      result_json, results, run, start, wait_for_step, write_set)
from model import GPT, GPTConfig

BASE = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", 60]
RUNS = {  # out_dir: flags
    "reference": BASE,
    "every": [*BASE, "--log_every", 1],
    "looking": [*BASE, "--log_every", 7],
    "fixed": [*BASE, "--mixture", "a=3,b=1"],
    "whole": [*BASE, "--max_steps", 20],
    "parts": [*BASE, "--max_steps", 20, "--batch_size", 2, "--grad_accum", 4],
    "own": [*TINY, "--sources", "a,b", "--max_steps", 2],
    "rounded": [*BASE, "--dtype", "bfloat16"],
    "diverged": [*BASE, "--max_steps", 40],
    "far": [*BASE, "--learning_rate_mixture", 1000, "--log_every", 1],
}


@pytest.fixture(scope="module")
def stdout(synthetic):
    """{out_dir: stdout} of all the runs above, two at a time."""
    def once(out):
        stdout = run("fastmix.py", *RUNS[out], "--out_dir", out, cwd=synthetic,
                     picture=out == "reference")
        return out, stdout

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(once, RUNS))


@pytest.fixture(scope="module")
def reference(synthetic, stdout):
    return synthetic / "reference"


def kill(process):
    process.kill()
    process.communicate()


# ---- what a run writes ---------------------------------------------------------------------------

ROW = ["step", "max_steps", "alpha", "alignment", "train_loss", "source_loss", "target_val_loss",
       "target_losses", "tokens", "seconds"]
RESULT = {"mixture", "recommended", "unit", "bytes", "mixtures", "target", "test_loss",
          "test_bits_per_byte", "before", "val_loss", "lowest", "targets", "sources", "searched",
          "tokenizer", "seed", "steps", "tokens", "seconds", "torch", "settings"}
SOURCE = {"tokens_available", "tokens_seen", "epochs_seen", "epochs", "start", "lower", "upper",
          "bytes_per_token", "tokens_per_document", "val_loss", "bound"}
TARGET = {"weight", "val_loss", "test_loss", "test_bits_per_byte", "learned_only"}


def test_the_log(reference):
    rows = log_rows(reference)
    assert [row["step"] for row in rows] == list(range(0, 61, 5))
    for row in rows:
        assert list(row) == ROW
        assert list(row["alpha"]) == ["a", "b", "noise"]
        assert math.isclose(sum(row["alpha"].values()), 1, rel_tol=1e-6)
        assert row["max_steps"] == 60
        assert row["tokens"] == row["step"] * 8 * 16
        assert row["target_losses"] == {"target": row["target_val_loss"]}
    none = dict.fromkeys(["a", "b", "noise"])
    assert rows[0]["alpha"] == dict.fromkeys(none, rows[0]["alpha"]["a"])
    assert rows[0]["train_loss"] is None
    assert rows[0]["alignment"] == none
    assert rows[0]["source_loss"] == none
    for row in rows[1:]:
        assert None not in [*row["alignment"].values(), *row["source_loss"].values()]
        assert 0 < row["train_loss"] < 5
    assert rows[-1]["target_val_loss"] < rows[0]["target_val_loss"] - 0.3
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_result(reference):
    result = result_json(reference)
    rows = log_rows(reference)
    assert result.keys() == RESULT
    for mixture in (result["mixture"], result["bytes"], *result["mixtures"].values()):
        assert list(mixture) == ["a", "b", "noise"]
        assert math.isclose(sum(mixture.values()), 1, abs_tol=1e-12)
    assert list(result["mixtures"]) == ["last", "last_half_average", "run_average"]
    assert result["recommended"] == "last"
    assert result["mixture"] == result["mixtures"]["last"] == rows[-1]["alpha"]
    assert result["unit"] == "tokens"
    assert result["searched"] is True
    assert result["tokenizer"] == "synthetic"
    assert result["torch"] == torch.__version__
    assert result["seed"] == 1337
    assert result["steps"] == 60
    assert result["tokens"] == 60 * 8 * 16
    assert result["target"] == ["target"]
    assert result["before"] == rows[0]["target_losses"]
    assert result["val_loss"] == pytest.approx(rows[-1]["target_val_loss"])
    lowest = min(rows, key=lambda row: row["target_val_loss"])
    assert result["lowest"] == {"step": lowest["step"], "val_loss": lowest["target_val_loss"]}
    assert result["seconds"] == pytest.approx(rows[-1]["seconds"], abs=0.06)

    settings = vars(fastmix.parse_args([])) | {"n_layer": 1, "out_dir": "reference"}
    assert result["settings"].keys() == settings.keys()
    assert result["settings"]["n_layer"] == 1
    assert result["settings"]["sources"] == "a,b,noise"
    assert result["settings"]["mixture"] is None

    assert result["targets"].keys() == {"target"}
    target = result["targets"]["target"]
    assert target.keys() == TARGET
    assert target["weight"] == 1
    assert target["learned_only"] is False
    assert target["val_loss"] == rows[-1]["target_val_loss"]
    for source in result["sources"].values():
        assert source.keys() == SOURCE
        assert source["start"] == pytest.approx(1 / 3)
        assert source["tokens_available"] == 10_000
    assert not list(reference.glob("*.partial"))


def test_mixtures_follow_from_the_log(synthetic, stdout):
    """The three named mixtures, recomputed from a log that holds every step."""
    rows = log_rows(synthetic / "every")
    alphas = np.array([list(row["alpha"].values()) for row in rows])  # (61, K), 60: after training
    for name, expected in (("last", alphas[60]), ("last_half_average", alphas[30:60].mean(0)),
                           ("run_average", alphas[:60].mean(0))):
        found = list(result_json(synthetic / "every")["mixtures"][name].values())
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def text_set(folder, seed, bytes_per_token, documents):
    ids = markov(seed, 8000, draw_seed=5)
    train, val, test = np.split(ids, [4000, 6000])
    write_set(folder, {"train": train, "val": val, "test": test}, vocab_size=65)
    meta = json.loads((folder / "meta.json").read_text())
    for counts in meta["splits"].values():
        counts["bytes"] = bytes_per_token * counts["tokens"]
        counts["documents"] = documents
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A search with all that mixture.json counts: bounds, weights, examples, a longer real run."""
    folder = tmp_path_factory.mktemp("counted")
    text_set(folder / "data" / "a", 1, bytes_per_token=3, documents=10)
    text_set(folder / "data" / "b", 2, bytes_per_token=4, documents=2)
    text_set(folder / "data" / "like_b", 2, bytes_per_token=5, documents=1)
    example_set(folder / "data" / "tasks", 3, 2)
    example_set(folder / "data" / "like_tasks", 3, 2, n=400)
    run("fastmix.py", *TINY, "--sources", "a,b,tasks", "--target", "like_b=3,like_tasks=1",
        "--max_steps", 50, "--log_every", 1, "--train_tokens", 20_000, "--max_epochs", 2.3,
        "--bounds", "a=0.25:", "--learning_rate_mixture", 0.1, cwd=folder)
    return folder


def test_the_results_numbers_by_another_way(counted):
    """Epochs, bytes and bounds, from the log, the flags and the sets."""
    result = result_json(counted / "out")
    sources = result["sources"]
    rows = log_rows(counted / "out")
    alphas = np.array([list(row["alpha"].values()) for row in rows])
    found = dict(zip(sources, alphas[-1]))
    assert result["mixture"] == pytest.approx(found, rel=1e-6)

    # 50 steps of 8 sequences of 16 positions, which the examples of `tasks` do not fill
    data = fastmix.load_sets(counted / "data", list(sources), [], 16)
    n_rows = len(data["tasks"].splits["train"].row_starts)
    fill = {"a": 1, "b": 1, "tasks": data["tasks"].available("train") / n_rows / 16}
    assert 0.4 < fill["tasks"] < 0.99
    sequences = {name: source["tokens_seen"] / 16 / fill[name] for name, source in sources.items()}
    assert sum(sequences.values()) == pytest.approx(50 * 8, rel=1e-3)
    assert result["tokens"] == sum(source["tokens_seen"] for source in sources.values())
    for name, source in sources.items():
        available = data[name].available("train")
        assert source["tokens_available"] == available
        assert source["epochs_seen"] == source["tokens_seen"] / available
        assert source["epochs"] == pytest.approx(found[name] * 20_000 / available)
        assert source["start"] == rows[0]["alpha"][name]
        assert source["lower"] == {"a": 0.25, "b": 0, "tasks": 0}[name]
        assert source["upper"] == pytest.approx(min(1, 2.3 * available / 20_000))
        at_cap = abs(found[name] / source["upper"] - 1) < 0.005
        at_floor = name == "a" and abs(found[name] / 0.25 - 1) < 0.005
        expected = ""
        if at_floor:
            expected = "floor"
        if at_cap:
            expected = "cap"
        assert source["bound"] == expected
    assert sources["b"]["epochs"] < 2.3 + 1e-6
    assert sources["a"]["bound"] == "floor"  # so that the test means something
    assert sources["b"]["bound"] == "cap"

    assert sources["a"]["bytes_per_token"] == 3
    assert sources["a"]["tokens_per_document"] == 8000 / 30
    assert sources["b"]["bytes_per_token"] == 4
    assert sources["b"]["tokens_per_document"] == 8000 / 6
    assert sources["tasks"]["bytes_per_token"] == 1
    size = {"a": 3 * found["a"], "b": 4 * found["b"], "tasks": found["tasks"]}
    expected = {name: size[name] / sum(size.values()) for name in size}
    assert result["bytes"] == pytest.approx(expected, rel=1e-6)


def test_losses_by_another_way(counted):
    """The losses in the results are those of the model in ckpt.pt, on all windows of the splits."""
    result = result_json(counted / "out")
    ckpt = torch.load(counted / "out" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**ckpt["config"]))
    model.load_state_dict(ckpt["model"])
    names = ["a", "b", "tasks", "like_b", "like_tasks"]
    data = fastmix.load_sets(counted / "data", names, [], 16)

    def loss_of(name, split, max_tokens):
        x, y = data[name].windows(split, data[name].spread(split, max_tokens))
        with torch.no_grad():
            logits = model.lm_head(model(torch.from_numpy(x)))
        y = torch.from_numpy(y)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1).item()

    weights = {"like_b": 0.75, "like_tasks": 0.25}
    bytes_per_learned_token = {"like_b": 5, "like_tasks": 1}
    test_loss = 0.0
    bits_per_byte = 0.0
    for name, target in result["targets"].items():
        assert target["weight"] == weights[name]
        assert target["learned_only"] is (name == "like_tasks")
        assert target["val_loss"] == pytest.approx(loss_of(name, "val", 256), rel=1e-5)
        loss = loss_of(name, "test", 2**18)
        assert target["test_loss"] == pytest.approx(loss, rel=1e-5)
        bits = loss / math.log(2) / bytes_per_learned_token[name]
        assert target["test_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        test_loss += weights[name] * loss
        bits_per_byte += weights[name] * bits
    assert result["test_loss"] == pytest.approx(test_loss, rel=1e-5)
    assert result["test_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    for name, source in result["sources"].items():
        assert source["val_loss"] == pytest.approx(loss_of(name, "val", 256), rel=1e-5)


def test_bytes_of_what_is_shown(tmp_path):
    """
    Bits per byte divide by the bytes whose tokens are learned: not by those of responses that are
    cut or left out, of which a fourth is each here.
    """
    lengths = [(10, 20), (10, 300), (300, 20), (40, 3)]  # of prompt and response, in bytes
    records = []
    for i in range(1200):
        prompt, response = lengths[i % 4]
        record = {"prompt": f"{i:04d}".ljust(prompt, "?"), "response": f"{i:03d}".ljust(response)}
        records.append(json.dumps(record) + "\n")
    (tmp_path / "qa.jsonl").write_text("".join(records))
    run("prepare_data.py", "qa=qa.jsonl", cwd=tmp_path)
    for block_size in (64, 400):
        data = fastmix.load_sets(tmp_path / "data", ["qa"], [], block_size)["qa"]
        for split in ("train", "val", "test"):
            _, y = data.windows(split, data.splits[split].row_starts)
            n_learned = (y != fastmix.IGNORE).sum()
            n_bytes = ((y != fastmix.IGNORE) & (y != 256)).sum()
            assert data.tokens_per_byte(split) == pytest.approx(n_learned / n_bytes, rel=1e-12)
            counts = data.meta["splits"][split]
            of_all = counts["learned"] / counts["learned_bytes"]
            assert (data.tokens_per_byte(split) == pytest.approx(of_all)) == (block_size == 400)


def test_what_a_run_prints(synthetic, stdout):
    """The model and the plan, a line per report, the table, and what was written."""
    text = stdout["reference"]
    lines = text.splitlines()
    assert lines[0] == ("16,480 parameters, 128 tokens per step, cpu; sources a,b,noise; target "
                        "target; searching")
    assert [line.split()[1] for line in lines[1:14]] == [str(step) for step in range(0, 61, 5)]
    assert lines[14] == ""
    table = text.split("\n\n")[1].split("\nwrote ")[0]
    assert table.startswith("source ")
    assert "target target: test loss" in table
    assert lines[-2:] == ["wrote reference/mixture.json, log.jsonl and ckpt.pt",
                          "drew reference/mixture.png"]
    assert table in run("plot_mixture.py", "reference", cwd=synthetic)
    assert "; mixture a=3,b=1\n" in stdout["fixed"]
    assert "mean of the targets" in stdout["own"]


def test_progress_line():
    row = {"step": 0, "max_steps": 200, "alpha": {"a": 0.3, "b": 0.7}, "train_loss": None,
           "target_val_loss": 2.5, "tokens": 0}
    line = fastmix.progress(row, 0.0)
    assert line == "step     0   0% | target 2.500 | a ▃ 0.30  b ▆ 0.70"
    row |= {"step": 50, "train_loss": 2.25, "tokens": 50 * 64}
    line = fastmix.progress(row, 25.0)
    assert line == ("step    50  25% | target 2.500 | train 2.250 | 1,600 tok/s | 6 s left | "
                    "a ▃ 0.30  b ▆ 0.70")
    row["alpha"] = {f"s{k}": k / 45 for k in range(10)}  # the largest eight, in the run's order
    shown = fastmix.progress(row, 25.0).split(" | ")[-1].split()[::3]
    assert shown == [f"s{k}" for k in range(2, 10)]


def test_by_name():
    """None for NaN, which JSON does not know."""
    found = fastmix.by_name(["a", "b", "c"], torch.tensor([0.5, math.nan, 0.0]))
    assert found == {"a": 0.5, "b": None, "c": 0.0}
    assert type(found["a"]) is float


# ---- the same run in other forms -----------------------------------------------------------------

def test_looking_more_often_changes_nothing(synthetic, reference):
    assert_same(synthetic / "looking", reference, with_log=False)
    assert_same(synthetic / "every", reference, with_log=False)


def test_gradient_accumulation_is_a_larger_batch(synthetic, stdout):
    """8 sequences at once, or 4 micro-batches of 2: the same search up to rounding."""
    whole = log_rows(synthetic / "whole")
    parts = log_rows(synthetic / "parts")
    assert len(whole) == len(parts)
    for row, other in zip(whole, parts):
        for key in ("alpha", "alignment", "source_loss"):
            for name, value in row[key].items():
                where = (row["step"], key, name)
                if value is None:
                    assert other[key][name] is None, where
                else:
                    assert math.isclose(value, other[key][name], rel_tol=2e-3, abs_tol=1e-5), where


def test_bfloat16(synthetic, stdout):
    rounded = log_rows(synthetic / "rounded")
    exact = log_rows(synthetic / "reference")
    assert rounded[0]["target_val_loss"] != exact[0]["target_val_loss"]
    for row, other in zip(rounded, exact):
        assert row["target_val_loss"] == pytest.approx(other["target_val_loss"], rel=1e-2)
        assert row["alpha"] == pytest.approx(other["alpha"], abs=0.02)


def test_own_sources_without_a_target(synthetic, stdout):
    assert "sources a,b; target a,b; searching" in stdout["own"]
    result = result_json(synthetic / "own")
    assert result["target"] == ["a", "b"]
    assert [target["weight"] for target in result["targets"].values()] == [0.5, 0.5]


def test_a_search_moves_a_little_each_step(synthetic, stdout):
    rows = log_rows(synthetic / "every")
    for before, row in zip(rows, rows[1:]):  # a logit moves by about the rate, at most 0.2
        for name, share in row["alpha"].items():
            assert 0.7 < share / before["alpha"][name] < 1.4
            assert share != before["alpha"][name]


def test_steps_far_too_long_lose_no_source(synthetic, stdout):
    """The search collapses at once, but its numbers stay finite, and alpha above its floor."""
    alphas = np.array([list(row["alpha"].values()) for row in log_rows(synthetic / "far")])
    assert alphas.max() > 0.999
    assert 5e-9 < alphas.min() < 2e-8
    np.testing.assert_allclose(alphas.sum(1), 1, rtol=1e-6)


# ---- fixed mixtures ------------------------------------------------------------------------------

def test_mixtures_are_what_they_say(tmp_path):
    """uniform, proportional, weights and a file: logged in each row, and drawn."""
    for seed, (name, n) in enumerate((("a", 4000), ("b", 12_000))):
        chain_set(tmp_path / "data" / name, seed, n=n)
    (tmp_path / "m.json").write_text('{"mixture": {"b": 0.125, "a": 0.875}}')
    for text, share in (("uniform", 0.5), ("proportional", 0.25), ("a=0.8,b=0.2", 0.8),
                        ("m.json", 0.875), ("a=3,b=1", 0.75), ("b", 0.0)):
        out = f"out-{text}"
        run("fastmix.py", *TINY, "--sources", "a,b", "--mixture", text, "--max_steps", 10,
            "--out_dir", out, cwd=tmp_path)
        expected = pytest.approx({"a": share, "b": 1 - share}, abs=1e-12)
        for row in log_rows(tmp_path / out):
            assert row["alpha"] == expected
            assert row["alignment"] == {"a": None, "b": None}
        result = result_json(tmp_path / out)
        assert result["searched"] is False
        for mixture in (result["mixture"], *result["mixtures"].values()):
            assert mixture == expected
        for name, source in result["sources"].items():
            assert source["start"] == pytest.approx(result["mixture"][name])
            assert source["bound"] == ""
            # a step has 8 sequences, of which a source gets its share rounded up or down
            most = 10 * math.ceil(8 * result["mixture"][name] - 1e-9) * 16
            least = 10 * math.floor(8 * result["mixture"][name] + 1e-9) * 16
            assert least <= source["tokens_seen"] <= most


def test_a_found_mixture_is_trained(synthetic, reference):
    found = result_json(reference)["mixture"]
    run("fastmix.py", *BASE, "--max_steps", 2, "--mixture", "reference/mixture.json",
        "--out_dir", "at-reference", cwd=synthetic)
    for row in log_rows(synthetic / "at-reference"):
        assert row["alpha"] == pytest.approx(found, rel=1e-6)


def test_a_fixed_mixture_is_resumed_too(synthetic, stdout):
    out = synthetic / "fixed-killed"
    process = start("fastmix.py", *RUNS["fixed"], "--out_dir", out.name, cwd=synthetic)
    wait_for_step(process, out, 25)
    kill(process)
    run("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
    assert_same(out, synthetic / "fixed")
    sources = result_json(out)["sources"]
    assert sources["a"]["tokens_seen"] == 3 * sources["b"]["tokens_seen"]
    assert sources["noise"]["tokens_seen"] == 0
    for row in log_rows(out):
        assert row["alpha"] == pytest.approx({"a": 0.75, "b": 0.25, "noise": 0.0}, abs=1e-15)
        assert row["alpha"]["noise"] == 0
        assert row["source_loss"]["noise"] is None


# ---- resuming ------------------------------------------------------------------------------------

def test_killed_and_resumed_is_bit_for_bit_the_same(synthetic, reference):
    """After SIGKILL, with a log ahead of the checkpoint by a row and a line that is cut short."""
    out = synthetic / "killed"
    process = start("fastmix.py", *BASE, "--out_dir", "killed", cwd=synthetic)
    wait_for_step(process, out, 30)
    kill(process)
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(log_rows(reference)[-1]) + '\n{"step": 3')
    assert torch.load(out / "ckpt.pt", weights_only=True)["state"]["step"] < 60
    run("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic)
    assert_same(out, reference)
    seconds = [row["seconds"] for row in log_rows(out)]
    assert seconds == sorted(seconds)


def test_ctrl_c_says_how_to_resume(synthetic, reference):
    """Exit status 130, one line, and what follows is the run that nobody stopped, bit for bit."""
    out = synthetic / "interrupted"
    flags = [*BASE, "--out_dir", out.name]
    process = start("fastmix.py", *flags, cwd=synthetic)
    wait_for_step(process, out, 10)  # so that the checkpoint of step 5 has been written
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, (text, err)
    assert err == ""
    lines = [line for line in text.splitlines()[1:] if line and not line.startswith("step ")]
    assert lines == ["stopped; to resume from the last report, if there is one, repeat the command "
                     "with --resume"]
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    assert 5 <= ckpt["state"]["step"] < 60
    assert not (out / "mixture.json").exists()
    run("fastmix.py", *flags, "--resume", cwd=synthetic)
    assert_same(out, reference)


def test_ctrl_c_while_a_checkpoint_is_saved(tmp_path):
    """torch.save() may turn it into a RuntimeError, as it also reports a full disk."""
    def write(file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 2 vs 1")

    (tmp_path / "ckpt.pt").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        fastmix.save_atomically(tmp_path / "ckpt.pt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == b"before"


def test_tee_dies_at_ctrl_c(synthetic):
    """The reader of the output gets the same signal; still the run ends without a traceback."""
    out = synthetic / "tee"
    process = python("fastmix.py", *BASE, "--max_steps", 10**6, "--out_dir", out.name,
                     cwd=synthetic, stdout=subprocess.PIPE)
    wait_for_step(process, out, 20)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    end_quietly(process, 130)
    assert torch.load(out / "ckpt.pt", weights_only=True)["state"]["step"] >= 15


def test_resuming_a_finished_run_repeats_its_result(synthetic, reference):
    rows, before, _ = results(reference)
    text = run("fastmix.py", "--resume", "--out_dir", "reference", cwd=synthetic)
    assert "test loss" in text
    assert results(reference)[1] == before
    assert log_rows(reference)[-1]["step"] == 60
    assert len(log_rows(reference)) == len(rows)


def test_resume_with_what_may_change(synthetic, reference):
    """Folders and how often to look; a resumed run logs by its own --log_every."""
    out = synthetic / "moved"
    process = start("fastmix.py", *BASE, "--out_dir", "moving", cwd=synthetic)
    wait_for_step(process, synthetic / "moving", 10)
    kill(process)
    os.rename(synthetic / "moving", out)
    done = log_rows(out)[-1]["step"]
    (synthetic / "elsewhere").symlink_to(synthetic / "data")
    run("fastmix.py", "--resume", "--out_dir", "moved", "--data_dir", "elsewhere",
        "--log_every", 20, cwd=synthetic)
    # what "before" and the lowest val loss are compared with must be measured alike
    line = refused("fastmix.py", "--resume", "--out_dir", "moved", "--eval_tokens", 128,
                   cwd=synthetic)
    assert "not 128" in line
    steps = [row["step"] for row in log_rows(out)]
    kept = [step for step in steps if step <= done]
    assert kept == list(range(0, kept[-1] + 1, 5))
    assert steps[len(kept):] == [step for step in (20, 40, 60) if step > kept[-1]]
    found = results(out)[2]
    expected = results(reference)[2]
    for name in ("z", "half_sum", "drawn", "lm_head.weight"):
        assert torch.equal(found[name], expected[name]), name


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    """A new log is empty; a resumed run's keeps as many rows as its checkpoint has written."""
    path = tmp_path / "new" / "folder" / "log.jsonl"
    with fastmix.open_log(path, 0) as log:
        assert path.read_text() == ""
        log.write("one\ntwo\nthree\nfo")
    with pytest.raises(FileExistsError):  # another run has begun here meanwhile
        fastmix.open_log(path, 0)
    assert path.read_text() == "one\ntwo\nthree\nfo"
    with fastmix.open_log(path, 3) as log:
        assert path.read_text() == "one\ntwo\nthree\n"
        log.write("new\n")
    assert path.read_text() == "one\ntwo\nthree\nnew\n"
    fastmix.open_log(path, 1).close()
    assert path.read_text() == "one\n"
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_a_log_that_is_not_the_runs_gets_one_line(synthetic, reference):
    """On --resume, before anything is trained; the files stay as they are."""
    log = (reference / "log.jsonl").read_text()
    logs = {"missing": None, "empty": "", "too short": "\n".join(log.splitlines()[:3]) + "\n"}
    for name, text in logs.items():
        out = synthetic / f"log {name}"
        out.mkdir()
        shutil.copy(reference / "ckpt.pt", out)
        if text is not None:
            (out / "log.jsonl").write_text(text)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        line = refused("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
        assert "log.jsonl" in line, line
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_damaged_log_costs_the_picture_alone(synthetic, reference):
    """As many lines, but no text: the run is resumed, with the results of the reference."""
    out = synthetic / "log no text"
    out.mkdir()
    shutil.copy(reference / "ckpt.pt", out)
    (out / "log.jsonl").write_bytes(b"\xff" + (reference / "log.jsonl").read_bytes())
    stdout = run("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic, picture=True)
    assert "drew no picture: log no text/log.jsonl: not what this fastmix.py writes" in stdout
    assert result_json(out)["mixture"] == result_json(reference)["mixture"]


def test_a_set_that_is_overwritten_while_it_is_read(tmp_path, capsys):
    """
    What is open stays as it was. A file that is opened again, as there are only 64 at a time, would
    be the new set's: that is refused. A set opened afterwards is the new one.
    """
    chain_set(tmp_path / "d", 1)
    chain_set(tmp_path / "new", 2)
    os.utime(tmp_path / "new" / "meta.json", ns=(1, 1))  # as a copy may be, it is the older one
    data = fastmix.load_sets(tmp_path, ["d"], [], 16)["d"]
    before = data.windows("train", np.array([0, 5]))
    (tmp_path / "d").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "d")
    shutil.rmtree(tmp_path / "old")
    new = fastmix.load_sets(tmp_path, ["d"], [], 16)["d"]
    for now, then in zip(data.windows("train", np.array([0, 5])), before):
        assert np.array_equal(now, then)
    assert not np.array_equal(new.windows("train", np.array([0, 5]))[0], before[0])
    prepare_data.mapped.cache_clear()
    with pytest.raises(SystemExit):
        data.windows("train", np.array([0, 5]))
    line, = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/d/ was overwritten while it was read" in line
    new.windows("train", np.array([0, 5]))


def test_sets_that_are_overwritten_during_a_run(tmp_path):
    """
    With 40 sets not all files are kept open. The run ends and can be resumed: the data is the same,
    only newer.
    """
    names = [f"s{k}" for k in range(40)]
    for k, name in enumerate(names):
        chain_set(tmp_path / "data" / name, k, n=2000)
    flags = [*TINY, "--batch_size", 40, "--target_batch_size", 40, "--sources", ",".join(names)]
    process = start("fastmix.py", *flags, "--max_steps", 10**6, cwd=tmp_path)
    wait_for_step(process, tmp_path / "out", 5)
    for name in names:
        os.utime(tmp_path / "data" / name / "meta.json")
    _, err = process.communicate()
    assert process.returncode == 2, err
    line, = err.splitlines()
    assert "was overwritten while it was read; prepare it as it was" in line
    ckpt = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    ckpt["args"]["max_steps"] = ckpt["state"]["step"] + 1
    torch.save(ckpt, tmp_path / "out" / "ckpt.pt")
    run("fastmix.py", "--resume", cwd=tmp_path)


def test_resume_after_any_split_changed(tmp_path):
    for seed, name in enumerate(("a", "b", "target")):
        chain_set(tmp_path / "data" / name, seed)
    flags = [*TINY, "--sources", "a,b", "--target", "target"]
    run("fastmix.py", *flags, "--max_steps", 10, cwd=tmp_path)
    for name, split in (("a", "train"), ("a", "val"), ("target", "val"), ("target", "test")):
        path = tmp_path / "data" / name / "meta.json"
        before = path.read_text()
        meta = json.loads(before)
        meta["splits"][split]["sha256"] = "another"
        path.write_text(json.dumps(meta))
        line = refused("fastmix.py", "--resume", cwd=tmp_path)
        assert "the data in data/ is not what out/ckpt.pt was trained on" in line, (name, split)
        path.write_text(before)
    run("fastmix.py", "--resume", cwd=tmp_path)


@pytest.mark.parametrize("name", ["ckpt.pt", "log.jsonl"])
def test_files_that_may_not_be_read(synthetic, reference, monkeypatch, name):
    """One line that names the file; by a stand-in for open(), since root may read all files."""
    real_open = io.open

    def guarded(path, *args, **kw):
        if not isinstance(path, int) and os.fspath(path) == f"reference/{name}":
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *args, **kw)

    monkeypatch.chdir(synthetic)
    monkeypatch.setattr("builtins.open", guarded)
    monkeypatch.setattr(io, "open", guarded)
    before = (reference / "ckpt.pt").read_bytes()
    # OSError is what the last lines of fastmix.py print in one line
    with pytest.raises((SystemExit, OSError)):
        fastmix.main(["--resume", "--out_dir", "reference"])
    monkeypatch.undo()
    assert (reference / "ckpt.pt").read_bytes() == before


# ---- starting from another run's weights ---------------------------------------------------------

def test_init_from(synthetic, reference):
    """Only the weights: mixture, optimizer and steps are new. The model's flags are the file's."""
    flags = ["--init_from", "reference/ckpt.pt", "--device", "cpu", "--sources", "a,b",
             "--target", "target", "--max_steps", 4, "--eval_tokens", 256]
    still = ["--learning_rate", 0, "--learning_rate_mixture", 0]
    run("fastmix.py", *flags, *still, "--out_dir", "still", cwd=synthetic)
    expected = torch.load(reference / "ckpt.pt", weights_only=True)["model"]
    found = torch.load(synthetic / "still" / "ckpt.pt", weights_only=True)["model"]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    result = result_json(synthetic / "still")
    last = log_rows(reference)[-1]["target_val_loss"]  # by another batch size, so summed otherwise
    assert result["before"]["target"] == pytest.approx(last, rel=1e-6)
    assert result["before"]["target"] == result["targets"]["target"]["val_loss"]
    assert result["mixture"] == {"a": 0.5, "b": 0.5}
    assert result["settings"]["n_layer"] == 1
    assert result["settings"]["block_size"] == 16

    # another block size, and resumed: the weights then come from the run's own checkpoint
    run("fastmix.py", *flags, "--block_size", 32, "--out_dir", "tuned", cwd=synthetic)
    before = results(synthetic / "tuned")
    run("fastmix.py", "--resume", "--out_dir", "tuned", cwd=synthetic)
    assert results(synthetic / "tuned")[1] == before[1]
    assert result_json(synthetic / "tuned")["settings"]["block_size"] == 32
    assert before[0][-1]["target_val_loss"] < before[0][0]["target_val_loss"]


def test_init_from_another_tokenizer(synthetic, reference, tmp_path):
    ids = markov(1, 900)
    write_set(tmp_path / "x", {"train": ids, "val": ids, "test": ids}, tokenizer="gpt2")
    write_set(tmp_path / "wide", {"train": ids, "val": ids, "test": ids}, vocab_size=99)
    for name in ("x", "wide"):
        line = refused("fastmix.py", "--init_from", "reference/ckpt.pt", "--data_dir", tmp_path,
                       "--sources", name, "--device", "cpu", "--out_dir", "no", cwd=synthetic)
        assert "reference/ckpt.pt was made with the tokenizer synthetic" in line
    assert not (synthetic / "no").exists()


def test_a_strangers_checkpoint_runs_no_code(synthetic, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "out").mkdir()
    torch.save({"args": Payload()}, tmp_path / "out" / "ckpt.pt")
    for flags in (["--resume", "--out_dir", tmp_path / "out"],
                  ["--init_from", tmp_path / "out" / "ckpt.pt", "--sources", "a"]):
        assert "cannot be read" in refused("fastmix.py", *flags, cwd=synthetic)
    assert not (tmp_path / "owned").exists()


# ---- two runs in one folder ----------------------------------------------------------------------

def test_two_runs_that_start_together(synthetic, reference):
    """Both find an empty folder; one of them trains, the other gets one line."""
    both = []
    for _ in range(2):
        both.append(start("fastmix.py", *BASE, "--out_dir", "together", cwd=synthetic))
    ended = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], ended
    _, err = ended[codes.index(2)]
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "together/" in err
    assert_same(synthetic / "together", reference)


def test_a_second_start_beside_a_running_one(synthetic):
    out = synthetic / "used"
    flags = [*BASE, "--max_steps", 10**6, "--out_dir", "used"]
    process = start("fastmix.py", *flags, cwd=synthetic)
    wait_for_step(process, out, 5)
    line = refused("fastmix.py", *flags, cwd=synthetic)
    assert "used/ holds another run (log.jsonl" in line
    assert process.poll() is None
    wait_for_step(process, out, log_rows(out)[-1]["step"] + 5)
    kill(process)
    assert "used/ holds another run" in refused("fastmix.py", *flags, cwd=synthetic)


# ---- a run that ends before its first checkpoint -------------------------------------------------

def is_free(folder, out):
    """Nothing of a run is in out_dir, and a new one trains there."""
    assert not list((folder / out).glob("*"))
    run("fastmix.py", *BASE, "--max_steps", 1, "--out_dir", out, cwd=folder)


def test_compile_without_a_compiler(synthetic, tmp_path):
    """torch.compile looks for it at the first forward pass: one line."""
    process = python("fastmix.py", *BASE, "--compile", "--out_dir", "compiled", cwd=synthetic,
                     env=os.environ | {"CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    _, err = process.communicate(timeout=150)
    assert process.returncode == 2, err
    line, = err.decode().splitlines()
    assert line.startswith("error: --compile: ")
    assert line.endswith("leave --compile out")
    is_free(synthetic, "compiled")


@pytest.mark.parametrize("what", ["log", "checkpoint"])
def test_a_disk_that_is_full_from_the_start(synthetic, reference, what):
    """For the first row of the log, or for the checkpoint after it."""
    limit = {"log": 100, "checkpoint": 5000}[what]
    assert (reference / "log.jsonl").stat().st_size > 100
    line = refused("fastmix.py", *BASE, "--out_dir", f"full {what}", cwd=synthetic,
                   limit=(resource.RLIMIT_FSIZE, limit))
    assert "File too large" in line or "cannot write" in line
    is_free(synthetic, f"full {what}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_before_the_first_report(synthetic, number):
    """The first evaluation takes a while; meanwhile nothing is in out_dir."""
    out = f"stopped by {number}"
    endless = ["--eval_tokens", 10**6, "--n_layer", 8, "--n_embd", 256]
    process = start("fastmix.py", *BASE, *endless, "--out_dir", out, cwd=synthetic)
    while "parameters" not in process.stdout():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    text, err = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number), (text, err)
    assert err == ""
    is_free(synthetic, out)


# ---- what goes wrong on the way ------------------------------------------------------------------

@pytest.mark.parametrize("script", ["fastmix.py", "prepare_data.py", "plot_mixture.py"])
@pytest.mark.parametrize("package", ["argparse", "numpy"])
def test_ctrl_c_during_the_imports(tmp_path, script, package):
    """
    A package that the program imports sends the signal: nothing is printed. (A shell says 130 of a
    process that a SIGINT ended.)
    """
    (tmp_path / f"{package}.py").write_text("import os, time\nos.kill(os.getpid(), 2)\n"
                                            "time.sleep(60)\n")
    process = python(script, "--help", cwd=tmp_path, stdout=subprocess.PIPE,
                     env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"})
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT



def test_a_run_that_diverges_keeps_its_checkpoint(synthetic):
    """At the first report, or at once: the last good checkpoint is that of the start."""
    hot = ["--learning_rate", 9e18, "--grad_clip", 0]
    for out, log_every in (("hot", 5), ("hotter", 1)):
        line = refused("fastmix.py", *BASE, *hot, "--log_every", log_every, "--out_dir", out,
                       cwd=synthetic)
        assert f"no longer finite at step {log_every};" in line
        ckpt = torch.load(synthetic / out / "ckpt.pt", weights_only=True)
        assert ckpt["state"]["step"] == 0
        assert [row["step"] for row in log_rows(synthetic / out)] == [0]


def test_weights_that_are_no_longer_finite(synthetic, stdout):
    """A run is resumed from weights blown up by hand; the report after them finds it."""
    out = synthetic / "diverged"
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    ckpt["args"]["max_steps"] = 80
    ckpt["model"]["lm_head.weight"][0, 0] = math.nan
    torch.save(ckpt, out / "ckpt.pt")
    before = (out / "ckpt.pt").read_bytes()
    line = refused("fastmix.py", "--resume", "--out_dir", "diverged", cwd=synthetic)
    assert "no longer finite at step 45;" in line, line
    assert (out / "ckpt.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(synthetic, reference):
    """A limit on file size fails the write in the middle, as a full disk does."""
    out = synthetic / "full"
    process = start("fastmix.py", *BASE, "--out_dir", "full", cwd=synthetic)
    wait_for_step(process, out, 25)
    kill(process)
    before = (out / "ckpt.pt").read_bytes()
    line = refused("fastmix.py", "--resume", "--out_dir", "full", cwd=synthetic,
                   limit=(resource.RLIMIT_FSIZE, len(before) // 2))
    assert "cannot write" in line
    assert "--resume" in line
    assert (out / "ckpt.pt").read_bytes() == before
    assert not list(out.glob("*.partial"))
    run("fastmix.py", "--resume", "--out_dir", "full", cwd=synthetic)
    assert_same(out, reference)


def test_a_disk_that_is_full_for_the_log(synthetic, reference):
    """The same for a row of the log, which is not written as a whole or not at all."""
    out = synthetic / "full-log"
    rows = (reference / "log.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(reference, out)
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    ckpt["args"]["max_steps"] = 80
    torch.save(ckpt, out / "ckpt.pt")
    before = (out / "ckpt.pt").read_bytes()
    limit = sum(map(len, rows)) + 40
    line = refused("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic,
                   limit=(resource.RLIMIT_FSIZE, limit))
    assert "File too large" in line
    assert (out / "ckpt.pt").read_bytes() == before
    run("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
    assert [row["step"] for row in log_rows(out)] == list(range(0, 81, 5))


def python(*args, cwd, before=lambda: None, **kw):
    """As start(), but a plain subprocess: for its stdout, and without what child.py imports."""
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever runs the tests may ignore
        before()

    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    return subprocess.Popen(command, cwd=cwd, preexec_fn=prepare, stderr=subprocess.PIPE, **kw)


def end_quietly(process, status):
    """Waits for a process whose stdout nobody reads."""
    try:
        assert process.wait(100) == status, process.stderr.read()
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    err = process.stderr.read()
    assert b"Traceback" not in err, err
    assert b"Broken" not in err, err


@pytest.mark.parametrize("how", ["pipe closed", "no stdout"])
def test_no_one_reads_the_output(synthetic, how):
    """`| head`, and a service without stdout: the run ends with its results."""
    out = synthetic / f"unread, {how}"
    args = ["fastmix.py", *BASE, "--max_steps", 10, "--out_dir", out.name]
    if how == "pipe closed":
        process = python(*args, cwd=synthetic, stdout=subprocess.PIPE)
        process.stdout.close()
    else:
        process = python(*args, cwd=synthetic, before=lambda: os.close(1))
    end_quietly(process, 0)
    assert result_json(out)["steps"] == 10
    assert (out / "ckpt.pt").stat().st_size > 10_000


NOTEBOOK = """
import io, sys
sys.modules["tiktoken"] = None  # to import it then raises ImportError
sys.path.insert(0, {root!r})
import fastmix
assert not sys.modules.get("matplotlib")
screen = sys.stdout
sys.stdout = notebook = io.StringIO()
fastmix.main([*sys.argv[1:], "--out_dir", "notebook"])
sys.modules["matplotlib"] = None
sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
fastmix.main([*sys.argv[1:], "--out_dir", "ascii"])
sys.stdout.flush()
ascii_text = sys.stdout.buffer.getvalue().decode("ascii")
sys.stdout = screen
print(notebook.getvalue() + ascii_text)
"""


def test_in_a_notebook_and_without_what_training_does_not_need(synthetic, reference, tmp_path):
    """
    main() can be called from Python, and twice; stdout may be no file, or lack the bars' glyphs;
    the tokenizer is not needed, nor matplotlib but for the picture.
    """
    path = tmp_path / "script.py"
    path.write_text(NOTEBOOK.format(root=str(ROOT)))
    ended = subprocess.run([sys.executable, path, *map(str, BASE)], cwd=synthetic,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.count("target target: test loss") == 2
    assert "drew notebook/mixture.png" in ended.stdout
    assert (synthetic / "notebook" / "mixture.png").exists()
    assert ended.stdout.splitlines()[-2].startswith("drew no picture: import of matplotlib")
    for out in ("notebook", "ascii"):
        assert_same(synthetic / out, reference)


def test_paths_that_the_terminal_cannot_encode(synthetic, tmp_path):
    """They are printed with ? for the letter."""
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "fastmix.py", *BASE, "--max_steps", 2,
               "--data_dir", synthetic / "data", "--out_dir", "ö"]
    ended = subprocess.run(list(map(str, command)), cwd=tmp_path, env=os.environ | env,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "?" in ended.stdout
    assert (tmp_path / "ö" / "mixture.json").exists()
    assert (tmp_path / "ö" / "mixture.png").exists()


# ---- one command ---------------------------------------------------------------------------------

def test_one_command_prepares_searches_and_draws(tmp_path):
    """`python fastmix.py` in a folder without data, shortened."""
    short = ["--max_steps", 4, "--log_every", 2, "--eval_tokens", 256, "--device", "cpu",
             "--n_layer", 1, "--n_embd", 32, "--block_size", 16]
    stdout = run("fastmix.py", *short, cwd=tmp_path, picture=True)
    lines = stdout.splitlines()
    assert "no sample in data/ yet; preparing it" in lines[0]
    result = result_json(tmp_path / "out")
    names = list(result["mixture"])
    assert set(names) <= {"python", "cpp", "prose", "math", "legal", "noise"}
    assert {"python", "noise"} <= set(names)
    assert result["target"] == ["numpy"]
    assert result["searched"] is True
    for name in [*names, "numpy"]:
        assert (tmp_path / "data" / name / "meta.json").exists()
    assert (tmp_path / "out" / "mixture.png").stat().st_size > 10_000
    assert lines[-1] == "drew out/mixture.png"

    # the second time it is there; and what it found is trained at by the docstring's command
    stdout = run("fastmix.py", *short, "--out_dir", "again", cwd=tmp_path)
    assert "preparing" not in stdout
    assert_same(tmp_path / "again", tmp_path / "out")
    run("fastmix.py", *short, "--mixture", "out/mixture.json", "--out_dir", "out-found",
        cwd=tmp_path)
    assert result_json(tmp_path / "out-found")["mixture"] == pytest.approx(result["mixture"])


@pytest.mark.parametrize("name", ["fastmix.py", "model.py", "prepare_data.py", "plot_mixture.py"])
def test_programs_need_nothing_that_only_posix_has(name):
    missing_on_windows = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "SIGALRM", "SIGHUP",
                          "SIGKILL", "alarm", "setitimer", "fork", "geteuid", "getuid", "mkfifo",
                          "killpg", "sched_getaffinity"}
    used = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {node.module, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    assert used  # so that the test means something
    assert not used & missing_on_windows


def test_resume_writes_where_it_reads(synthetic, tmp_path):
    """A run that was moved is resumed where it lies now; another run in its old folder stays."""
    flags = [*TINY, "--data_dir", synthetic / "data", "--sources", "a,b", "--max_steps", 10]
    run("fastmix.py", *flags, "--seed", 1, "--out_dir", "one", cwd=tmp_path)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    run("fastmix.py", *flags, "--seed", 2, "--out_dir", "one", cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    run("fastmix.py", "--resume", "--out_dir", "moved", cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert result_json(tmp_path / "moved")["seed"] == 1


def test_a_resume_beside_the_living_run_ends_that_run(synthetic, tmp_path):
    """It could not go on without losing rows of one of them."""
    out = tmp_path / "out"
    process = start("fastmix.py", *TINY, "--data_dir", synthetic / "data", "--sources", "a,b",
                    "--max_steps", 3000, cwd=tmp_path)
    wait_for_step(process, out, 10)
    second = start("fastmix.py", "--resume", "--max_steps", 3000, cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2 and "another program resumed the run in out/" in err
    second.kill()
    second.communicate()
    rows = [row["step"] for row in log_rows(out)]
    assert rows == list(range(0, rows[-1] + 1, 5))


def test_a_mixture_of_another_tokenizer_is_refused(tmp_path):
    """Its shares are of other tokens."""
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"mixture": {"a": 0.5, "b": 0.5}, "tokenizer": "gpt2"}))
    available = torch.tensor([1, 1])
    alpha = fastmix.read_mixture(str(file), ["a", "b"], available, "gpt2")
    assert alpha.tolist() == [0.5, 0.5]
    with pytest.raises(SystemExit):
        fastmix.read_mixture(str(file), ["a", "b"], available, "bytes")
