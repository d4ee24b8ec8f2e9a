"""Every bad input gets one clear line and exit status 2, and costs nothing that was there."""
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastmix
from conftest import TINY, example_set, markov, refused, run, write_set

FAST = [*TINY, "--max_steps", 2]


@pytest.fixture(scope="module")
def broken(synthetic, tmp_path_factory):
    """The synthetic sets, and one more for each thing that can be wrong with a set."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(synthetic / "data", folder / "data")
    ids = markov(1, 3000)
    good = {"train": ids[:1000], "val": ids[1000:2000], "test": ids[2000:]}
    write_set(folder / "data" / "short", good | {"val": ids[:16]})  # block_size is 16, so it takes 17
    write_set(folder / "data" / "empty", good | {"train": ids[:0]})
    write_set(folder / "data" / "gpt", good, tokenizer="gpt2")
    write_set(folder / "data" / "outside", good | {"train": np.append(ids[:999] * 0 + 63, 64)[::-1].repeat(2)})
    for name, cut in (("odd", 1), ("fewer", 100)):
        write_set(folder / "data" / name, good)
        path = folder / "data" / name / "train.bin"
        path.write_bytes(path.read_bytes()[:-cut])
    write_set(folder / "data" / "lost", good)
    (folder / "data" / "lost" / "test.bin").unlink()
    for name, wrong in (("unweighed", {"bytes": 0}), ("unknown", {"learned": None}), ("uncounted", {"documents": None})):
        write_set(folder / "data" / name, good)
        meta = json.loads((folder / "data" / name / "meta.json").read_text())
        meta["splits"]["test"] |= wrong
        (folder / "data" / name / "meta.json").write_text(json.dumps(meta))
    example_set(folder / "data" / "endless", 1, 2, n=60)
    path = folder / "data" / "endless" / "train.bin"
    path.write_bytes(bytes(path.stat().st_size))
    write_set(folder / "data" / "meta", good)
    (folder / "data" / "meta" / "meta.json").write_text('{"tokenizer": ')
    run("fastmix.py", *FAST, "--sources", "a,b", "--out_dir", "done", cwd=folder)
    (folder / "other.json").write_text(json.dumps({"mixture": {"x": 1.0}}))
    (folder / "nan.json").write_text('{"mixture": {"a": NaN, "b": 1}}')
    (folder / "wrong.json").write_text('[1, 2]')
    (folder / "empty.jsonl").write_text("")
    rows = (folder / "done" / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "running.jsonl").write_text("".join(rows[:-1]))  # before its last report
    (folder / "joined.jsonl").write_text("".join(rows[:-1] + rows))
    (folder / "nan.jsonl").write_text(rows[0].replace('"step": 0', '"step": NaN') + rows[1])
    (folder / "halved.jsonl").write_text("".join(rows)[:-9])  # in the middle of it
    (folder / "stepless.jsonl").write_text('{"alpha": {"a": 1.0, "b": 1.0}}\n')
    (folder / "wordy.jsonl").write_text('{"alpha": {"a": 1.0}, "step": "many"}\n')
    (folder / "rows.jsonl").write_text('[1, 2]\n')
    for name, mixture in (("null", None), ("list", [0.5, 0.5]), ("text", "uniform"), ("words", {"a": "much", "b": 1}),
                          ("true", {"a": None})):
        (folder / f"{name}.json").write_text(json.dumps({"mixture": mixture}))
    return folder


AB = ["--sources", "a,b", "--out_dir", "new"]
CASES = {
    "unknown source": (["--sources", "a,nowhere"], "no set 'nowhere'", "there: a, b, b2",
                       "prepare_data.py nowhere=PATH"),
    "unknown target": (["--sources", "a,b", "--target", "nowhere"], "no set 'nowhere'"),
    "sample not prepared": ([], "no set 'numpy'", "with: python prepare_data.py"),
    "no data at all": (["--data_dir", "nothing", "--sources", "a"], "there: none"),
    "name given twice": (["--sources", "a,b,a"], "--sources names a twice"),
    "too short": (["--sources", "a,short"], "short/val.bin: 16 tokens", "needs 17"),
    "empty": (["--sources", "a,empty"], "empty/train.bin: 0 tokens"),
    "two tokenizers": (["--sources", "a,gpt"], "'gpt' was made with the tokenizer gpt2"),
    "target's tokenizer": (["--sources", "a,b", "--target", "gpt"], "'gpt' was made with the tokenizer gpt2"),
    "odd bytes": (["--sources", "a,odd"], "odd/train.bin: 1999 bytes", "1000 tokens of 2 bytes"),
    "fewer tokens": (["--sources", "a,fewer"], "fewer/train.bin: 1900 bytes"),
    "missing split": (["--sources", "a,lost"], "lost/test.bin: missing"),
    "broken meta.json": (["--sources", "a,meta"], "meta/meta.json is not what prepare_data.py writes"),
    "no bytes counted": (["--sources", "a,unweighed"], "unweighed/meta.json is not what prepare_data.py writes (ZeroDivisionError"),
    "documents not counted": (["--sources", "a,uncounted"], "uncounted/meta.json is not what prepare_data.py writes"),
    "learned unknown": (["--sources", "a,unknown"], "unknown/meta.json is not what prepare_data.py writes (TypeError"),
    "examples without end": (["--sources", "endless"], "endless/train.bin does not end in <|endoftext|>"),
    "id outside": (["--sources", "outside", "--max_steps", "200", "--out_dir", "found-late"],
                   "token id 64, outside the vocabulary of 64"),
    "mixture of others": ([*AB, "--mixture", "x=1"], "names x, but --sources are a, b"),
    "file of others": ([*AB, "--mixture", "other.json"], "names x, but --sources are a, b"),
    "negative weight": ([*AB, "--mixture", "a=-1,b=2"], "a=-1.0"),
    "NaN weight": ([*AB, "--mixture", "a=nan,b=1"], "a=nan"),
    "NaN in a file": ([*AB, "--mixture", "nan.json"], "a=nan"),
    "infinite weight": ([*AB, "--mixture", "a=inf,b=1"], "a=inf"),
    "all zero": ([*AB, "--mixture", "a=0,b=0"], "all weights are 0"),
    "a sum without end": ([*AB, "--mixture", "a=1e308,b=1e308"], "all weights are 0, or too large"),
    "two logs in one": ([*AB, "--mixture", "joined.jsonl"], "its steps do not rise"),
    "a step that is none": ([*AB, "--mixture", "nan.jsonl"], "its steps do not rise"),
    "weight twice": ([*AB, "--mixture", "a=1,a=2"], "given twice"),
    "not a mixture": ([*AB, "--mixture", "best"], "uniform, proportional"),
    "no such file": ([*AB, "--mixture", "gone.json"], "gone.json: No such file"),
    "not fastmix's": ([*AB, "--mixture", "wrong.json"], "not a mixture that fastmix wrote"),
    "mixture of nothing": ([*AB, "--mixture", "null.json"], "--mixture null.json", "None"),
    "mixture a list": ([*AB, "--mixture", "list.json"], "--mixture list.json", "[0.5, 0.5]"),
    "mixture a text": ([*AB, "--mixture", "text.json"], "--mixture text.json", "'uniform'"),
    "weight a text": ([*AB, "--mixture", "words.json"], "--mixture words.json: a=much; weights must be numbers"),
    "weight of nothing": ([*AB, "--mixture", "true.json"], "--mixture true.json: a=None; weights must be numbers"),
    "empty log": ([*AB, "--mixture", "empty.jsonl"], "empty.jsonl"),
    "unfinished log": ([*AB, "--mixture", "running.jsonl"],
                       "running.jsonl: its run is at step 0 of 2; finish it first"),
    "log being written": ([*AB, "--mixture", "halved.jsonl"], "halved.jsonl: its run is at step 0 of 2"),
    "log without steps": ([*AB, "--mixture", "stepless.jsonl"], "stepless.jsonl: not a mixture that fastmix wrote"),
    "log with words": ([*AB, "--mixture", "wordy.jsonl"], "wordy.jsonl: not a mixture that fastmix wrote"),
    "no log": ([*AB, "--mixture", "rows.jsonl"], "rows.jsonl: not a mixture that fastmix wrote"),
    "another run there": (["--sources", "a,b", "--out_dir", "done"], "done/ holds another run",
                          "delete it with: rm done/log.jsonl done/ckpt.pt done/mixture.json"),
    "no folder": (["--sources", "a,b", "--out_dir", ""], "--out_dir '' is not the name of a folder"),
    "a file": (["--sources", "a,b", "--out_dir", "wrong.json"], "--out_dir 'wrong.json' is not the name of a folder"),
    "nothing to resume": ([*AB, "--resume"], "no checkpoint there; leave --resume out, or correct --out_dir"),
    "data to resume": (["--resume", "--out_dir", "data"], "no checkpoint there; leave --resume out"),
    "other sources": (["--resume", "--out_dir", "done", "--sources", "a,c"], "--sources a,b, not a,c"),
    "other model": (["--resume", "--out_dir", "done", "--n_layer", "2"], "--n_layer 1, not 2"),
    "heads": ([*AB, "--n_head", "3"], "--n_embd 32 must be an even multiple of --n_head 3"),
    "one sequence a step": ([*AB, "--batch_size", "1"], "--batch_size times --grad_accum must be at least 2"),
    "no source": (["--sources", ""], "--sources", "empty name"),
    "a source without a name": (["--sources", "a,,b"], "--sources", "empty name"),
    "a source of blanks": (["--sources", "a, "], "--sources", "empty name"),
    "no target": ([*AB, "--target", ""], "--target", "empty name"),
    "a target without a name": ([*AB, "--target", ",a"], "--target", "empty name"),
    "no number": ([*AB, "--max_steps", "many"], "argument --max_steps: invalid int value: 'many'"),
    "no whole number": ([*AB, "--max_steps", "2.5"], "argument --max_steps: invalid int value: '2.5'"),
    "no such device": ([*AB, "--device", "tpu"], "invalid choice"),
    "diverges": (["--sources", "a,b", "--out_dir", "hot", "--max_steps", "30", "--learning_rate", "1e30",
                  "--grad_clip", "0"], "no longer finite at step 5;"),
    "diverges at once": (["--sources", "a,b", "--out_dir", "hotter", "--max_steps", "30", "--log_every", "1",
                          "--learning_rate", "1e30", "--grad_clip", "0"], "no longer finite at step 1;"),
}
# what parse_args() takes for each of the numbers; None: no limit on that side but those of its type
RANGES = {
    "uniform_share": (0, 1), "outer_every": (1, None), "learning_rate_mixture": (0, None), "max_epochs": (0, None),
    "target_batch_size": (1, None), "n_layer": (1, None), "n_head": (1, None), "n_embd": (1, None),
    "block_size": (1, None), "batch_size": (1, None), "grad_accum": (1, None), "max_steps": (1, None),
    "learning_rate": (0, None), "warmup_steps": (0, None), "weight_decay": (0, None), "grad_clip": (0, None),
    "seed": (0, None), "log_every": (1, None), "eval_tokens": (1, None)}
FLOATS = {"uniform_share", "learning_rate_mixture", "max_epochs", "learning_rate", "weight_decay", "grad_clip"}


def test_one_clear_line(broken):
    def once(case):
        extra, *parts = CASES[case]
        return case, refused("fastmix.py", *FAST, *extra, cwd=broken), parts
    before = {p: p.read_bytes() for p in (broken / "done").iterdir()}
    with ThreadPoolExecutor(2) as pool:  # each is mostly the import of torch
        for case, line, parts in pool.map(once, CASES):
            for part in parts:
                assert part in line, f"{case}: {line}"
    assert {p: p.read_bytes() for p in (broken / "done").iterdir()} == before
    assert not (broken / "new").exists() and not (broken / "out").exists()
    for out in ("hot", "hotter"):  # the last good checkpoint is that of the start
        assert torch.load(broken / out / "ckpt.pt", weights_only=True)["state"]["step"] == 0


def test_a_set_of_the_sample_needs_no_path(broken):
    for name in ("python", "describe", "numpy_tasks"):
        line = refused("fastmix.py", *FAST, "--sources", f"a,{name}", "--out_dir", "new", cwd=broken)
        assert line.endswith("with: python prepare_data.py"), line


def test_data_changed_under_a_checkpoint(broken):
    meta = broken / "data" / "a" / "meta.json"
    text = meta.read_text()
    changed = json.loads(text)
    changed["splits"]["train"]["sha256"] = "other"
    meta.write_text(json.dumps(changed))
    try:
        assert "is not what done/ckpt.pt was trained on" in refused("fastmix.py", "--resume", "--out_dir", "done",
                                                                    cwd=broken)
    finally:
        meta.write_text(text)


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["fastmix.py", *map(str, flags)])
    return fastmix.parse_args({})


def test_every_number_has_a_range(monkeypatch, capsys):
    """Of all flags that take a number, just those within the range are accepted; else one line and status 2."""
    defaults = vars(arguments(monkeypatch))
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert numbers == RANGES.keys() and FLOATS == {name for name in numbers if type(defaults[name]) is float}
    for name, (low, high) in RANGES.items():
        small = 1e-6 if name in FLOATS else 1
        good = [low, low + small, high if high is not None else 10**6]
        bad = [low - small, -5, -(10**9)] + ([] if high is None else [high + small, 10])
        bad += ["nan", "inf", "-inf"] if name in FLOATS else [2**63, 10**30]
        for value in good:
            more = ["--grad_accum", 2] if name == "batch_size" else []  # a search takes two sequences
            found = getattr(arguments(monkeypatch, f"--{name}", value, *more), name)
            assert found == value and type(found) is (float if name in FLOATS else int)
        for value in bad:
            with pytest.raises(SystemExit) as ended:
                arguments(monkeypatch, f"--{name}={value}")
            line = capsys.readouterr().err
            assert ended.value.code == 2 and len(line.splitlines()) == 1, (name, value, line)
            assert line.startswith(f"error: --{name} ") and "is not a number between" in line, line


def test_number_out_of_range_on_the_command_line(broken):
    cases = [("warmup_steps", "-5"), ("learning_rate", "inf"), ("learning_rate", "nan"), ("weight_decay", "-0.1"),
             ("grad_clip", "-0.5"), ("train_tokens", "nan"), ("train_tokens", "0.5"), ("seed", "-1"), ("eval_tokens", "0"), ("uniform_share", "1.5"),
             ("max_steps", "0")]
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda case: refused("fastmix.py", *FAST, *AB, f"--{case[0]}", case[1], cwd=broken), cases)
        for (name, value), line in zip(cases, lines):
            assert line.startswith(f"error: --{name} {value} is not a number between "), line
    assert not (broken / "new").exists()


def test_one_sequence_a_step_is_enough_for_a_fixed_mixture(broken):
    """A search is refused: it has nothing to compare. Two micro-batches of one will do."""
    run("fastmix.py", *FAST, "--sources", "a,b", "--batch_size", 1, "--target_batch_size", 1, "--mixture", "uniform",
        "--out_dir", "single", cwd=broken)
    run("fastmix.py", *FAST, "--sources", "a,b", "--batch_size", 1, "--target_batch_size", 1, "--grad_accum", 2,
        "--out_dir", "pair", cwd=broken)
    run("fastmix.py", "--resume", "--batch_size", 1, "--out_dir", "single", cwd=broken)  # repeating a flag does no harm


def test_another_run_is_deleted_as_the_message_says(broken):
    flags = [*FAST, "--sources", "a,b", "--out_dir", "again"]
    run("fastmix.py", *flags, cwd=broken)
    line = refused("fastmix.py", *flags, "--seed", 2, cwd=broken)
    subprocess.run(line.split(": ")[-1], shell=True, check=True, cwd=broken)
    run("fastmix.py", *flags, "--seed", 2, cwd=broken)
    assert json.loads((broken / "again" / "mixture.json").read_text())["seed"] == 2
