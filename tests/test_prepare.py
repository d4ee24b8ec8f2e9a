"""prepare_data.py: round trip, splits, streaming, and its bad inputs."""
import base64
import gzip
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prepare_data
from conftest import ROOT, refused, run, start, write_set

SPLITS = ("train", "val", "test")


def tokens(folder, split):
    return np.fromfile(folder / f"{split}.bin", dtype=json.loads((folder / "meta.json").read_text())["dtype"])


def documents(folder, split, tokenizer):
    """The texts of a split, cut at <|endoftext|> and decoded."""
    ids = tokens(folder, split)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[part != tokenizer.eot_token].tolist()) for part in np.split(ids, ends)[: len(ends)]]


def corpus(n, seed=0):
    rng = np.random.default_rng(seed)
    return [f"document {i}: " + " ".join(map(str, rng.integers(0, 10**6, rng.integers(1, 60)))) + " ünï ☃ 漢字\r\n"
            for i in range(n)]


def write_jsonl(path, texts, key="text"):
    data = "".join(json.dumps({key: t, "meta": {"i": i}}) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_bytes_tokenizer_is_utf8():
    tokenizer = prepare_data.bytes_tokenizer()
    text = "def f(x):\n\treturn 'ünï ☃ 漢字 😀' <|endoftext|>\r\n" * 9 + "\0"
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    assert tokenizer.encode_ordinary(text) == list(text.encode()) == tokenizer.encode_to_numpy(
        text, disallowed_special=()).tolist()
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_round_trip(tmp_path, suffix):
    texts = corpus(400)
    write_jsonl(tmp_path / f"web{suffix}", texts, key="body")
    run("prepare_data.py", f"web=web{suffix}", "--text_key", "body", cwd=tmp_path)
    folder, tokenizer = tmp_path / "data" / "web", prepare_data.bytes_tokenizer()
    found = {split: documents(folder, split, tokenizer) for split in SPLITS}
    assert sorted(sum(found.values(), [])) == sorted(texts)
    meta = json.loads((folder / "meta.json").read_text())
    for split in SPLITS:
        counts = meta["splits"][split]
        assert counts["documents"] == len(found[split]) > 5
        assert counts["bytes"] == sum(len(t.encode()) for t in found[split])
        assert counts["tokens"] == counts["bytes"] + counts["documents"] == len(tokens(folder, split))
        assert counts["sha256"] == prepare_data.hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
    assert meta["dtype"] == "uint16" and meta["documents"] == 400 and meta["origin"] == f"web{suffix}"


def test_split_does_not_depend_on_order_and_keeps_duplicates_together(tmp_path):
    texts = corpus(300)
    write_jsonl(tmp_path / "one.jsonl", texts)
    write_jsonl(tmp_path / "two.jsonl", (texts + texts)[::-1])
    run("prepare_data.py", "one=one.jsonl", "two=two.jsonl", cwd=tmp_path)
    tokenizer = prepare_data.bytes_tokenizer()
    one, two = ({s: documents(tmp_path / "data" / n, s, tokenizer) for s in SPLITS} for n in ("one", "two"))
    for split in SPLITS:
        assert sorted(two[split]) == sorted(2 * one[split])
    assert not set(one["train"]) & set(one["val"]) and not set(one["train"]) & set(one["test"])
    run("prepare_data.py", "three=one.jsonl", "--seed", "5", cwd=tmp_path)
    assert documents(tmp_path / "data" / "three", "val", tokenizer) != one["val"]


def test_folders_files_and_globs(tmp_path):
    for i, text in enumerate(corpus(150)):
        path = tmp_path / "src" / f"d{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "src" / ".git").mkdir()
    (tmp_path / "src" / ".git" / "index").write_bytes(b"\xff\xfe")  # hidden, so never read
    run("prepare_data.py", "folder=src", "glob=src/**/*.txt", cwd=tmp_path)
    for split in SPLITS:
        assert sorted(documents(tmp_path / "data" / "folder", split, prepare_data.bytes_tokenizer())) == sorted(
            documents(tmp_path / "data" / "glob", split, prepare_data.bytes_tokenizer()))


def test_one_long_document_is_divided_by_the_page(tmp_path):
    text = "".join(f"line {i} of a long book\n" for i in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    assert "(1 documents)" in run("prepare_data.py", "book=book.txt", cwd=tmp_path)
    found = {s: documents(tmp_path / "data" / "book", s, prepare_data.bytes_tokenizer()) for s in SPLITS}
    lines = {s: "".join(found[s]).splitlines() for s in SPLITS}
    assert sorted(sum(lines.values(), [])) == sorted(text.splitlines())  # each line whole, and in one split only
    assert all(0.02 < len(lines[s]) / 20_000 < 0.1 for s in ("val", "test"))


def test_merging_tokenizers_and_wide_ids(tmp_path):
    """A .tiktoken file whose vocabulary needs 32 bits; the text must come back through it."""
    ranks = [bytes([i]) for i in range(256)] + [b" %05d" % i for i in range(70_000)]
    (tmp_path / "big.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    texts = corpus(200)
    write_jsonl(tmp_path / "web.jsonl", texts)
    run("prepare_data.py", "web=web.jsonl", "--tokenizer", "big.tiktoken", cwd=tmp_path)
    meta = json.loads((tmp_path / "data" / "web" / "meta.json").read_text())
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_257 and meta["tokenizer"].startswith("big.tiktoken:")
    tokenizer = prepare_data.file_tokenizer(tmp_path / "big.tiktoken")
    assert sorted(sum((documents(tmp_path / "data" / "web", s, tokenizer) for s in SPLITS), [])) == sorted(texts)


def test_silent_network_ends_in_one_line(monkeypatch, capsys, tmp_path):
    """A proxy that accepts and never answers, as some firewalls do: tiktoken alone would wait for ever."""
    monkeypatch.setattr(prepare_data, "NETWORK_TIMEOUT", 1)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(SystemExit) as ended:
            prepare_data.get_tokenizer("gpt2")
    line = capsys.readouterr().err
    assert ended.value.code == 2 and "--tokenizer bytes" in line and "TIKTOKEN_CACHE_DIR" in line
    assert "no answer in 1 s" in line and len(line.splitlines()) == 1


def peak_mb(cwd, *args):
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT / "prepare_data.py"), *args], cwd=cwd, text=True,
                         capture_output=True, check=True).stdout
    return int(out.splitlines()[-1]) / 1024


