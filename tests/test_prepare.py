"""prepare_data.py: which files it reads, the round trip, splits, one writer at a time, TokenSet."""
import ast
import base64
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prepare_data
from conftest import ROOT, chain_set, example_set, markov, refused, run, start, write_set
from prepare_data import SPLITS, TokenSet, load_sets, overlap


def tokens(folder, split):
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype=dtype)


def documents(folder, split, tokenizer=None):
    """The texts of a split, cut at <|endoftext|> and decoded."""
    tokenizer = tokenizer or prepare_data.bytes_tokenizer()
    ids = tokens(folder, split)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    parts = np.split(ids, ends)[: len(ends)]
    return [tokenizer.decode(part[part != tokenizer.eot_token].tolist()) for part in parts]


def all_documents(folder, tokenizer=None):
    """The texts of all splits, sorted."""
    return sorted(text for split in SPLITS for text in documents(folder, split, tokenizer))


def corpus(n, seed=0):
    """n short documents, with letters of more than one byte."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(n):
        numbers = map(str, rng.integers(0, 10**6, rng.integers(1, 60)))
        texts.append(f"document {i}: {' '.join(numbers)} ünï ☃ 漢字\r\n")
    return texts


def longer_corpus(n, seed=0):
    """n documents of some 1,200 characters."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(n):
        numbers = map(str, rng.integers(0, 10**6, rng.integers(50, 300)))
        texts.append(f"document {i}: {' '.join(numbers)}")
    return texts


def write_jsonl(path, texts, key="text"):
    lines = [json.dumps({key: text, "meta": {"i": i}}) + "\n" for i, text in enumerate(texts)]
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def line_of(capsys, call, *args, **kw):
    """Calls what must end the program with status 2 and one line; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(*args, **kw)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: "), line
    assert len(line.splitlines()) == 1, line
    return line


# ---- the file itself -----------------------------------------------------------------------------

def test_runs_on_python_3_10_and_on_windows():
    """By its syntax, the modules it imports and what it takes from them."""
    tree = ast.parse((ROOT / "prepare_data.py").read_text(), feature_version=(3, 10))
    modules = set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
    assert not modules & {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"}
    assert not names & {"fork", "SIGALRM", "SIGHUP", "SIGKILL", "alarm", "flock", "file_digest"}
    assert "torch" not in modules and not modules & {"fastmix", "model", "plot_mixture"}


# ---- tokenizers ----------------------------------------------------------------------------------

def test_bytes_tokenizer_is_utf8():
    tokenizer = prepare_data.bytes_tokenizer()
    text = "def f(x):\n\treturn 'ünï ☃ 漢字 😀' <|endoftext|>\r\n" * 9 + "\0"
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode())
    assert ids == tokenizer.encode_to_numpy(text, disallowed_special=()).tolist()
    assert tokenizer.decode(ids) == text


def write_tiktoken(path, tokens):
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def test_merging_tokenizers_and_wide_ids(tmp_path):
    """A .tiktoken file whose vocabulary needs 32 bits; the text must come back through it."""
    ranks = [bytes([i]) for i in range(256)] + [b" %05d" % i for i in range(70_000)]
    write_tiktoken(tmp_path / "big.tiktoken", ranks)
    texts = corpus(200)
    write_jsonl(tmp_path / "web.jsonl", texts)
    run("prepare_data.py", "web=web.jsonl", "--tokenizer", "big.tiktoken", cwd=tmp_path)
    folder = tmp_path / "data" / "web"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_257
    assert meta["tokenizer"].startswith("big.tiktoken:")
    tokenizer = prepare_data.file_tokenizer(tmp_path / "big.tiktoken")
    assert all_documents(folder, tokenizer) == sorted(texts)


def test_a_tokenizer_file_that_lacks_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(254)] + [b"ab", b"cd", b"ef"]
    write_tiktoken(tmp_path / "t.tiktoken", tokens)
    (tmp_path / "x.txt").write_text("\n".join(corpus(200)))
    line = refused("prepare_data.py", "x=x.txt", "--tokenizer", "t.tiktoken", cwd=tmp_path)
    assert "t.tiktoken" in line and "2 of the bytes missing" in line


def test_silent_network_ends_in_one_line(tmp_path):
    """A proxy that accepts and never answers, as some firewalls do: tiktoken would wait for ever.
    The program says so after its time limit, and then ends although tiktoken still waits."""
    (tmp_path / "x.txt").write_text("\n".join(corpus(200)))
    code = ("import prepare_data; prepare_data.NETWORK_TIMEOUT = 1; "
            "prepare_data.main(['x=x.txt', '--tokenizer', 'gpt2'])")
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = os.environ | {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
        env |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY"), proxy)
        ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                               capture_output=True, timeout=30)
    line = ended.stderr
    assert ended.returncode == 2 and "--tokenizer bytes" in line and "TIKTOKEN_CACHE_DIR" in line
    assert "no answer in 1 s" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "data").exists()


# ---- round trip and splits -----------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_round_trip(tmp_path, suffix):
    texts = corpus(400)
    write_jsonl(tmp_path / f"web{suffix}", texts, key="body")
    run("prepare_data.py", f"web=web{suffix}", "--text_key", "body", cwd=tmp_path)
    folder = tmp_path / "data" / "web"
    assert all_documents(folder) == sorted(texts)
    meta = json.loads((folder / "meta.json").read_text())
    for split in SPLITS:
        counts = meta["splits"][split]
        found = documents(folder, split)
        assert counts["documents"] == len(found) > 5
        assert counts["bytes"] == sum(len(text.encode()) for text in found)
        assert counts["tokens"] == counts["bytes"] + counts["documents"]
        assert counts["tokens"] == len(tokens(folder, split))
        written = (folder / f"{split}.bin").read_bytes()
        assert counts["sha256"] == prepare_data.hashlib.sha256(written).hexdigest()
    assert meta["dtype"] == "uint16" and meta["documents"] == 400
    assert meta["origin"] == f"web{suffix}"


def test_split_does_not_depend_on_order_and_keeps_duplicates_together(tmp_path):
    texts = corpus(300)
    write_jsonl(tmp_path / "one.jsonl", texts)
    write_jsonl(tmp_path / "two.jsonl", (texts + texts)[::-1])
    run("prepare_data.py", "one=one.jsonl", "two=two.jsonl", cwd=tmp_path)
    one = {split: documents(tmp_path / "data" / "one", split) for split in SPLITS}
    two = {split: documents(tmp_path / "data" / "two", split) for split in SPLITS}
    for split in SPLITS:
        assert sorted(two[split]) == sorted(2 * one[split])
    assert not set(one["train"]) & set(one["val"])
    assert not set(one["train"]) & set(one["test"])
    run("prepare_data.py", "three=one.jsonl", "--seed", "5", cwd=tmp_path)
    assert documents(tmp_path / "data" / "three", "val") != one["val"]


@pytest.mark.parametrize("seed", [0, 1, 10**15 + 7, 2**53 + 1, 2**63 - 1])
def test_any_seed_gives_the_right_fractions_and_its_own_split(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", [f"document {i}" for i in range(4000)])
    in_val = {}
    for s in (seed, seed ^ 1):
        prepare_data.main([f"x{s}=x.jsonl", "--seed", str(s), "--test_fraction", "0.2"])
        found = {split: documents(tmp_path / "data" / f"x{s}", split) for split in SPLITS}
        # within 5 standard deviations of what independent places give
        assert abs(len(found["val"]) - 200) < 5 * 13.8
        assert abs(len(found["test"]) - 800) < 5 * 25.3
        in_val[s] = set(found["val"])
    # two seeds share a twentieth of their val splits
    assert len(in_val[seed] & in_val[seed ^ 1]) < 35


def dresses(text):
    """One text as files of other systems and programs have it."""
    return [text, text.replace("\n", "\r\n"), "\ufeff" + text, text.rstrip("\n"), "\n\n" + text,
            text.replace("    ", "\t"), text.replace("\n", " \n\n")]


def test_a_text_in_another_dress_has_the_same_place():
    for i in range(20):
        text = f"def f{i}():\n    return '{i}'\n\n\nprint(f{i}())\n"
        places = {prepare_data.place([(dress, True)], 1337) for dress in dresses(text)}
        parts = [(text[:9], False), (text[9:], True)]
        assert places == {prepare_data.place(parts, 1337)}
        assert places != {prepare_data.place([(text + "x", True)], 1337)}
        assert places != {prepare_data.place([(text, True)], 1338)}


@pytest.mark.parametrize("length", [5, prepare_data.WHOLE - 1, prepare_data.WHOLE,
                                    prepare_data.WHOLE + 1, 3 * prepare_data.WHOLE])
def test_a_byte_order_mark_is_not_text(length):
    """At the start of a file or record; anywhere else it is a character. Nothing is lost where the
    text is just as long as one that stays whole."""
    letters = np.random.default_rng(length).integers(97, 123, length, np.uint8)
    text = letters.tobytes().decode()
    for start in ("", "\ufeff"):
        found = list(prepare_data.pages(io.StringIO(start + text, newline="")))
        assert "".join(found) == text and (len(found) == 1) == (length <= prepare_data.WHOLE)
    assert list(prepare_data.pages(io.StringIO("a\ufeffb", newline=""))) == ["a\ufeffb"]
    assert list(prepare_data.pages(io.StringIO("\ufeff", newline=""))) == []


def test_files_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch, capsys):
    """Text with the bytes and with a vocabulary, and examples; with and without long documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "BATCH", 5000)
    tokens = [bytes([i]) for i in range(256)] + [b" 1", b" 12", b"00", b"ment"]
    write_tiktoken(tmp_path / "t.tiktoken", tokens)
    texts = longer_corpus(300)
    write_jsonl(tmp_path / "text.jsonl", [*texts[:200], "\n".join(texts), *texts[200:]])
    pairs = [{"prompt": text[:50], "response": text[50:]} for text in texts]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for tokenizer in ("bytes", "t.tiktoken"):
        for name in ("text", "qa"):
            for workers in ("1", "2", "7"):
                prepare_data.main([f"{name}{workers}={name}.jsonl", "--data_dir", f"by_{tokenizer}",
                                   "--tokenizer", tokenizer, "--workers", workers])
            found = []
            for workers in "127":
                files = contents(tmp_path / f"by_{tokenizer}" / f"{name}{workers}")
                own_name = f'"{name}{workers}"'.encode()
                files["meta.json"] = files["meta.json"].replace(own_name, b"")
                found.append(files)
            assert found[0] == found[1] == found[2]
            assert len(found[0]) == (7 if name == "text" else 10)


