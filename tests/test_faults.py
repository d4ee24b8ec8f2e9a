"""Nothing silently wrong, nothing lost: shared text, two programs at once, a reader that leaves, files out of reach."""
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastmix
import prepare_data
from conftest import ROOT, TINY, chain_set, markov, refused, run, start, wait_for_step, write_set
from model import overlap

RUN = [*TINY, "--sources", "a,b", "--target", "target"]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: t}) + "\n" for t in texts))


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [f"document {i}: " + " ".join(map(str, rng.integers(0, 10**6, rng.integers(50, 300)))) for i in range(n)]


def split_documents(folder):
    """{split: set of the documents or pages in it}"""
    ids = {s: np.fromfile(folder / f"{s}.bin", np.uint16) for s in prepare_data.SPLITS}
    return {s: {bytes(p[p < 256].astype(np.uint8)) for p in np.split(v, np.flatnonzero(v == 256))} - {b""}
            for s, v in ids.items()}


@pytest.fixture
def three(tmp_path):
    for i, name in enumerate(("a", "b", "target")):
        chain_set(tmp_path / "data" / name, i)
    return tmp_path


# ---- text that sets share -------------------------------------------------------------------------------------------

def warnings_of(stdout):
    """{(target, its split, source): share in %}"""
    found = re.findall(r"warning: about (\d+)% of the (\w+) split of target (\w+) is in the train split of source (\w+)",
                       stdout)
    return {(target, split, source): int(share) for share, split, target, source in found}


def test_a_text_goes_to_one_split_whatever_set_it_is_in(tmp_path):
    """Sets of 80, 400 and 3,000 of the same documents, and a long one alone and among others."""
    documents = texts(3000)
    book = "\n".join(texts(300, seed=1))
    for name, part in (("small", documents[:80]), ("middle", documents[:400]), ("large", documents),
                       ("books", [book, *documents[:400]])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "book.txt").write_text(book)
    names = ("small", "middle", "large", "books")
    run("prepare_data.py", *(f"{n}={n}.jsonl" for n in names), "book=book.txt", cwd=tmp_path)
    found = {n: split_documents(tmp_path / "data" / n) for n in (*names, "book")}
    for one in found:
        for other in found:
            for split in ("val", "test"):
                assert not found[one][split] & found[other]["train"], (one, other, split)
    assert all(len(v) > 0 for f in found.values() for v in f.values())
    assert len(found["book"]["train"]) > 5


def test_shared_text_is_said_with_its_share(tmp_path):
    """The same documents in sets of other fractions, and another seed: the warning's share is the true one."""
    documents = texts(2500)
    write_jsonl(tmp_path / "all.jsonl", documents)
    write_jsonl(tmp_path / "half.jsonl", documents[:1200] + texts(1200, seed=5))
    run("prepare_data.py", "all=all.jsonl", cwd=tmp_path)
    run("prepare_data.py", "wide=all.jsonl", "half=half.jsonl", "--val_fraction", "0.4", "--test_fraction", "0.4",
        cwd=tmp_path)
    run("prepare_data.py", "other=half.jsonl", "--seed", "2", cwd=tmp_path)
    stdout = run("fastmix.py", *TINY, "--max_steps", 1, "--sources", "all", "--target", "wide,half,other", cwd=tmp_path)
    found, said = {n: split_documents(tmp_path / "data" / n) for n in ("all", "wide", "half", "other")}, warnings_of(stdout)
    for target in ("wide", "half", "other"):
        for split in ("val", "test"):
            true = 100 * len(found[target][split] & found["all"]["train"]) / len(found[target][split])
            assert true > 30 and abs(said[target, split, "all"] - true) < 6, (target, split, true, said)
    stdout = run("fastmix.py", *TINY, "--max_steps", 1, "--sources", "all", "--out_dir", "own", cwd=tmp_path)
    assert not warnings_of(stdout)


@pytest.mark.parametrize("n_some, n_others, shared", [(500, 400, 100), (500, 50_000, 250), (30_000, 40_000, 9_000),
                                                      (3_000, 3_000, 0), (3_000, 90_000, 3_000)])
def test_overlap_estimates_the_share_from_sketches(n_some, n_others, shared):
    """Against the sets themselves, within four standard errors of the documents compared."""
    rng = np.random.default_rng(n_some + n_others)
    hashes = [f"{h:012x}" for h in rng.choice(2**47, n_some + n_others - shared, replace=False) * 2]
    some, others = set(hashes[:n_some]), set(hashes[n_some - shared:])
    sketch = lambda hashes: {"sketch": " ".join(sorted(hashes)[: prepare_data.SKETCH])}
    true, compared = len(some & others) / n_some, min(n_some, prepare_data.SKETCH * min(1, n_some / n_others))
    error = 4 * math.sqrt(true * (1 - true) / compared)
    assert abs(overlap(sketch(some), sketch(others)) - true) <= error + 1e-9
    assert overlap({}, {}) == overlap(sketch(some), {}) == 0  # sets of an earlier version