def test_memory_is_flat(tmp_path):
    """Eight times the text, the same peak: for one long file without a line end, and for JSON lines."""
    for name, mb in (("small", 4), ("large", 32)):
        (tmp_path / f"{name}.txt").write_bytes(np.random.default_rng(0).integers(97, 123, mb << 20, np.uint8).tobytes())
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            for i in range(mb * 256):
                f.write(json.dumps({"text": f"{i} " * 512}) + "\n")
    for suffix in ("txt", "jsonl"):
        small, large = (peak_mb(tmp_path, f"{n}-{suffix}={n}.{suffix}") for n in ("small", "large"))
        assert large < small + 16, (suffix, small, large)


def test_bad_input(tmp_path):
    texts = corpus(150)
    write_jsonl(tmp_path / "good.jsonl", texts)
    good = (tmp_path / "good.jsonl").read_text().splitlines()
    for name, line in (("key", '{"content": "x"}'), ("type", '{"text": 5}'), ("json", '{"text": "x"'), ("list", "[1]")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*good[:99], line, *good[99:]]))
    (tmp_path / "latin.txt").write_bytes(b"a" * 20_000 + "né".encode("latin-1") + b" b" * 9)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "n\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(good).encode())[:-100])
    (tmp_path / "tiny.txt").write_text("hello\n")
    (tmp_path / "void.txt").write_text("")
    (tmp_path / "bad.tiktoken").write_text("!!! x\n")
    (tmp_path / "file").write_text("")
    run("prepare_data.py", "there=good.jsonl", cwd=tmp_path)
    cases = {
        "key.jsonl": (["x=key.jsonl"], "key.jsonl, line 100: no known key in it, but content; known are text, messages"),
        "type": (["x=type.jsonl"], "type.jsonl, line 100"),
        "json": (["x=json.jsonl"], "json.jsonl, line 100: not JSON"),
        "list": (["x=list.jsonl"], "list.jsonl, line 100"),
        "latin": (["x=latin.txt"], "latin.txt: not UTF-8 at byte 20001"),
        "latin jsonl": (["x=latin.jsonl"], "latin.jsonl, line 1: not UTF-8"),
        "cut gzip": (["x=cut.jsonl.gz"], "cannot read cut.jsonl.gz (Compressed file ended"),
        "tiny": (["x=tiny.txt"], "x: 1 different documents", "too few for train, val and test"),
        "void": (["x=void.txt"], "x: void.txt holds no text"),
        "missing": (["x=gone"], "gone: no text there"),
        "no name": (["good.jsonl"], "is not NAME=PATH"),
        "bad name": (["../x=good.jsonl"], "is not NAME=PATH"),
        "twice": (["x=good.jsonl", "x=key.jsonl"], "the name x is given twice"),
        "there": (["there=good.jsonl"], "data/there exists", "--overwrite"),
        "fractions": (["x=good.jsonl", "--val_fraction", "0.7", "--test_fraction", "0.4"], "--val_fraction 0.7"),
        "no tokenizer file": (["x=good.jsonl", "--tokenizer", "gone.tiktoken"], "gone.tiktoken cannot be read: No such"),
        "bad tokenizer file": (["x=good.jsonl", "--tokenizer", "bad.tiktoken"], "bad.tiktoken, line 1"),
        "unknown tokenizer": (["x=good.jsonl", "--tokenizer", "nope"], "--tokenizer bytes"),
        "not a folder": (["x=good.jsonl", "--data_dir", "file"], "cannot write"),
    }
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda case: refused("prepare_data.py", *case[0], cwd=tmp_path), cases.values())
        for (case, (_, *parts)), line in zip(cases.items(), lines):
            for part in parts:
                assert part in line, f"{case}: {line}"
    assert sorted(os.listdir(tmp_path / "data")) == ["there"]  # no part of a failed set is left