def split_documents(folder):
    """{split: set of the documents or pages in it, in bytes}"""
    found = {}
    for split in SPLITS:
        ids = np.fromfile(folder / f"{split}.bin", np.uint16)
        parts = np.split(ids, np.flatnonzero(ids == 256))
        found[split] = {bytes(part[part < 256].astype(np.uint8)) for part in parts} - {b""}
    return found


def test_a_text_goes_to_one_split_whatever_set_it_is_in(tmp_path):
    """Sets of 80, 400 and 3,000 of the same documents, and a long one alone and among others."""
    texts = longer_corpus(3000)
    book = "\n".join(longer_corpus(300, seed=1))
    sets = {"small": texts[:80], "middle": texts[:400], "large": texts,
            "books": [book, *texts[:400]]}
    for name, part in sets.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "book.txt").write_bytes(book.encode())
    args = [f"{name}={name}.jsonl" for name in sets]
    run("prepare_data.py", *args, "book=book.txt", cwd=tmp_path)
    found = {name: split_documents(tmp_path / "data" / name) for name in (*sets, "book")}
    for one in found:
        for other in found:
            for split in ("val", "test"):
                assert not found[one][split] & found[other]["train"], (one, other, split)
        assert all(len(found[one][split]) > 0 for split in SPLITS)
    assert len(found["book"]["train"]) > 5
    assert found["book"]["train"] <= found["books"]["train"]