# ---- two programs at once -------------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(three):
    """A second start and a --resume beside a live run are refused; a kill leaves no lock behind."""
    process = start("fastmix.py", *RUN, "--max_steps", 10**6, "--out_dir", "out", cwd=three)
    wait_for_step(process, three / "out", 5)
    assert "out/ holds another run" in refused("fastmix.py", *RUN, "--out_dir", "out", cwd=three)
    line = refused("fastmix.py", "--resume", "--out_dir", "out", cwd=three)
    assert "another program is writing to out/ now" in line
    assert process.poll() is None
    process.kill()
    process.communicate()
    process = start("fastmix.py", "--resume", "--out_dir", "out", cwd=three)
    step = json.loads((three / "out" / "log.jsonl").read_text().splitlines()[-1])["step"]
    wait_for_step(process, three / "out", step + 5)
    process.kill()
    process.communicate()


def test_two_runs_that_start_together(three):
    """Both find an empty folder; one of them trains."""
    both = [start("fastmix.py", *RUN, "--max_steps", 300, "--out_dir", "out", cwd=three) for _ in range(2)]
    results = [(p.communicate(), p.returncode) for p in both]
    assert sorted(code for _, code in results) == [0, 2], results
    err = next(err for (_, err), code in results if code == 2)
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "--out_dir" in err
    assert len((three / "out" / "log.jsonl").read_text().splitlines()) == 61


def test_two_preparations_of_one_name(tmp_path):
    (tmp_path / "big.txt").write_text("".join(f"some words in line {i}\n" for i in range(1_500_000)))
    (tmp_path / "small.txt").write_text("".join(f"other words in line {i}\n" for i in range(50_000)))
    process = start("prepare_data.py", "x=big.txt", cwd=tmp_path)
    while not (tmp_path / "data" / ".x.partial" / "train.bin").exists():
        assert process.poll() is None
        time.sleep(0.005)
    line = refused("prepare_data.py", "x=small.txt", cwd=tmp_path)
    assert "another program is writing to data/.x.partial/ now" in line and process.poll() is None
    run("prepare_data.py", "y=small.txt", cwd=tmp_path)  # another name may
    process.kill()
    process.communicate()
    run("prepare_data.py", "x=small.txt", cwd=tmp_path)
    assert json.loads((tmp_path / "data" / "x" / "meta.json").read_text())["origin"] == "small.txt"
    assert sorted(os.listdir(tmp_path / "data")) == ["x", "y"]


def test_resume_after_any_split_changed(three):
    run("fastmix.py", *RUN, "--max_steps", 10, "--out_dir", "out", cwd=three)
    for name, split in (("a", "train"), ("a", "val"), ("target", "val"), ("target", "test")):
        path = three / "data" / name / "meta.json"
        before = path.read_text()
        meta = json.loads(before)
        meta["splits"][split]["sha256"] = "another"
        path.write_text(json.dumps(meta))
        line = refused("fastmix.py", "--resume", "--out_dir", "out", cwd=three)
        assert "the data in data/ is not what out/ckpt.pt was trained on" in line, (name, split)
        path.write_text(before)
    run("fastmix.py", "--resume", "--out_dir", "out", cwd=three)


def test_a_part_of_torchruns_environment(three):
    cases = [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"},
             {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
             {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}]
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda given: refused("fastmix.py", *RUN, "--max_steps", 1, cwd=three, env=given), cases)
        for given, line in zip(cases, lines):
            assert " ".join(f"{k}={v}" for k, v in given.items() if k != "MASTER_PORT") in line and "unset it" in line
    assert not (three / "out").exists()


def test_the_samples_name_is_taken(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(texts(200)))
    run("prepare_data.py", "math=mine.txt", cwd=tmp_path)
    for flags in ([], ["--overwrite"]):
        line = refused("prepare_data.py", *flags, cwd=tmp_path)
        assert "data/math was made from mine.txt" in line and "--data_dir" in line
    assert os.listdir(tmp_path / "data") == ["math"]


# ---- files ----------------------------------------------------------------------------------------------------------

