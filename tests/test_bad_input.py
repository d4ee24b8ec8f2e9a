"""Every bad input gets one clear line and exit status 2, and costs nothing that was there."""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import TINY, markov, refused, run, write_set

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
    write_set(folder / "data" / "meta", good)
    (folder / "data" / "meta" / "meta.json").write_text('{"tokenizer": ')
    run("fastmix.py", *FAST, "--sources", "a,b", "--out_dir", "done", cwd=folder)
    (folder / "other.json").write_text(json.dumps({"mixture": {"x": 1.0}}))
    (folder / "nan.json").write_text('{"mixture": {"a": NaN, "b": 1}}')
    (folder / "wrong.json").write_text('[1, 2]')
    (folder / "empty.jsonl").write_text("")
    return folder


AB = ["--sources", "a,b", "--out_dir", "new"]
CASES = {
    "unknown source": (["--sources", "a,nowhere"], "no set 'nowhere'", "there: a, b, b2", "prepare_data.py nowhere=PATH"),
    "differences in bfloat16": ([*AB, "--alignment", "all", "--dtype", "bfloat16"], "use --dtype float32"),
    "too much entropy": (["--sources", "a,b", "--entropy", 60], "--entropy 60 times --learning_rate_mixture 0.02"),
    "unknown target": (["--sources", "a,b", "--target", "nowhere"], "no set 'nowhere'"),
    "sample not prepared": ([], "no set 'numpy'", "with: python prepare_data.py"),
    "no data at all": (["--data_dir", "nothing", "--sources", "a"], "there: none"),
    "name given twice": (["--sources", "a,b,a"], "--sources names a twice"),
    "too short": (["--sources", "a,short"], "short/val.bin: 16 tokens", "needs 17"),
    "empty": (["--sources", "a,empty"], "empty/train.bin: 0 tokens"),
    "two tokenizers": (["--sources", "a,gpt"], "'gpt' was prepared with the tokenizer gpt2"),
    "target's tokenizer": (["--sources", "a,b", "--target", "gpt"], "'gpt' was prepared with the tokenizer gpt2"),
    "odd bytes": (["--sources", "a,odd"], "odd/train.bin: 1999 bytes", "1000 tokens of 2 bytes"),
    "fewer tokens": (["--sources", "a,fewer"], "fewer/train.bin: 1900 bytes"),
    "missing split": (["--sources", "a,lost"], "lost/test.bin: missing"),
    "broken meta.json": (["--sources", "a,meta"], "meta/meta.json cannot be read"),
    "id outside": (["--sources", "outside", "--max_steps", "200"], "token id 64, outside the vocabulary of 64"),
    "mixture of others": ([*AB, "--mixture", "x=1"], "names x, but --sources are a, b"),
    "file of others": ([*AB, "--mixture", "other.json"], "names x, but --sources are a, b"),
    "negative weight": ([*AB, "--mixture", "a=-1,b=2"], "a=-1.0"),
    "NaN weight": ([*AB, "--mixture", "a=nan,b=1"], "a=nan"),
    "NaN in a file": ([*AB, "--mixture", "nan.json"], "a=nan"),
    "infinite weight": ([*AB, "--mixture", "a=inf,b=1"], "a=inf"),
    "all zero": ([*AB, "--mixture", "a=0,b=0"], "all weights are 0"),
    "weight twice": ([*AB, "--mixture", "a=1,a=2"], "given twice"),
    "not a mixture": ([*AB, "--mixture", "best"], "uniform, proportional"),
    "no such file": ([*AB, "--mixture", "gone.json"], "gone.json: No such file"),
    "not fastmix's": ([*AB, "--mixture", "wrong.json"], "not a mixture that fastmix wrote"),
    "start at nothing": ([*AB, "--start_mixture", "a=1"], "gives b no weight"),
    "start of others": ([*AB, "--start_mixture", "x=1"], "--start_mixture x=1 names x"),
    "start and no search": ([*AB, "--mixture", "uniform", "--start_mixture", "a=1,b=1"], "give one of them"),
    "empty log": ([*AB, "--mixture", "empty.jsonl"], "empty.jsonl"),
    "another run there": (["--sources", "a,b", "--out_dir", "done"], "done/ holds another run", "--overwrite"),
    "nothing to resume": ([*AB, "--resume"], "no checkpoint"),
    "other sources": (["--resume", "--out_dir", "done", "--sources", "a,c"], "--sources a,b, not a,c"),
    "other model": (["--resume", "--out_dir", "done", "--n_layer", "2"], "--n_layer 1, not 2"),
    "resume and overwrite": (["--resume", "--overwrite", "--out_dir", "done"], "give one of them"),
    "heads": ([*AB, "--n_head", "3"], "--n_embd 32 must be an even multiple of --n_head 3"),
    "zero steps": ([*AB, "--max_steps", "0"], "0 is not a positive whole number"),
    "share above 1": ([*AB, "--uniform_share", "1.5"], "1.5 is not a number between 0 and 1"),
    "NaN rate": ([*AB, "--learning_rate", "nan"], "nan is not a number"),
    "no such device": ([*AB, "--device", "tpu"], "invalid choice"),
    "diverges": (["--sources", "a,b", "--out_dir", "hot", "--max_steps", "30", "--learning_rate", "1e30",
                  "--grad_clip", "0"], "no longer finite at step 2;"),
    "diverges at a checkpoint": (["--sources", "a,b", "--out_dir", "hotter", "--max_steps", "30", "--eval_every", "1",
                                  "--learning_rate", "1e30", "--grad_clip", "0"], "no longer finite at step 1;"),
}


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
    assert not (broken / "new").exists() and not list(broken.glob("hot*/ckpt.pt"))


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


def test_overwrite_starts_anew(broken):
    run("fastmix.py", *FAST, "--sources", "a,b", "--out_dir", "again", cwd=broken)
    run("fastmix.py", *FAST, "--sources", "a,b", "--seed", 2, "--out_dir", "again", "--overwrite", cwd=broken)
    assert json.loads((broken / "again" / "mixture.json").read_text())["seed"] == 2