def test_one_long_document_is_divided_by_the_page(tmp_path):
    text = "".join(f"line {i} of a long book\n" for i in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    assert "(1 documents)" in run("prepare_data.py", "book=book.txt", cwd=tmp_path)
    lines = {}
    for split in SPLITS:
        lines[split] = "".join(documents(tmp_path / "data" / "book", split)).splitlines()
    # each line whole, and in one split only
    assert sorted(sum(lines.values(), [])) == sorted(text.splitlines())
    assert all(0.02 < len(lines[split]) / 20_000 < 0.1 for split in ("val", "test"))


# ---- which files are read ------------------------------------------------------------------------

def test_folders_files_and_globs(tmp_path):
    for i, text in enumerate(corpus(150)):
        path = tmp_path / "src" / f"d{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "src" / ".git").mkdir()
    (tmp_path / "src" / ".git" / "index").write_bytes(b"\xff\xfe")  # hidden, so never read
    run("prepare_data.py", "folder=src", "glob=src/**/*.txt", cwd=tmp_path)
    for split in SPLITS:
        in_folder = documents(tmp_path / "data" / "folder", split)
        assert sorted(in_folder) == sorted(documents(tmp_path / "data" / "glob", split))


def test_links_binaries_and_json_in_a_folder(tmp_path):
    """What `code=src/` meets: links (one runs in a circle, one leads nowhere, two lead to one
    folder), binaries, settings in JSON."""
    src = tmp_path / "src"
    elsewhere = tmp_path / "elsewhere"
    src.mkdir()
    elsewhere.mkdir()
    texts = longer_corpus(40)
    for i, text in enumerate(texts):
        folder = elsewhere if i % 2 else src
        (folder / f"{i}.py").write_bytes(text.encode())
    (src / "linked").symlink_to(elsewhere)
    (src / "linked_too").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(src)
    (src / "gone.py").symlink_to(tmp_path / "nowhere")
    (src / "image.png").write_bytes(bytes(range(256)))
    (src / "zeros.bin").write_bytes(b"text\0text")
    os.mkfifo(src / "pipe")
    (src / "empty.py").write_text("")
    (src / "package.json").write_text('{\n "name": "x",\n "version": 1\n}\n')
    stdout = run("prepare_data.py", "code=src/", cwd=tmp_path)
    assert ("code: left out 4 files that are not UTF-8 text: src/gone.py, src/image.png, src/pipe, "
            "src/zeros.bin\n") in stdout
    assert "(41 documents)" in stdout
    found = set().union(*split_documents(tmp_path / "data" / "code").values())
    expected = {text.encode() for text in texts} | {(src / "package.json").read_bytes()}
    assert found == expected
    (src / "only").mkdir()
    (src / "only" / "image.png").write_bytes(b"\xff\xfe")
    stderr = run("prepare_data.py", "x=src/only", cwd=tmp_path, status=2)
    assert "src/only: no text there" in stderr


def test_of_many_files_left_out_four_are_named(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.txt").write_text("\n".join(corpus(2000)))
    for name in "dgbafce":
        (tmp_path / "src" / f"{name}.png").write_bytes(b"\xff\xfe")
    stdout = run("prepare_data.py", "x=src", cwd=tmp_path)
    assert ("x: left out 7 files that are not UTF-8 text: src/a.png, src/b.png, src/c.png, "
            "src/d.png and 3 more\n") in stdout


def test_records_under_any_ending(tmp_path):
    cases = [("x.JSONL", "lines"), ("x.ndjson", "lines"), ("a.json", "lines"), ("b.json", "array"),
             ("c.json", "one line"), ("x.jsonl", "array"), ("x.NDJSON.gz", "lines"),
             ("x.json.gz", "array")]
    records = [{"instruction": f"what is {i}?", "input": "", "output": f"it is {i}"}
               for i in range(400)]
    content = {
        "lines": "".join(json.dumps(record) + "\n" for record in records),
        "array": "\ufeff" + json.dumps(records, indent=1),
        "one line": json.dumps(records),
    }
    for name, kind in cases:
        data = content[kind].encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    args = [f"s{i}={name}" for i, (name, _) in enumerate(cases)]
    stdout = run("prepare_data.py", *args, cwd=tmp_path)
    assert stdout.count("(400 documents, instruction/output, ") == len(cases)


def test_files_that_are_not_read_as_they_are(tmp_path):
    cases = {
        "t's.arrow": """Dataset.from_file("t's.arrow").to_json("t's.arrow.jsonl")""",
        "t.py.zst": "zstd -d t.py.zst",
        "t.py.gz": "gunzip t.py.gz",
        "my t.zip": "unzip 'my t.zip'",
        "t.json": "neither an array of records nor JSON lines",
    }
    for name, part in cases.items():
        (tmp_path / name).write_bytes(b"PAR1\0")
        line = refused("prepare_data.py", f"x={name}", cwd=tmp_path)
        assert f"{name} is not read as it is" in line and part in line
    (tmp_path / "broken.json").write_text('[{"text": "x"},\n {"text": ')
    line = refused("prepare_data.py", "x=broken.json", cwd=tmp_path)
    assert "broken.json: not JSON" in line


def test_links_that_lead_nowhere(tmp_path):
    """As a set, a folder of sets, a text."""
    chain_set(tmp_path / "data" / "a", 1)
    for name in ("nowhere", "data/gone"):
        (tmp_path / name).symlink_to(tmp_path / "not there")
    (tmp_path / "x.txt").write_text("\n".join(corpus(200)))
    line = refused("prepare_data.py", "gone=x.txt", cwd=tmp_path)
    assert "data/gone exists" in line
    line = refused("prepare_data.py", "gone=x.txt", "--overwrite", cwd=tmp_path)
    assert "data/gone exists and is not a prepared set" in line
    assert (tmp_path / "data/gone").is_symlink()
    line = refused("prepare_data.py", "x=x.txt", "--data_dir", "nowhere", cwd=tmp_path)
    assert "cannot write nowhere/.x.partial" in line
    line = refused("prepare_data.py", "x=nowhere", cwd=tmp_path)
    assert "nowhere: no text there" in line
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "gone"]


def deny(monkeypatch, denied):
    """Opening or listing this one path is not permitted. (root, who may run the tests, may.)"""
    def guarded(real):
        def call(path, *args, **kw):
            if not isinstance(path, int) and os.fspath(path) == denied:
                raise PermissionError(13, "Permission denied", denied)
            return real(path, *args, **kw)
        return call
    guarded_open = guarded(io.open)
    monkeypatch.setattr("builtins.open", guarded_open)
    monkeypatch.setattr(io, "open", guarded_open)
    monkeypatch.setattr(os, "scandir", guarded(os.scandir))


@pytest.mark.parametrize("path", ["x.txt", "x.jsonl", "src", "src/sub", "src/y.py", "t.tiktoken"])
def test_unreadable_input_is_not_called_unwritable(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src" / "sub").mkdir(parents=True)
    for name in ("x.txt", "src/y.py", "src/sub/z.py"):
        (tmp_path / name).write_text("\n".join(corpus(200)))
    write_jsonl(tmp_path / "x.jsonl", corpus(200))
    (tmp_path / "t.tiktoken").write_text("")
    argv = [f"x={path.split('/')[0]}"]
    if path == "t.tiktoken":
        argv = ["x=x.txt", "--tokenizer", path]
    deny(monkeypatch, path)
    line = line_of(capsys, prepare_data.main, argv)
    assert "read" in line and path in line and "Permission denied" in line and "write" not in line
    assert not (tmp_path / "data" / "x").exists()


def peak_mb(cwd, *args):
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    command = [sys.executable, "-c", code, str(ROOT / "prepare_data.py"), *args]
    ended = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=True)
    return int(ended.stdout.splitlines()[-1]) / 1024


def test_memory_is_flat(tmp_path):
    """Eight times the text, the same peak: for one long file without a line end, and for lines."""
    for name, mb in (("small", 4), ("large", 32)):
        letters = np.random.default_rng(0).integers(97, 123, mb << 20, np.uint8)
        (tmp_path / f"{name}.txt").write_bytes(letters.tobytes())
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            for i in range(mb * 256):
                f.write(json.dumps({"text": f"{i} " * 512}) + "\n")
    for suffix in ("txt", "jsonl"):
        small = peak_mb(tmp_path, f"small-{suffix}=small.{suffix}")
        large = peak_mb(tmp_path, f"large-{suffix}=large.{suffix}")
        assert large < small + 16, (suffix, small, large)


# ---- bad input -----------------------------------------------------------------------------------

def test_bad_input(tmp_path):
    write_jsonl(tmp_path / "good.jsonl", corpus(150))
    good = (tmp_path / "good.jsonl").read_text().splitlines()
    bad_lines = {"key": '{"content": "x"}', "json": '{"text": "x"',
                 "list": "[1]", "deep": '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}"}
    for name, line in bad_lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*good[:99], line, *good[99:]]))
    (tmp_path / "latin.txt").write_bytes(b"a" * 20_000 + "né".encode("latin-1") + b" b" * 9)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "n\xe9"}\n')
    cut = gzip.compress("\n".join(good).encode())[:-100]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    (tmp_path / "tiny.txt").write_text("hello\n")
    (tmp_path / "void.txt").write_text("")
    (tmp_path / "bad.tiktoken").write_text("!!! x\n")
    (tmp_path / "file").write_text("")
    run("prepare_data.py", "there=good.jsonl", cwd=tmp_path)
    good_set = "x=good.jsonl"
    cases = {
        "key.jsonl": (["x=key.jsonl"], "key.jsonl, line 100: no known key in it, but content; "
                      "known are text, messages"),
        "json": (["x=json.jsonl"], "json.jsonl, line 100: not JSON"),
        "list": (["x=list.jsonl"], "list.jsonl, line 100"),
        "deep": (["x=deep.jsonl"], "deep.jsonl, line 100: lists within lists, too deep"),
        "latin": (["x=latin.txt"], "latin.txt: not UTF-8 at byte 20001"),
        "latin jsonl": (["x=latin.jsonl"], "latin.jsonl, line 1: not UTF-8"),
        "cut gzip": (["x=cut.jsonl.gz"], "cannot read cut.jsonl.gz (Compressed file ended"),
        "tiny": (["x=tiny.txt"], "x: 1 different documents", "too few for train, val and test"),
        "void": (["x=void.txt"], "x: void.txt holds no text"),
        "missing": (["x=gone"], "gone: no text there"),
        "no name": (["good.jsonl"], "is not NAME=PATH"),
        "bad name": (["../x=good.jsonl"], "is not NAME=PATH"),
        "twice": ([good_set, "x=key.jsonl"], "the name x is given twice"),
        "there": (["there=good.jsonl"], "data/there exists", "--overwrite"),
        "fractions": ([good_set, "--val_fraction", "0.7", "--test_fraction", "0.4"],
                      "--val_fraction 0.7"),
        "no tokenizer file": ([good_set, "--tokenizer", "gone.tiktoken"],
                              "cannot read gone.tiktoken: No such"),
        "bad tokenizer file": ([good_set, "--tokenizer", "bad.tiktoken"], "bad.tiktoken, line 1"),
        "unknown tokenizer": ([good_set, "--tokenizer", "nope"], "--tokenizer bytes"),
        "not a folder": ([good_set, "--data_dir", "file"], "cannot write"),
        "endless seed": ([good_set, "--seed", "1" + 400 * "0"], f"from 0 to {2**63 - 1}"),
        "seed below 0": ([good_set, "--seed", "-1"], f"from 0 to {2**63 - 1}"),
        "seed too large": ([good_set, "--seed", str(2**63)], f"from 0 to {2**63 - 1}"),
        "sample's seed below 0": (["--seed", "-1", "--data_dir", "s"], f"from 0 to {2**63 - 1}"),
        "no workers": ([good_set, "--workers", "0"], "--workers 0"),
    }
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda case: refused("prepare_data.py", *case[0], cwd=tmp_path),
                         cases.values())
        for (case, (_, *parts)), line in zip(cases.items(), lines):
            for part in parts:
                assert part in line, f"{case}: {line}"
    assert sorted(os.listdir(tmp_path / "data")) == ["there"]  # no part of a failed set is left