def test_links_binaries_and_json_in_a_folder(tmp_path):
    """What `code=src/` meets: links (one runs in a circle, one leads nowhere), binaries, settings in JSON."""
    src, elsewhere = tmp_path / "src", tmp_path / "elsewhere"
    src.mkdir(), elsewhere.mkdir()
    parts = texts(40)
    for i, text in enumerate(parts):
        ((elsewhere if i % 2 else src) / f"{i}.py").write_text(text)
    (src / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(src)
    (src / "gone.py").symlink_to(tmp_path / "nowhere")
    (src / "image.png").write_bytes(bytes(range(256)))
    (src / "zeros.bin").write_bytes(b"text\0text")
    os.mkfifo(src / "pipe")
    (src / "empty.py").write_text("")
    (src / "package.json").write_text('{\n "name": "x",\n "version": 1\n}\n')
    stdout = run("prepare_data.py", "code=src/", cwd=tmp_path)
    assert "code: 4 files are no UTF-8 text and left out: src/gone.py, src/image.png, src/pipe, src/zeros.bin\n" in stdout
    assert "(41 documents)" in stdout
    found = set().union(*split_documents(tmp_path / "data" / "code").values())
    assert found == {t.encode() for t in parts} | {(src / "package.json").read_bytes()}
    (src / "only").mkdir()
    (src / "only" / "image.png").write_bytes(b"\xff\xfe")
    assert "src/only: no text there" in run("prepare_data.py", "x=src/only", cwd=tmp_path, status=2)


def test_records_under_any_ending(tmp_path):
    import gzip
    cases = [("x.JSONL", "lines"), ("x.ndjson", "lines"), ("a.json", "lines"), ("b.json", "array"), ("c.json", "one line"),
             ("x.jsonl", "array"), ("x.NDJSON.gz", "lines"), ("x.json.gz", "array")]
    records = [{"instruction": f"what is {i}?", "input": "", "output": f"it is {i}"} for i in range(400)]
    text = {"lines": "".join(json.dumps(r) + "\n" for r in records), "array": "\ufeff" + json.dumps(records, indent=1),
            "one line": json.dumps(records)}
    for name, content in cases:
        data = text[content].encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    stdout = run("prepare_data.py", *(f"s{i}={name}" for i, (name, _) in enumerate(cases)), cwd=tmp_path)
    assert stdout.count("(400 documents, instruction/output, ") == len(cases)


def test_files_that_are_not_read_as_they_are(tmp_path):
    cases = {"t.parquet": "pandas.read_parquet('t.parquet').to_json('t.parquet.jsonl'", "t.arrow": "datasets.Dataset",
             "t.jsonl.zst": "zstd -d t.jsonl.zst", "t.txt.gz": "gunzip t.txt.gz", "t.zip": "unzip t.zip",
             "t.json": "neither an array of records nor JSON lines"}
    for name, part in cases.items():
        (tmp_path / name).write_bytes(b"PAR1\0")
        line = refused("prepare_data.py", f"x={name}", cwd=tmp_path)
        assert f"{name} is not read as it is" in line and part in line
    (tmp_path / "broken.json").write_text('[{"text": "x"},\n {"text": ')
    assert "broken.json: not JSON" in refused("prepare_data.py", "x=broken.json", cwd=tmp_path)


def test_a_tokenizer_file_that_lacks_bytes(tmp_path):
    import base64
    tokens = [bytes([i]) for i in range(254)] + [b"ab", b"cd", b"ef"]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    (tmp_path / "x.txt").write_text("\n".join(texts(200)))
    line = refused("prepare_data.py", "x=x.txt", "--tokenizer", "t.tiktoken", cwd=tmp_path)
    assert "t.tiktoken" in line and "2 of the bytes missing" in line


def test_links_that_lead_nowhere(three):
    """As a set, a folder of sets, a text, an out_dir, a checkpoint."""
    for name in ("nowhere", "data/gone"):
        (three / name).symlink_to(three / "not there")
    (three / "x.txt").write_text("\n".join(texts(200)))
    assert "data/gone exists" in refused("prepare_data.py", "gone=x.txt", cwd=three)
    assert "cannot write nowhere/.x.partial" in refused("prepare_data.py", "x=x.txt", "--data_dir", "nowhere", cwd=three)
    assert "nowhere: no text there" in refused("prepare_data.py", "x=nowhere", cwd=three)
    assert "no set 'gone'" in refused("fastmix.py", *TINY, "--sources", "a,gone", cwd=three)
    assert "--out_dir 'nowhere' is not" in refused("fastmix.py", *RUN, "--out_dir", "nowhere", cwd=three)
    assert "nowhere: no checkpoint there" in refused("fastmix.py", *RUN, "--init_from", "nowhere", cwd=three)
    assert "nowhere/ckpt.pt: no checkpoint there" in refused("fastmix.py", "--resume", "--out_dir", "nowhere", cwd=three)


def in_process(monkeypatch, capsys, module, *argv, unreadable):
    """Runs a program here, where opening or listing one path is not permitted; returns its line. (root may read all.)"""
    real_open, real_scandir = io.open, os.scandir

    def guarded(real):
        def call(path, *args, **kw):
            if os.fspath(path) == unreadable if not isinstance(path, int) else False:
                raise PermissionError(13, "Permission denied", unreadable)
            return real(path, *args, **kw)
        return call
    monkeypatch.setattr("builtins.open", guarded(real_open))
    monkeypatch.setattr(io, "open", guarded(real_open))
    monkeypatch.setattr(os, "scandir", guarded(real_scandir))
    monkeypatch.setattr(sys, "argv", ["x", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and len(line.splitlines()) == 1, line
    return line


@pytest.mark.parametrize("path", ["x.txt", "x.jsonl", "src", "src/sub", "src/y.py", "t.tiktoken"])
def test_unreadable_input_is_not_called_unwritable(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src" / "sub").mkdir(parents=True)
    for name in ("x.txt", "src/y.py", "src/sub/z.py"):
        (tmp_path / name).write_text("\n".join(texts(200)))
    write_jsonl(tmp_path / "x.jsonl", texts(200))
    (tmp_path / "t.tiktoken").write_text("")
    argv = ["x=x.txt", "--tokenizer", path] if path == "t.tiktoken" else [f"x={path.split('/')[0]}"]
    line = in_process(monkeypatch, capsys, prepare_data, *argv, unreadable=path)
    assert "read" in line and f"{path}" in line and "Permission denied" in line and "write" not in line
    assert not (tmp_path / "data" / "x").exists()


@pytest.mark.parametrize("path, part", [
    ("data/a/train.bin", "cannot read data/a/train.bin: Permission denied"),
    ("data/a/meta.json", "cannot read data/a/meta.json: Permission denied"),
    ("out/ckpt.pt", "cannot read out/ckpt.pt: Permission denied"),
    ("out/log.jsonl", "cannot open out/log.jsonl: Permission denied")])
def test_unreadable_files_of_a_run(three, monkeypatch, capsys, path, part):
    monkeypatch.chdir(three)
    run("fastmix.py", *RUN, "--max_steps", 5, cwd=three)
    prepare_data.mapped.cache_clear()
    line = in_process(monkeypatch, capsys, fastmix, "--resume", unreadable=path)
    assert part in line and "--overwrite" not in line


def test_ninety_sets_with_256_files_open(tmp_path):
    import resource
    for k in range(90):
        ids = markov(k, 300)
        write_set(tmp_path / "data" / f"s{k}", {"train": ids, "val": ids[:60], "test": ids[:60]}, masks={
            "train": np.ones(300, np.uint8), "val": np.ones(60, np.uint8), "test": np.ones(60, np.uint8)})
    names = ",".join(f"s{k}" for k in range(90))
    run("fastmix.py", *TINY, "--max_steps", 12, "--sources", names, cwd=tmp_path, limit=(resource.RLIMIT_NOFILE, 256))
    assert len(json.loads((tmp_path / "out" / "mixture.json").read_text())["mixture"]) == 90


# ---- a reader that leaves -------------------------------------------------------------------------------------------

def python(*args, cwd, before=lambda: None, **kw):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whatever this machine ignores for who runs the tests
        before()
    return subprocess.Popen([sys.executable, str(ROOT / args[0]), *map(str, args[1:])], cwd=cwd, preexec_fn=prepare,
                            stderr=subprocess.PIPE, **kw)


def ended(process, status):
    """Waits for a process whose output nobody reads."""
    try:
        assert process.wait(60) == status, process.stderr.read()
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    err = process.stderr.read()
    assert b"Traceback" not in err and b"Broken" not in err, err


@pytest.mark.parametrize("how", ["pipe closed", "no stdout"])
def test_no_one_reads_the_output(three, how):
    """`| head` and a service without stdout: three sets are prepared, and a run ends with its result."""
    (three / "x.txt").write_text("\n".join(texts(200)))
    for args in (["prepare_data.py", "x=x.txt", "y=x.txt", "z=x.txt"], ["fastmix.py", *RUN, "--max_steps", 10]):
        if how == "pipe closed":
            process = python(*args, cwd=three, stdout=subprocess.PIPE)
            process.stdout.close()
        else:
            process = python(*args, cwd=three, before=lambda: os.close(1))
        ended(process, 0)
    assert all((three / "data" / n / "meta.json").exists() for n in "xyz")
    assert json.loads((three / "out" / "mixture.json").read_text())["steps"] == 10
    assert (three / "out" / "ckpt.pt").stat().st_size > 10_000


def test_tee_dies_at_ctrl_c(three):
    """The reader and the run get the same signal; the run still saves its step."""
    process = python("fastmix.py", *RUN, "--max_steps", 10**6, cwd=three, stdout=subprocess.PIPE)
    wait_for_step(process, three / "out", 20)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    ended(process, 130)
    step = json.loads((three / "out" / "log.jsonl").read_text().splitlines()[-1])["step"]
    import torch
    assert torch.load(three / "out" / "ckpt.pt", weights_only=True)["state"]["step"] == step >= 20