def test_killed_or_full_leaves_no_half_set(tmp_path):
    import resource
    (tmp_path / "big.txt").write_text("".join(f"some words in line {i}\n" for i in range(1_000_000)))
    run("prepare_data.py", "x=big.txt", "--tokenizer", "bytes", cwd=tmp_path)
    before = {s: (tmp_path / "data" / "x" / f"{s}.bin").read_bytes() for s in SPLITS}
    line = refused("prepare_data.py", "x=big.txt", "--seed", "2", "--overwrite", cwd=tmp_path,
                   limit=(resource.RLIMIT_FSIZE, 1 << 20))
    assert "cannot write" in line and "File too large" in line
    process = start("prepare_data.py", "x=big.txt", "--seed", "2", "--overwrite", cwd=tmp_path)
    while not (tmp_path / "data" / ".x.partial" / "train.bin").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert {s: (tmp_path / "data" / "x" / f"{s}.bin").read_bytes() for s in SPLITS} == before
    run("prepare_data.py", "x=big.txt", "--seed", "2", "--overwrite", cwd=tmp_path)
    assert {s: (tmp_path / "data" / "x" / f"{s}.bin").read_bytes() for s in SPLITS} != before
    assert os.listdir(tmp_path / "data") == ["x"]


def test_windows_of_text(tmp_path):
    """Where sequences of text begin, and what of a split an evaluation looks at."""
    ids = np.arange(100, dtype=np.uint8)
    write_set(tmp_path / "d", {"train": ids, "val": ids[:30], "test": ids[:9]}, 128)
    data = prepare_data.TokenSet(tmp_path, "d", 8)
    x, y = data.windows("train", np.array([0, 91, 5]))
    assert np.array_equal(x[:, 1:], y[:, :-1]) and x[:, 0].tolist() == [0, 91, 5] and y[1, -1] == 99
    assert data.at_fraction("train", np.array([0.0, np.nextafter(1.0, 0)])).tolist() == [0, 91]  # any that fits
    assert data.spread("val", 10**6).tolist() == [0, 8, 16] and data.spread("test", 10**6).tolist() == [0]
    assert data.spread("train", 3 * 8).tolist() == [0, 48, 88]  # evenly, from the first to the last
    assert data.spread("train", 1).tolist() == [0]
    assert (data.density("train"), data.available("train"), data.tokens_per_byte("val")) == (1, 100, 1)
    x, y = prepare_data.gather([data, data], "val", np.array([0, 1, 1]), np.array([0.0, 0.5, 0.99]))
    assert x[:, 0].tolist() == [0, 11, 21]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    run("prepare_data.py", cwd=folder)
    return folder