# ---- one writer at a time, and nothing half written ----------------------------------------------

def start_and_wait(*args, cwd):
    """Starts a preparation of x, and returns when it is writing."""
    process = start("prepare_data.py", *args, cwd=cwd)
    while not (cwd / "data" / ".x.partial" / "train.bin").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


@pytest.fixture
def texts(tmp_path):
    """A folder with a text that takes seconds, and one that takes none."""
    big = "".join(f"some words in line {i}\n" for i in range(1_000_000))
    small = "".join(f"other words in line {i}\n" for i in range(50_000))
    (tmp_path / "big.txt").write_text(big)
    (tmp_path / "small.txt").write_text(small)
    return tmp_path


def origin(folder):
    return json.loads((folder / "meta.json").read_text())["origin"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_preparations_of_one_name(texts):
    """The second start is refused, and what it says deletes the folder that a kill leaves."""
    process = start_and_wait("x=big.txt", cwd=texts)
    line = refused("prepare_data.py", "x=small.txt", cwd=texts)
    assert "data/.x.partial exists: another program may be writing it" in line
    assert "or one was killed" in line
    assert process.poll() is None
    run("prepare_data.py", "y=small.txt", cwd=texts)  # another name may
    process.kill()
    process.communicate()
    assert (texts / "data" / ".x.partial" / "train.bin").exists()
    assert refused("prepare_data.py", "x=small.txt", cwd=texts) == line
    command = line.split("delete it with: ")[1]
    assert command == "rm -r data/.x.partial"
    subprocess.run(command, shell=True, check=True, cwd=texts)
    run("prepare_data.py", "x=small.txt", cwd=texts)
    assert origin(texts / "data" / "x") == "small.txt"
    assert sorted(os.listdir(texts / "data")) == ["x", "y"]


def test_two_preparations_that_start_together(texts):
    """One of them writes the set, whoever is first."""
    both = [start("prepare_data.py", "x=small.txt", cwd=texts) for _ in range(2)]
    ended = [(process.communicate()[1], process.returncode) for process in both]
    assert sorted(status for _, status in ended) == [0, 2], ended
    line = next(stderr for stderr, status in ended if status == 2)
    assert line.startswith("error: data/") and len(line.splitlines()) == 1 and "exists" in line
    assert os.listdir(texts / "data") == ["x"]
    load_sets(texts / "data", ["x"], ["x"], 64)


def test_interrupted_leaves_the_old_set_and_nothing_else(texts):
    run("prepare_data.py", "x=small.txt", cwd=texts)
    before = contents(texts / "data" / "x")
    process = start_and_wait("x=big.txt", "--overwrite", cwd=texts)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "the set being written was left out" in stderr
    assert "Traceback" not in stderr
    assert contents(texts / "data" / "x") == before
    assert os.listdir(texts / "data") == ["x"]


def test_interrupted_while_a_thread_starts(texts):
    """The thread runs already, but the pool does not know it yet: the program still ends."""
    program = """
import threading
import prepare_data

start = threading.Thread.start

def start_and_interrupt(thread):
    start(thread)
    raise KeyboardInterrupt

threading.Thread.start = start_and_interrupt
prepare_data.main(["x=small.txt"])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=texts, env=env, text=True,
                          capture_output=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(texts / "data") == []


def test_killed_or_full_leaves_no_half_set(texts):
    import resource
    run("prepare_data.py", "x=big.txt", "--tokenizer", "bytes", cwd=texts)
    before = contents(texts / "data" / "x")
    again = ["x=big.txt", "--seed", "2", "--overwrite"]
    line = refused("prepare_data.py", *again, cwd=texts, limit=(resource.RLIMIT_FSIZE, 1 << 20))
    assert "cannot write" in line and "File too large" in line
    process = start_and_wait(*again, cwd=texts)
    process.kill()
    process.communicate()
    assert contents(texts / "data" / "x") == before
    shutil.rmtree(texts / "data" / ".x.partial")
    run("prepare_data.py", *again, cwd=texts)
    assert contents(texts / "data" / "x").keys() == before.keys()
    assert contents(texts / "data" / "x") != before
    assert os.listdir(texts / "data") == ["x"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_a_set_that_cannot_be_replaced_comes_back(texts, monkeypatch, capsys, error):
    """Windows permits no rename where a file is open: the set that was moved aside returns."""
    monkeypatch.chdir(texts)
    prepare_data.main(["x=small.txt"])
    before = contents(texts / "data" / "x")
    real = os.rename

    def rename(source, target):
        if os.fspath(source).endswith(".partial"):
            raise error
        real(source, target)
    monkeypatch.setattr(os, "rename", rename)
    argv = ["x=small.txt", "--seed", "2", "--overwrite"]
    if isinstance(error, OSError):
        line = line_of(capsys, prepare_data.main, argv)
        assert "cannot write data/.x.partial: Permission denied; nothing of x was changed" in line
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare_data.main(argv)
    assert contents(texts / "data" / "x") == before
    assert os.listdir(texts / "data") == ["x"]
    monkeypatch.undo()
    monkeypatch.chdir(texts)
    prepare_data.main(argv)
    assert contents(texts / "data" / "x") != before
    assert os.listdir(texts / "data") == ["x"]


@pytest.mark.parametrize("how", ["pipe closed", "no stdout"])
def test_no_one_reads_the_output(tmp_path, how):
    """`| head` and a service without stdout: three sets are prepared."""
    (tmp_path / "x.txt").write_text("\n".join(corpus(2000)))
    command = [sys.executable, str(ROOT / "prepare_data.py"), "x=x.txt", "y=x.txt", "z=x.txt"]
    if how == "pipe closed":
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        process.stdout.close()
    else:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: os.close(1))
    stderr = process.stderr.read()
    assert process.wait(60) == 0 and stderr == b"", stderr
    assert sorted(os.listdir(tmp_path / "data")) == ["x", "y", "z"]


# ---- TokenSet ------------------------------------------------------------------------------------

def test_windows_of_text(tmp_path):
    """Where sequences of text begin, and what of a split an evaluation looks at."""
    ids = np.arange(100, dtype=np.uint8)
    write_set(tmp_path / "d", {"train": ids, "val": ids[:30], "test": ids[:9]}, 128)
    data = TokenSet(tmp_path, "d", 8)
    x, y = data.windows("train", np.array([0, 91, 5]))
    assert np.array_equal(x[:, 1:], y[:, :-1])
    assert x[:, 0].tolist() == [0, 91, 5] and y[1, -1] == 99
    just_below_1 = np.nextafter(1.0, 0)  # any window that fits
    assert data.at_fraction("train", np.array([0.0, just_below_1])).tolist() == [0, 91]
    assert data.spread("val", 10**6).tolist() == [0, 8, 16]
    assert data.spread("test", 10**6).tolist() == [0]
    assert data.spread("train", 3 * 8).tolist() == [0, 48, 88]  # evenly, from first to last
    assert data.spread("train", 1).tolist() == [0]
    assert data.density("train") == 1
    assert data.available("train") == 100
    assert data.tokens_per_byte("val") == 1
    u = np.array([0.0, 0.5, 0.99])
    x, y = prepare_data.gather([data, data], "val", np.array([0, 1, 1]), u)
    assert x[:, 0].tolist() == [0, 11, 21]


@pytest.mark.parametrize("visible", [0.001, 0.01, 0.3, 1.0])
def test_what_a_shorter_run_is_shown(tmp_path, visible):
    """As many of the tokens, spread over the split, in windows that fit; at least one window."""
    ids = np.arange(50_000, dtype=np.uint16)
    write_set(tmp_path / "text", {"train": ids, "val": ids[:500], "test": ids[:500]}, 60_000)
    data = TokenSet(tmp_path, "text", 16, visible)
    u = np.append(np.random.default_rng(0).random(200_000), [0.0, np.nextafter(1, 0)])
    starts = data.at_fraction("train", u)
    assert starts.min() == 0 and starts.max() <= 50_000 - 17
    seen = np.zeros(50_000, bool)
    for start_of_window in np.unique(starts):
        seen[start_of_window:start_of_window + 17] = True
    assert seen.sum() == pytest.approx(max(50_000 * visible, 17), rel=0.02, abs=17)
    thirds = [seen[i: i + 16_666].sum() for i in (0, 16_667, 33_334)]
    if visible == 0.3:  # 13 stretches
        assert min(thirds) > 0.7 * max(thirds)
    assert data.at_fraction("val", u).max() == 500 - 17  # other splits as before
    example_set(tmp_path / "qa", 1, 2, n=4000)
    data = TokenSet(tmp_path, "qa", 40, visible)
    starts = np.unique(data.at_fraction("train", u))
    rows = data.splits["train"].row_starts
    assert np.isin(starts, rows).all()
    assert len(starts) == pytest.approx(max(1, len(rows) * visible), abs=5)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A good set, `a`, and one for each thing that can be wrong with a set."""
    data = tmp_path_factory.mktemp("broken") / "data"
    ids = markov(1, 3000)
    good = {"train": ids[:1000], "val": ids[1000:2000], "test": ids[2000:]}
    for name in ("a", "b", "odd", "fewer", "lost", "unweighed", "unknown", "uncounted", "meta"):
        write_set(data / name, good)
    write_set(data / "short", good | {"val": ids[:16]})  # block_size is 16, so it takes 17
    write_set(data / "empty", good | {"train": ids[:0]})
    write_set(data / "gpt", good, tokenizer="gpt2")
    write_set(data / "outside", good | {"train": np.append(ids[:999] * 0 + 63, 64)})
    for name, cut in (("odd", 1), ("fewer", 100)):
        path = data / name / "train.bin"
        path.write_bytes(path.read_bytes()[:-cut])
    (data / "lost" / "test.bin").unlink()
    wrong_counts = {"unweighed": {"bytes": 0}, "unknown": {"learned": None},
                    "uncounted": {"documents": None}}
    for name, wrong in wrong_counts.items():
        meta = json.loads((data / name / "meta.json").read_text())
        meta["splits"]["test"] |= wrong
        (data / name / "meta.json").write_text(json.dumps(meta))
    example_set(data / "endless", 1, 2, n=60)
    path = data / "endless" / "train.bin"
    path.write_bytes(bytes(path.stat().st_size))
    (data / "meta" / "meta.json").write_text('{"tokenizer": ')
    return data


DAMAGED = "meta.json is not what prepare_data.py writes"


@pytest.mark.parametrize("name, parts", {
    "nowhere": ["no set 'nowhere'", "there: a, b, empty", "prepare_data.py nowhere=PATH"],
    "short": ["short/val.bin: 16 tokens", "needs 17"],
    "empty": ["empty/train.bin: 0 tokens"],
    "odd": ["odd/train.bin: 1999 bytes", "1000 tokens of 2 bytes", "--overwrite"],
    "fewer": ["fewer/train.bin: 1900 bytes", "--overwrite"],
    "lost": ["lost/test.bin: missing", "--overwrite"],
    "meta": [f"meta/{DAMAGED} (JSONDecodeError", "--overwrite"],
    "unweighed": [f"unweighed/{DAMAGED} (ZeroDivisionError"],
    "uncounted": [f"uncounted/{DAMAGED}"],
    "unknown": [f"unknown/{DAMAGED} (TypeError"],
    "endless": ["endless/train.bin does not end in <|endoftext|>", "--overwrite"],
    "gpt": ["'gpt' was made with the tokenizer gpt2 (64 ids), 'a' with synthetic (64)",
            "the same --tokenizer"],
}.items())
def test_sets_that_cannot_be_used(broken, capsys, name, parts):
    """As a source and as a target."""
    for names, targets in ((["a", name], ["a"]), (["a"], [name])):
        line = line_of(capsys, load_sets, broken, names, targets, 16)
        for part in parts:
            assert part in line, line


def test_no_data_and_the_samples_names(broken, capsys):
    line = line_of(capsys, load_sets, "nothing", ["a"], ["a"], 16)
    assert "there: none" in line
    for name in ("python", "describe", "numpy_tasks"):
        line = line_of(capsys, load_sets, broken, ["a", name], ["a"], 16)
        assert line.endswith(f"with: python prepare_data.py --data_dir {broken}\n"), line


def test_an_id_outside_the_vocabulary(broken, capsys):
    """It is only seen when its window is drawn."""
    data = TokenSet(broken, "outside", 16)
    data.windows("train", np.array([0]))
    line = line_of(capsys, data.windows, "train", np.array([0, 983]))
    assert "token id 64, outside the vocabulary of 64" in line and "--overwrite" in line


@pytest.mark.parametrize("path", ["a/train.bin", "a/meta.json"])
def test_unreadable_sets(broken, monkeypatch, capsys, path):
    monkeypatch.chdir(broken.parent)
    prepare_data.mapped.cache_clear()
    deny(monkeypatch, f"data/{path}")
    line = line_of(capsys, load_sets, "data", ["a"], ["a"], 16)
    assert f"cannot read data/{path}: Permission denied" in line and "--overwrite" not in line


def in_a_new_process(code, cwd, limit):
    """Runs Python code that knows prepare_data, under one of the system's limits."""
    import resource
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, check=True,
                   preexec_fn=lambda: resource.setrlimit(limit[0], (limit[1], limit[1])))


