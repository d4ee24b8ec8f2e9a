"""Runs through the command line: resume, kill, schedules, and what a run writes."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, assert_same, log_rows, refused, results, run, start, wait_for_step
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
    "bounded": [*BASE, "--bounds", "b=:0.4,noise=0.3:"],
    "diverged": [*BASE, "--max_steps", 40],
    "at-uniform": [*BASE, "--max_steps", 2, "--mixture", "uniform", "--dtype", "bfloat16"],
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
    assert rows[0]["alpha"] == dict.fromkeys(["a", "b", "noise"], rows[0]["alpha"]["a"])
    assert rows[0]["train_loss"] is None
    assert rows[-1]["tokens"] == tokens
    for r in rows:
        assert r["max_steps"] == 60 and r["target_losses"] == {"target": r["target_val_loss"]}
    assert rows[-1]["target_val_loss"] < rows[0]["target_val_loss"] - 0.3
    assert mixture["before"] == rows[0]["target_losses"]
    assert mixture["targets"]["target"]["val_loss"] == rows[-1]["target_val_loss"]
    assert all(s["start"] == pytest.approx(1 / 3) for s in mixture["sources"].values())
    assert all(v is not None for r in rows[1:] for v in (*r["alignment"].values(), *r["source_loss"].values()))
    # one byte a token in these sets, so bits a byte is the loss in bits
    assert math.isclose(mixture["test_bits_per_byte"], mixture["test_loss"] / math.log(2))


def test_mixture_json_follows_from_the_log(synthetic, stdout):
    """The three named mixtures, recomputed from a log that holds every step."""
    mixtures = json.loads((synthetic / "every" / "mixture.json").read_text())["mixtures"]
    alphas = np.array([list(r["alpha"].values()) for r in log_rows(synthetic / "every")])  # (61, K), 60: after training
    for name, expected in (("last", alphas[60]), ("last_half_average", alphas[30:60].mean(0)),
                           ("run_average", alphas[:60].mean(0))):
        np.testing.assert_allclose(list(mixtures[name].values()), expected, rtol=1e-6)


def test_looking_more_often_changes_nothing(synthetic, reference):
    assert_same(synthetic / "looking", reference, with_log=False)


def test_killed_and_resumed_is_bit_for_bit_the_same(synthetic, reference):
    """SIGKILL somewhere after step 30, and a log that is ahead of the checkpoint: a row, and a line cut short."""
    out = synthetic / "killed"
    process = start("fastmix.py", *BASE, "--out_dir", "killed", cwd=synthetic)
    wait_for_step(process, out, 30)
    process.kill()
    process.communicate()
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(log_rows(reference)[-1]) + '\n{"step": 3')
    assert torch.load(out / "ckpt.pt", weights_only=True)["state"]["step"] < 60
    run("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic)
    assert_same(out, reference)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted_says_how_to_go_on(synthetic, reference, name):
    """The same run to the last bit, but for a row more at the stop, and averages of the next that begin there."""
    out = synthetic / f"interrupted-{name}"
    process = start("fastmix.py", *BASE, "--out_dir", out.name, cwd=synthetic)
    wait_for_step(process, out, 5)
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not stderr, (stdout, stderr)
    stopped = log_rows(out)[-1]["step"]
    assert stdout.splitlines()[-1] == (f"stopped at step {stopped}; go on with: python fastmix.py --resume --out_dir "
                                       f"{out.name}")
    assert torch.load(out / "ckpt.pt", weights_only=True)["state"]["step"] == stopped < 60
    run("fastmix.py", *BASE, "--resume", "--out_dir", out.name, cwd=synthetic)
    assert_same(out, reference, with_log=False)
    rows, expected = results(out)[0], results(reference)[0]
    if stopped % 5:
        (extra,) = [r for r in rows if r["step"] == stopped]
        rows.remove(extra)
        for key in ("alignment", "source_loss", "train_loss"):
            rows[stopped // 5 + 1].pop(key)
            expected[stopped // 5 + 1].pop(key)
    assert rows == expected


def script(folder, *lines):
    """A Python script that can import what lies beside fastmix.py."""
    path = folder / "script.py"
    path.write_text("\n".join(["import os, runpy, signal, sys, time", f"sys.path[0] = {str(ROOT)!r}", *lines]))
    return path


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGHUP"), ("SIGHUP", "SIGINT")])
def test_a_second_signal_ends_at_once(tmp_path, first, second):
    """In a step that takes for ever."""
    path = script(tmp_path, "from model import asked_to_stop", "stop = asked_to_stop()", "print('ready', flush=True)",
                  "while not stop: time.sleep(0.01)", "print('asked', stop, flush=True)", "time.sleep(60)")
    process = start(path, cwd=tmp_path)
    for word, name in (("ready", first), ("asked", second)):
        while word not in process.stdout():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == -getattr(signal, second)
    assert f"asked [{int(getattr(signal, first))}]" in stdout


def test_a_hangup_that_is_ignored_stays_ignored(synthetic, reference, tmp_path):
    """As nohup has it."""
    path = script(tmp_path, "signal.signal(signal.SIGHUP, signal.SIG_IGN)", "sys.argv[0] = sys.path[0] + '/fastmix.py'",
                  "runpy.run_path(sys.argv[0], run_name='__main__')")
    process = start(path, *BASE, "--out_dir", "nohup", cwd=synthetic)
    wait_for_step(process, synthetic / "nohup", 5)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert_same(synthetic / "nohup", reference)


def test_in_a_notebook_and_without_what_training_does_not_need(synthetic, reference, tmp_path):
    """
    stdout may be no text stream, or one without the bars' glyphs. Neither to import nor to run it takes the tokenizer
    or the plots. As a process of its own: those of the other tests begin with everything imported.
    """
    path = script(
        tmp_path, "import io", "import fastmix", "screen, flags = sys.stdout, sys.argv[1:]",
        "def loaded(): return sorted({'tiktoken', 'matplotlib'} & sys.modules.keys())",
        "print(loaded())", "sys.argv[1:] = [*flags, '--out_dir', 'notebook']", "sys.stdout = notebook = io.StringIO()",
        "fastmix.main()", "sys.argv[1:] = [*flags, '--out_dir', 'ascii']",
        "sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding='ascii')", "fastmix.main()", "sys.stdout.flush()",
        "sys.stdout, ascii = screen, sys.stdout.buffer.getvalue().decode('ascii')", "print(loaded())",
        "print([text.count('test loss') for text in (notebook.getvalue(), ascii)])")
    ended = subprocess.run([sys.executable, path, *map(str, BASE)], cwd=synthetic, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[]\n[]\n[1, 1]\n"
    assert_same(synthetic / "notebook", reference)
    assert_same(synthetic / "ascii", reference)


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


def test_a_search_moves_a_little_each_step(synthetic, stdout):
    rows = log_rows(synthetic / "every")
    for before, row in zip(rows, rows[1:]):  # a logit moves by about the learning rate a step
        for name, share in row["alpha"].items():
            assert 0.9 < share / before["alpha"][name] < 1.1 and share != before["alpha"][name]


def test_steps_far_too_long_lose_no_source(synthetic, stdout):
    """The search collapses at once, but goes on with finite numbers, and alpha stays above its floor of 1e-8."""
    alphas = np.array([list(r["alpha"].values()) for r in log_rows(synthetic / "far")])
    assert alphas.max() > 0.999 and 5e-9 < alphas.min() < 2e-8
    np.testing.assert_allclose(alphas.sum(1), 1, rtol=1e-6)


def test_own_sources_without_a_target(synthetic, stdout):
    assert "sources a,b; target a,b; searching" in stdout["own"]
    assert json.loads((synthetic / "own" / "mixture.json").read_text())["target"] == ["a", "b"]


def test_bfloat16(synthetic, stdout):
    rounded, exact = (log_rows(synthetic / out) for out in ("rounded", "reference"))
    assert rounded[0]["target_val_loss"] != exact[0]["target_val_loss"]
    for a, b in zip(rounded, exact):
        assert a["target_val_loss"] == pytest.approx(b["target_val_loss"], rel=1e-2)
        assert a["alpha"] == pytest.approx(b["alpha"], abs=0.02)


def test_bounds_hold_from_the_first_step_on(synthetic, stdout):
    """Without them b has most of the mixture and noise nothing; with them both lie at a bound."""
    assert log_rows(synthetic / "reference")[-1]["alpha"]["b"] > 0.5
    rows, corner = log_rows(synthetic / "bounded"), pytest.approx({"a": 0.3, "b": 0.4, "noise": 0.3}, abs=1e-6)
    for row in rows:
        assert row["alpha"]["b"] < 0.4 + 1e-9 and row["alpha"]["noise"] > 0.3 - 1e-9, row
        assert row["upper"] == {"a": 1.0, "b": 0.4, "noise": 1.0} and row["lower"] == {"a": 0.0, "b": 0.0, "noise": 0.3}
    assert sum(row["alpha"] == corner for row in rows) > len(rows) / 2  # exactly; a noisy step may lift noise again
    assert row["alpha"] == pytest.approx({"a": 0.3, "b": 0.4, "noise": 0.3}, abs=0.01)
    result = json.loads((synthetic / "bounded" / "mixture.json").read_text())
    assert result["mixture"]["b"] == pytest.approx(0.4, abs=0.02) and result["sources"]["b"]["upper"] == 0.4
    assert [s["bound"] for s in result["sources"].values()] == ["", "cap", "floor"]


def test_a_strangers_checkpoint_runs_no_code(synthetic, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    (tmp_path / "out").mkdir()
    torch.save({"args": Payload()}, tmp_path / "out" / "ckpt.pt")
    line = refused("fastmix.py", "--resume", "--out_dir", tmp_path / "out", cwd=synthetic)
    assert "cannot be read" in line and not (tmp_path / "owned").exists()


def test_diverged_run_stops_and_keeps_its_checkpoint(synthetic, stdout):
    """A run goes on from weights blown up by hand; the report after them finds it."""
    out = synthetic / "diverged"
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    ckpt["args"]["max_steps"] = 80
    ckpt["model"]["lm_head.weight"][0, 0] = math.nan
    torch.save(ckpt, out / "ckpt.pt")
    before = (out / "ckpt.pt").read_bytes()
    line = refused("fastmix.py", "--resume", "--out_dir", "diverged", cwd=synthetic)
    assert "no longer finite at step 45;" in line, line
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


# ---- checkpoints that are damaged, or another program's

def foreign_optimizer(kind, config):
    """The state of an optimizer that has taken a step: SGD's, or AdamW's on a model of another width."""
    model = GPT(GPTConfig(**config | ({"n_embd": 16} if kind == "another model" else {})))
    optimizer = model.configure_optimizer(1e-3, 0.1, (0.9, 0.95), fused=False)
    if kind == "sgd":
        optimizer = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], 1e-3, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def damaged(whole):
    """{what was done: a checkpoint} from a whole one; the first word says which part of it was changed."""
    def changed(part, key, value):
        ckpt = copy.deepcopy(whole)
        if value is None:
            del ckpt[part][key]
        else:
            ckpt[part][key] = value
        return ckpt
    cases = {f"lacks {key}": {k: v for k, v in whole.items() if k != key} for key in whole}
    for key, value in whole["state"].items():
        cases[f"state without {key}"] = changed("state", key, None)
        wide = torch.cat([value, value], -1) if torch.is_tensor(value) else "text"
        cases[f"state, {key} too wide or a text"] = changed("state", key, wide)
    cases["state, z of another dtype"] = changed("state", "z", whole["state"]["z"].half())
    cases["state, schedule too deep"] = changed("state", "schedule", whole["state"]["schedule"][None])
    cases["state, too few rows of G"] = changed("state", "G", whole["state"]["G"][1:])
    cases["state with more"] = changed("state", "momentum", 0.9)
    for part in ("model", "state", "optimizer"):
        cases[f"{part} nothing"] = whole | {part: {}}
        cases[f"{part} a list"] = whole | {part: [1, 2]}
    cases["model without the head"] = changed("model", "lm_head.weight", None)
    cases["model with more"] = changed("model", "bias", torch.ones(1))
    cases["model too wide"] = changed("model", "ln_f.weight", torch.ones(33))
    for kind in ("sgd", "another model"):
        cases[f"optimizer of {kind}"] = whole | {"optimizer": foreign_optimizer(kind, whole["config"])}
    for key in ("exp_avg_sq", "step"):
        cases[f"optimizer without {key}"] = copy.deepcopy(whole)
        del cases[f"optimizer without {key}"]["optimizer"]["state"][0][key]
    cases["optimizer that never stepped"] = changed("optimizer", "state", {})
    cases["args nothing"], cases["args a list"] = whole | {"args": {}}, whole | {"args": [1]}
    cases["args without seed"] = changed("args", "seed", None)
    cases["args with more"] = changed("args", "alignment", "head")
    cases["args out of range"] = changed("args", "batch_size", -8)
    cases["config nothing"], cases["config a list"] = whole | {"config": {}}, whole | {"config": [1]}
    for key in whole["config"]:
        cases[f"config without {key}"] = changed("config", key, None)
    cases["tokenizer another"], cases["digests nothing"] = whole | {"tokenizer": "gpt2"}, whole | {"digests": {}}
    nanogpt = {"model": whole["model"], "optimizer": whole["optimizer"], "model_args": {}, "iter_num": 5, "config": {}}
    return cases | {"nanoGPT's": nanogpt, "a tensor": torch.ones(3), "nothing": None}


def test_a_damaged_or_foreign_checkpoint_gets_one_line(synthetic, stdout):
    """On --resume, and on --init_from if what it reads is damaged: to go on from weights alone is what that is for."""
    whole = torch.load(synthetic / "whole" / "ckpt.pt", weights_only=True)
    whole["args"]["max_steps"] = 25
    folder, log = synthetic / "damaged", (synthetic / "whole" / "log.jsonl").read_bytes()
    files = {}
    for name, ckpt in damaged(whole).items():
        torch.save(ckpt, folder.with_suffix(".pt"))
        files[name] = folder.with_suffix(".pt").read_bytes()
    content = (synthetic / "whole" / "ckpt.pt").read_bytes()
    files |= {"cut in half": content[: len(content) // 2], "cut at its end": content[:-1], "empty": b"",
              "garbage": bytes(range(256)) * 99, "a text": b"not a checkpoint\n"}
    model = BASE[BASE.index("--block_size"):]  # all flags but those of the model

    def once(case):
        number, (name, content) = case
        before, wrong = {"ckpt.pt": content, "log.jsonl": log}, []
        out = folder / str(number)
        out.mkdir(parents=True)
        for file, text in before.items():
            (out / file).write_bytes(text)
        part, detail = name.split()[0].strip(","), name.split()[-1]
        flags = {"--resume": ["--resume", "--out_dir", out],
                 "--init_from": [*model, "--init_from", out / "ckpt.pt", "--out_dir", out / "new"]}
        if part in ("state", "optimizer", "args", "digests"):
            del flags["--init_from"]
        if part == "config" and detail in ("block_size", "n_layer", "n_head", "n_embd"):
            del flags["--resume"]  # goes by the flags, which say the same
        for flag, given in flags.items():
            try:
                line = refused("fastmix.py", *given, cwd=synthetic)
                if "ckpt.pt" not in line and "--batch_size -8" not in line or (out / "new").exists():
                    wrong.append(f"{flag}, {name}: {line}")
            except AssertionError as error:
                status, *lines = str(error).splitlines()
                wrong.append(f"{flag}, {name}: {status}, {[line for line in lines if 'Error: ' in line]}")
        if {f.name: f.read_bytes() for f in out.iterdir()} != before:
            wrong.append(f"{name}: files were changed")
        return wrong
    with ThreadPoolExecutor(2) as pool:
        wrong = sum(pool.map(once, enumerate(files.items())), [])
    assert not wrong, "\n".join(wrong)


def test_a_whole_checkpoint_passes(synthetic, stdout):
    """The one that is damaged above."""
    out = synthetic / "longer"
    shutil.copytree(synthetic / "whole", out)
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    ckpt["args"]["max_steps"] = 25
    torch.save(ckpt, out / "ckpt.pt")
    run("fastmix.py", "--resume", "--out_dir", "longer", cwd=synthetic)
    assert [r["step"] for r in log_rows(out)] == list(range(0, 26, 5))


def test_a_log_that_is_not_the_runs_gets_one_line(synthetic, stdout):
    """On --resume, before anything is trained; the files stay as they are."""
    log = (synthetic / "whole" / "log.jsonl").read_text()
    rows = log.splitlines(keepends=True)
    logs = {"missing": None, "empty": "", "garbage": "garbage\n" + log, "a blank line": rows[0] + "\n" + log,
            "objects": "{}\n" * 5, "lists": "[]\n" * 5, "too short": "".join(rows[:2]),
            "without its start": "".join(rows[1:]),
            "another's": log.replace('"noise"', '"c"'), "no text": "\udcff" + log}

    def once(item):
        name, text = item
        out = synthetic / f"log {name}"
        out.mkdir()
        shutil.copy(synthetic / "whole" / "ckpt.pt", out)
        if text is not None:
            (out / "log.jsonl").write_text(text, errors="surrogateescape")
        before = {f.name: f.read_bytes() for f in out.iterdir()}
        line = refused("fastmix.py", "--resume", "--out_dir", out.name, cwd=synthetic)
        assert {f.name: f.read_bytes() for f in out.iterdir()} == before
        return name, line
    with ThreadPoolExecutor(2) as pool:
        for name, line in pool.map(once, logs.items()):
            wanted = "No such file" if name == "missing" else "is not the log of the run in ckpt.pt"
            assert f"log {name}/log.jsonl" in line and wanted in line and "another --out_dir" in line, line


def test_paths_that_the_terminal_cannot_encode(synthetic, tmp_path):
    """All three programs print a path with ? for the letter and go on."""
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "fastmix.py", *BASE[:-1], 2, "--data_dir", synthetic / "data", "--out_dir", "ö"]
    (tmp_path / "a.txt").write_text("".join(f"some words in line {i}\n" for i in range(2000)))
    for argv in (command, [sys.executable, ROOT / "plot_mixture.py", "ö"],
                 [sys.executable, ROOT / "prepare_data.py", "x=a.txt", "--data_dir", "dö"]):
        done = subprocess.run(list(map(str, argv)), cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr and "?" in done.stdout, (done.stdout, done.stderr)
    assert (tmp_path / "ö" / "mixture.png").exists() and (tmp_path / "dö" / "x" / "meta.json").exists()