def test_sample(sample):
    """The embedded sample: each set there, of a fair size, numpy's text in none of the sources, and repeatable."""
    sizes = {}
    for name in ("python", "cpp", "prose", "math", "legal", "noise", "numpy"):
        splits = json.loads((sample / "data" / name / "meta.json").read_text())["splits"]
        sizes[name] = sum(splits[s]["tokens"] for s in SPLITS)
        assert min(splits[s]["tokens"] for s in SPLITS) > 2000, name
    assert all(1.5e6 < sizes[n] < 4.1e6 for n in sizes if n != "legal") and sizes["legal"] < 1e6, sizes
    for name in ("describe", "implement", "declare", "numpy_tasks"):
        meta = json.loads((sample / "data" / name / "meta.json").read_text())
        learned = meta["splits"]["train"]["learned"] / meta["splits"]["train"]["tokens"]
        assert meta["schema"] == "prompt/response" and 0.1 < learned < 0.8, (name, learned)
        assert sum(meta["splits"][s]["documents"] for s in SPLITS) > 1500, name
    kept = run("prepare_data.py", cwd=sample)
    assert kept.count("is there already, kept") == 11
    assert "other settings" in refused("prepare_data.py", "--seed", "3", cwd=sample)


SMALL = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--max_steps", 2, "--eval_tokens", 2048]


def test_the_readmes_main_command_shortened(sample):
    stdout = run("fastmix.py", *SMALL, cwd=sample)
    assert "sources python,cpp,prose,math,legal,noise; target numpy; searching" in stdout
    run("fastmix.py", "--mixture", "out/mixture.json", "--out_dir", "out-found", *SMALL, cwd=sample)
    run("fastmix.py", "--mixture", "out/log.jsonl", "--out_dir", "out-replayed", *SMALL, cwd=sample)
    assert (sample / "out" / "mixture.json").exists()
    stdout = run("plot_mixture.py", "out", cwd=sample)
    assert "target numpy: test loss" in stdout
    assert (sample / "out" / "mixture.png").stat().st_size > 20_000


def test_the_readmes_instruction_commands_shortened(sample):
    """(a) instructions toward a fourth kind, from a checkpoint; (b) pre-training sources toward instructions."""
    run("fastmix.py", *SMALL, "--out_dir", "base", cwd=sample)
    sets = ["--sources", "describe,implement,declare", "--target", "numpy_tasks"]
    short = ["--block_size", 256, "--batch_size", 8, "--max_steps", 2, "--eval_tokens", 2048]
    stdout = run("fastmix.py", "--init_from", "base/ckpt.pt", *sets, *short, "--out_dir", "tasks", cwd=sample)
    assert "nats a learned token" in stdout and "warning" not in stdout
    run("fastmix.py", "--target", "numpy_tasks", *SMALL, *short, "--out_dir", "toward", cwd=sample)
    assert json.loads((sample / "toward" / "mixture.json").read_text())["target"] == ["numpy_tasks"]