def test_ninety_sets_with_256_files_open(tmp_path):
    import resource
    lengths = {"train": 300, "val": 60, "test": 60}
    ones = {split: np.ones(n, np.uint8) for split, n in lengths.items()}
    for k in range(90):
        ids = markov(k, 300)
        splits = {"train": ids, "val": ids[:60], "test": ids[:60]}
        write_set(tmp_path / "data" / f"s{k}", splits, masks=ones)
    code = """
import numpy as np
from prepare_data import SPLITS, gather, load_sets
names = [f"s{k}" for k in range(90)]
sets = list(load_sets("data", names, names, 16).values())
for split in SPLITS:
    x, y = gather(sets, split, np.arange(90), np.full(90, 0.5))
    assert x.shape == y.shape == (90, 16)
"""
    in_a_new_process(code, tmp_path, (resource.RLIMIT_NOFILE, 256))


def test_a_sparse_file_of_20_gb_is_not_read_through(tmp_path):
    """A hole reads as zeros; only the windows drawn are touched."""
    import resource
    zeros = np.zeros(2000, np.uint8)
    write_set(tmp_path / "data" / "big", {"train": zeros, "val": zeros, "test": zeros})
    path = tmp_path / "data" / "big" / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["tokens"] = 10**10
    path.write_text(json.dumps(meta))
    os.truncate(tmp_path / "data" / "big" / "train.bin", 2 * 10**10)
    code = """
import numpy as np
from prepare_data import TokenSet, gather
data = TokenSet("data", "big", 16)
x, y = gather([data], "train", np.zeros(100, np.int64), np.random.default_rng(0).random(100))
assert x.shape == (100, 16) and not x.any()
assert len(data.spread("train", 1000)) == 62
assert data.windows("train", data.spread("train", 1000))[0].shape == (62, 16)
"""
    limit = 6 << 30  # of addresses, beside the map itself
    in_a_new_process(code, tmp_path, (resource.RLIMIT_AS, 2 * 10**10 + limit))


# ---- the sets of a run ---------------------------------------------------------------------------

def test_load_sets_opens_each_once_in_order(broken):
    sets = load_sets(broken, ["b", "a"], ["a", "b"], 16)
    assert list(sets) == ["b", "a"]
    assert all(s.visible == 1 and s.block_size == 16 for s in sets.values())
    assert len(sets["a"].digest) == 6 and sets["a"].digest[0] == sets["b"].digest[0]


def warnings_of(stdout):
    """{(target, its split, source): share in %}"""
    found = re.findall(r"warning: about (\d+)% of the (\w+) split of target (\w+) is in the train "
                       r"split of source (\w+)", stdout)
    return {(target, split, source): int(share) for share, split, target, source in found}


def test_shared_text_is_printed_with_its_share(tmp_path, capsys):
    """The same documents in sets of other fractions, and another seed: the share is true."""
    texts = longer_corpus(2500)
    write_jsonl(tmp_path / "all.jsonl", texts)
    write_jsonl(tmp_path / "half.jsonl", texts[:1200] + longer_corpus(1200, seed=5))
    wide = ["--val_fraction", "0.4", "--test_fraction", "0.4"]
    run("prepare_data.py", "all=all.jsonl", cwd=tmp_path)
    run("prepare_data.py", "wide=all.jsonl", "half=half.jsonl", *wide, cwd=tmp_path)
    run("prepare_data.py", "other=half.jsonl", "--seed", "2", cwd=tmp_path)
    targets = ["wide", "half", "other"]
    load_sets(tmp_path / "data", ["all"], targets, 16)
    printed = warnings_of(capsys.readouterr().out)
    train = split_documents(tmp_path / "data" / "all")["train"]
    for target in targets:
        found = split_documents(tmp_path / "data" / target)
        for split in ("val", "test"):
            true = 100 * len(found[split] & train) / len(found[split])
            assert true > 30, (target, split)
            assert abs(printed[target, split, "all"] - true) < 1, (target, split, true, printed)
    load_sets(tmp_path / "data", ["all"], ["all"], 16)
    assert capsys.readouterr().out == ""

    # an earlier version kept text in meta.json, and no file: such a set is used without a check
    path = tmp_path / "data" / "half" / "meta.json"
    meta = json.loads(path.read_text())
    for split in SPLITS:
        meta["splits"][split]["sketch"] = "0123456789ab 123456789abc"
    path.write_text(json.dumps(meta))
    load_sets(tmp_path / "data", ["all"], ["half"], 16)
    assert capsys.readouterr().out == ""
    sketch = tmp_path / "data" / "wide" / "val.sketch.bin"
    sketch.write_bytes(sketch.read_bytes()[:-1])
    line = line_of(capsys, load_sets, tmp_path / "data", ["all"], ["wide"], 16)
    assert "wide/val.sketch.bin: " in line and "--overwrite" in line


def poems(n, seed=0):
    """n texts of 8 lines of 12 words."""
    rng = np.random.default_rng(seed)
    words = np.array("river stone cloud paper engine garden silver morning number letter".split())
    texts = []
    for _ in range(n):
        lines = words[rng.integers(0, 10, (8, 12))]
        texts.append("".join(" ".join(line) + "\n" for line in lines))
    return texts


def squeezed(text):
    return "".join(text.split())


def test_text_in_another_dress_stays_in_its_split_or_is_found(tmp_path, monkeypatch, capsys):
    """A target against sources that hold its documents: with other line ends and such, no
    document changes its split; under a header, and joined into one file, the share is printed."""
    monkeypatch.chdir(tmp_path)
    texts = poems(1000)
    write_jsonl(tmp_path / "target.jsonl", texts)
    names = ["same", "crlf", "mark", "stripped", "blank", "tabs", "doubled"]
    for name, *dressed in zip(names, *map(dresses, texts)):
        write_jsonl(tmp_path / f"{name}.jsonl", dressed)
    write_jsonl(tmp_path / "header.jsonl", [f"# copyright 2024\n{text}" for text in texts])
    (tmp_path / "book.txt").write_text("".join(texts))
    write_jsonl(tmp_path / "half.jsonl",
                [f"# a header\n{text}" for text in texts[:500] + poems(500, seed=1)])
    wide = ["--val_fraction", "0.45", "--test_fraction", "0.45"]
    prepare_data.main(["target=target.jsonl", *wide])
    recut = ["header", "book", "half"]
    prepare_data.main(["book=book.txt", *(f"{name}={name}.jsonl" for name in names + recut[::2])])
    capsys.readouterr()

    # sets with the same fractions
    prepare_data.main(["narrow=target.jsonl"])
    load_sets(tmp_path / "data", names, ["narrow"], 16)
    assert "warning" not in capsys.readouterr().out

    load_sets(tmp_path / "data", recut, ["target"], 16)
    printed = warnings_of(capsys.readouterr().out)
    assert len(printed) == 6
    for (target, split, name), share in printed.items():
        train = "|".join(map(squeezed, documents(tmp_path / "data" / name, "train")))
        found = documents(tmp_path / "data" / target, split)
        true = 100 * sum(squeezed(text) in train for text in found) / len(found)
        assert abs(share - true) < 2, (split, name, share, true)
        assert (30 if name == "half" else 75) < true < 97


def hashes_in_a_loop(units, with_single_lines):
    """The reference of line_hashes(): what is hashed, in integers without end."""
    def number(line):
        total = 0
        for i, byte in enumerate(line, 1):
            total += int(prepare_data.BYTE_CODES[byte]) * pow(prepare_data.HASH_BASE, i, 2**64)
        return int(prepare_data.mixed(np.array([total % 2**64], np.uint64))[0])

    found = []
    for unit in units:
        text = unit.replace(". ", ".\n").encode()
        text = text.translate(None, b" \t\r\v\f")
        lines = [number(line) for line in text.split(b"\n") if len(line) >= prepare_data.LINE]
        pairs = [(one * prepare_data.HASH_BASE + two) % 2**64 for one, two in zip(lines, lines[1:])]
        found += prepare_data.mixed(np.array(pairs, np.uint64)).tolist()
        if len(lines) == 1 or with_single_lines:
            found += lines
        if not lines:
            found.append(number(text))
    return sorted(found)


def test_line_hashes_are_those_of_a_loop():
    units = [*corpus(5), *longer_corpus(2), "", "short", "a\nb\n", "\n" + poems(1)[0],
             "One sentence that is long. Another one of some length. No.", "two words " * 40,
             "a\0b" + "c" * 30, "ünï ☃ 漢字 ünï ☃ 漢字\r\n\r\nünï ☃ 漢字 ünï ☃ 漢字"]
    for with_single_lines in (False, True):
        for some in (units, units[::-1], units[4:5]):
            found = prepare_data.line_hashes([u.encode() for u in some], with_single_lines)
            parts = "\0".join(some).split("\0")  # \0 ends a unit
            assert sorted(found.tolist()) == hashes_in_a_loop(parts, with_single_lines)
    # whatever is before a text, its hashes are the same
    text = poems(1)[0].encode()
    alone = prepare_data.line_hashes([text], False).tolist()
    among = prepare_data.line_hashes([b"x" * 70_000, text], False).tolist()
    assert len(alone) == 7 and set(alone) <= set(among)


@pytest.mark.parametrize("n_some, n_others, shared", [
    (500, 400, 100), (500, 50_000, 250), (30_000, 40_000, 9_000), (3_000, 3_000, 0),
    (3_000, 90_000, 3_000)])
def test_overlap_estimates_the_share_from_sketches(tmp_path, monkeypatch, n_some, n_others, shared):
    """Sketches of a bounded size against all hashes, within four standard errors of the number
    compared."""
    monkeypatch.setattr(prepare_data, "SKETCH", 4096)
    rng = np.random.default_rng(n_some + n_others)
    hashes = rng.integers(0, 2**64, n_some + n_others - shared, np.uint64)

    def sketch(hashes):
        writer = prepare_data.SplitWriter(tmp_path, "x", np.uint16, False)
        for part in np.array_split(np.append(hashes, hashes[:100]), 7):
            writer.add_to_sketch(part)
        size = writer.finish()["sketch"]
        writer.close()
        found = np.fromfile(tmp_path / "x.sketch.bin", np.uint64)
        assert found.tolist() == sorted(hashes.tolist())[:4096] and len(found) == size
        return found
    some = hashes[:n_some]
    others = hashes[n_some - shared:]
    true = shared / n_some
    compared = min(n_some, 4096 * min(1, n_some / n_others))
    error = 4 * math.sqrt(true * (1 - true) / compared)
    assert abs(overlap(sketch(some), sketch(others)) - true) <= error + 1e-9
    nothing = np.zeros(0, np.uint64)  # sets of an earlier version
    assert overlap(nothing, nothing) == overlap(sketch(some), nothing) == 0


# ---- the sample ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    run("prepare_data.py", cwd=folder)
    return folder


def test_sample(sample, capsys):
    """Each set is there, of a fair size, and a second start keeps it."""
    sizes = {}
    for name in ("python", "cpp", "prose", "math", "legal", "noise", "numpy"):
        splits = json.loads((sample / "data" / name / "meta.json").read_text())["splits"]
        sizes[name] = sum(splits[split]["tokens"] for split in SPLITS)
        assert min(splits[split]["tokens"] for split in SPLITS) > 2000, name
    legal = sizes.pop("legal")
    assert all(1.5e6 < size < 4.1e6 for size in sizes.values()) and legal < 1e6, (sizes, legal)
    for name in ("describe", "implement", "declare", "numpy_tasks"):
        meta = json.loads((sample / "data" / name / "meta.json").read_text())
        train = meta["splits"]["train"]
        assert meta["schema"] == "prompt/response"
        assert 0.1 < train["learned"] / train["tokens"] < 0.8, name
        assert sum(meta["splits"][split]["documents"] for split in SPLITS) > 1500, name
    # They share some single lines, and numpy_tasks is made of numpy; but no source holds a target.
    for target, sources in (("numpy", prepare_data.SAMPLE_SOURCES),
                            ("numpy_tasks", prepare_data.SAMPLE_SOURCES),
                            ("numpy_tasks", ("describe", "implement", "declare"))):
        load_sets(sample / "data", sources, [target], 256)
    assert "warning" not in capsys.readouterr().out
    kept = run("prepare_data.py", cwd=sample)
    assert kept.count("is there already, kept") == 11
    assert "other settings" in refused("prepare_data.py", "--seed", "3", cwd=sample)


def test_the_samples_name_is_taken(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(corpus(2000)))
    run("prepare_data.py", "math=mine.txt", cwd=tmp_path)
    for flags in ([], ["--overwrite"]):
        line = refused("prepare_data.py", *flags, cwd=tmp_path)
        assert "data/math was made from mine.txt" in line and "--data_dir" in line
    assert os.listdir(tmp_path / "data") == ["math"]


def test_prepare_sample_only_if_there_is_none(sample, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(prepare_data, "main", calls.append)
    prepare_data.prepare_sample(sample / "data")
    assert calls == [] and capsys.readouterr().out == ""
    prepare_data.prepare_sample(tmp_path / "data")
    assert calls == [["--data_dir", str(tmp_path / "data")]]
    assert "no sample in" in capsys.readouterr().out


def test_sample_sources_are_those_that_are_prepared(sample, tmp_path):
    assert prepare_data.sample_sources(sample / "data") == list(prepare_data.SAMPLE_SOURCES)
    assert prepare_data.sample_sources(tmp_path / "data") == []
    for name in ("noise", "cpp", "numpy"):
        chain_set(tmp_path / "data" / name, 1)
    assert prepare_data.sample_sources(tmp_path / "data") == ["cpp", "noise"]


# These two run fastmix.py and plot_mixture.py on the sample.

SMALL = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--max_steps", 2, "--eval_tokens", 2048]


def test_the_readmes_main_command_shortened(sample):
    stdout = run("fastmix.py", *SMALL, cwd=sample, picture=True)
    assert "sources python,cpp,prose,math,legal,noise; target numpy; searching" in stdout
    run("fastmix.py", "--mixture", "out/mixture.json", "--out_dir", "out-found", *SMALL, cwd=sample)
    assert (sample / "out" / "mixture.json").exists()
    assert (sample / "out" / "mixture.png").stat().st_size > 20_000
    stdout = run("plot_mixture.py", "out", cwd=sample)
    assert "target numpy: test loss" in stdout
    assert (sample / "out" / "mixture.png").stat().st_size > 20_000


def test_the_readmes_instruction_commands_shortened(sample):
    """(a) instructions toward a fourth kind, from a checkpoint; (b) pre-training sources toward
    instructions."""
    run("fastmix.py", *SMALL, "--out_dir", "base", cwd=sample)
    sets = ["--sources", "describe,implement,declare", "--target", "numpy_tasks"]
    short = ["--block_size", 256, "--batch_size", 8, "--max_steps", 2, "--eval_tokens", 2048]
    stdout = run("fastmix.py", "--init_from", "base/ckpt.pt", *sets, *short, "--out_dir", "tasks",
                 cwd=sample)
    assert "learned token" in stdout and "warning" not in stdout
    run("fastmix.py", "--target", "numpy_tasks", *SMALL, *short, "--out_dir", "toward", cwd=sample)
    assert json.loads((sample / "toward" / "mixture.json").read_text())["target"] == ["numpy_tasks"]


def test_overwrite_replaces_prepared_sets_alone(tmp_path):
    """A folder that merely has the name of a set is somebody's."""
    (tmp_path / "doc.txt").write_text("\n".join(f"line {i}" for i in range(9_000)))
    for name in ("x", "python"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    here = ("--data_dir", ".", "--overwrite")
    for sets in (["x=doc.txt"], []):
        line = refused("prepare_data.py", *sets, *here, cwd=tmp_path)
        assert "exists and is not a prepared set" in line
    for name in ("x", "python"):
        assert (tmp_path / name / "thesis.tex").read_text() == "years of work"


def test_prepared_sets_below_a_folder_are_no_text(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\n" * 50)
    assert "(6 documents" in run("prepare_data.py", "first=.", cwd=tmp_path)
    assert "(6 documents" in run("prepare_data.py", "second=.", cwd=tmp_path)
