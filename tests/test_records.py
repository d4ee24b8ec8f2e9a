"""prepare_data.py: folders of several kinds of files, packed files, Parquet, and one corpus divided
into sets by a key (--split_by)."""
import argparse
import gzip
import io
import json
import os
import sys

import numpy as np
import pytest

import prepare_data
from conftest import refused, run
from prepare_data import SPLITS
from test_prepare import (all_documents, contents, corpus, line_of, longer_corpus, peak_mb,
                          write_jsonl)


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def chats(n):
    return [{"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": f"it is {i}"}]} for i in range(n)]


# ---- folders -------------------------------------------------------------------------------------

@pytest.fixture
def code(tmp_path):
    """A folder of 40 source files."""
    for i, text in enumerate(longer_corpus(40)):
        path = tmp_path / "code" / "src" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "code"


FOREIGN = {  # JSON in a code folder that is not read, and the error of the file by itself
    "fixtures.json": ('[{"id": 1}, {"id": 2}]', "fixtures.json, record 1: no known key in it"),
    "events.jsonl": ('{"ts": 1}\n{"ts": 2}\n', "events.jsonl, line 1: no known key in it, but ts"),
    "comment.jsonl": ('// hello\n{"text": "x"}\n', "comment.jsonl, line 1: not JSON"),
    "numbers.ndjson": ("1\n2\n", "numbers.ndjson, line 1: a JSON object is needed"),
    "deep.jsonl": ('{"text": ' + 5000 * "[" + 5000 * "]" + "}", "deep.jsonl, line 1: lists within"),
    "broken.json": ('[{"text": "x"},\n {"text": ', "broken.json: not JSON"),
    "not.jsonl.gz": ("no gzip", "cannot read not.jsonl.gz (Not a gzipped file"),
    "image.png": ("\0", None),
}


def test_foreign_json_in_a_code_folder_is_left_out_by_name(code):
    (code / "package.json").write_text('{\n "name": "x"\n}\n')
    (code / "note.json").write_text('[{"text": "a record among source files"}]')
    for name, (text, _) in FOREIGN.items():
        (code / name).write_text(text)
    stdout = run("prepare_data.py", "x=code", cwd=code.parent)
    assert ("x: left out 7 files that hold no records by keys that are known or given: "
            "code/broken.json, code/comment.jsonl, code/deep.jsonl, code/events.jsonl and 3 more\n"
            ) in stdout
    assert "x: left out 1 files that are not UTF-8 text: code/image.png\n" in stdout
    assert "(42 documents)" in stdout  # settings are text as they stand
    expected = [*longer_corpus(40), '{\n "name": "x"\n}\n', "a record among source files"]
    assert all_documents(code.parent / "data" / "x") == sorted(expected)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_json_that_is_named_is_an_error(tmp_path, name):
    """And so it is in a folder that holds nothing else."""
    text, message = FOREIGN[name]
    (tmp_path / "only").mkdir()
    (tmp_path / name).write_text(text)
    (tmp_path / "only" / name).write_text(text)
    if message is None:
        message = "only: no text there"
    else:
        assert message in refused("prepare_data.py", f"x={name}", cwd=tmp_path)
        line = refused("prepare_data.py", f"x={name[:4]}*", cwd=tmp_path)
        assert message in line
        message = message.replace(name, f"only/{name}")
    ended = run("prepare_data.py", "x=only", cwd=tmp_path, status=2)
    assert message in ended and "Traceback" not in ended


def test_a_folder_of_records_and_texts_is_what_most_of_it_is(code):
    """Beside chats the texts are left out, beside source code the chats."""
    write_records(code / "few.jsonl", chats(20))
    stdout = run("prepare_data.py", "code=code", cwd=code.parent)
    assert ("code: left out 1 files of messages, since most of code is of text: code/few.jsonl\n"
            ) in stdout
    assert all_documents(code.parent / "data" / "code") == sorted(longer_corpus(40))

    hub = code.parent / "hub"
    write_records(hub / "data" / "a.jsonl", chats(300))
    (hub / "README.md").write_text("about\n")
    (hub / "infos.json").write_text('{"splits": 1}')
    stdout = run("prepare_data.py", "hub=hub", cwd=code.parent)
    assert ("hub: left out 2 files of text, since most of hub is of messages: hub/README.md, "
            "hub/infos.json\n") in stdout
    assert "(300 documents, messages, " in stdout


def test_a_key_that_is_given_decides_what_a_folder_holds(code):
    """Without it the shards hold nothing; the message of the first of them says what to do."""
    for i in range(3):
        write_jsonl(code / f"{i}.jsonl", corpus(100, seed=i), key="body")
    (code.parent / "shards").mkdir()
    for i in range(3):
        os.rename(code / f"{i}.jsonl", code.parent / "shards" / f"{i}.jsonl")
    stderr = run("prepare_data.py", "x=shards", cwd=code.parent, status=2)
    assert "error: shards/0.jsonl, line 1: no known key in it, but body" in stderr
    assert "--text_key" in stderr
    stdout = run("prepare_data.py", "x=shards", "--text_key", "body", cwd=code.parent)
    assert "(300 documents)" in stdout


def test_json_of_any_depth_is_text_or_one_line(tmp_path, monkeypatch):
    """Lists within a text are its parts; where Python stops, the message says so."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(text_key=None, prompt_key=None)
    for depth in (50, 300, 500, 900, 950, 990, 1000, 5000, 100_000):
        for value in ("[" * depth + '"x"' + "]" * depth,
                      '{"text": ' * depth + '"x"' + "}" * depth):
            (tmp_path / "x.jsonl").write_text(f'{{"text": {value}}}')
            try:
                assert prepare_data.schema_of("x.jsonl", args) == "text" and depth < 1000
            except prepare_data.BadFile as error:
                assert str(error) == "x.jsonl, line 1: lists within lists, too deep to be read"
                assert depth > 50
    assert "too deep" in refused("prepare_data.py", "x=x.jsonl", cwd=tmp_path)


def test_pipes_do_not_hang(tmp_path):
    for name in ("pipe", "pipe.jsonl", "pipe.json", "pipe.tiktoken"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "x.txt").write_text("\n".join(corpus(200)))
    for name in ("pipe", "pipe.jsonl", "pipe.json", "pipe*"):
        assert "no text there" in refused("prepare_data.py", f"x={name}", cwd=tmp_path)
    line = refused("prepare_data.py", "x=x.txt", "--tokenizer", "pipe.tiktoken", cwd=tmp_path)
    assert "--tokenizer pipe.tiktoken is not a file" in line


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """Shells expand it at the beginning of a word only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my books").mkdir()
    (tmp_path / "my books" / "x.txt").write_text("\n".join(corpus(2000)))
    prepare_data.main(["a=~/my books", "b=~/my*/*.txt", "--data_dir=~/sets"])
    assert sorted(os.listdir(tmp_path / "sets")) == ["a", "b"]
    assert str(tmp_path / "gone") in line_of(capsys, prepare_data.main, ["c=~/gone"])


# ---- .gz, .zst and Parquet -----------------------------------------------------------------------

def zstd_of(data):
    """Packed in two frames, with one between them that holds nothing to read."""
    zstandard = pytest.importorskip("zstandard")
    middle = len(data) // 2
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    first = zstandard.compress(data[:middle])
    return first + skipped + zstandard.compress(data[middle:])


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstd_of)])
def test_packed_files_hold_what_the_others_do(tmp_path, suffix, pack):
    records = [{"instruction": f"what is {i}?", "output": f"it is {i}"} for i in range(400)]
    content = {
        "a.jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "b.json": "\ufeff" + json.dumps(records, indent=1),
        "c.txt": "\r\n".join(longer_corpus(900)),
    }
    for name, text in content.items():
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}{suffix}").write_bytes(pack(text.encode()))
    (tmp_path / "folder").mkdir()
    os.rename(tmp_path / f"c.txt{suffix}", tmp_path / "folder" / f"C.TXT{suffix}")
    run("prepare_data.py", "a=a.jsonl", "b=b.json", "c=c.txt", f"pa=a.jsonl{suffix}",
        f"pb=b.json{suffix}", "pc=folder", cwd=tmp_path)
    for name in "abc":
        for split in SPLITS:
            plain = (tmp_path / "data" / name / f"{split}.bin").read_bytes()
            packed = (tmp_path / "data" / f"p{name}" / f"{split}.bin").read_bytes()
            assert plain == packed


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.txt.zst"])
def test_damaged_zst(tmp_path, name):
    """Cut short, even where a line ends, and another format."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in longer_corpus(500)).encode()
    packed = zstd_of(data)
    for damaged, part in ((packed[:-1], "ends before its last frame does"),
                          (packed[:len(packed) // 3], "ends before its last frame does"),
                          (b"PAR1" + packed, "not zstd")):
        (tmp_path / name).write_bytes(damaged)
        line = refused("prepare_data.py", f"x={name}", cwd=tmp_path)
        assert f"cannot read {name}" in line and part in line
    assert not (tmp_path / "data" / "x").exists()


def test_parquet_holds_the_same_records(tmp_path):
    """Parquet has null for the keys that a turn lacks."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    records = chats(700)
    for i, record in enumerate(records):
        record["messages"][1]["weight"] = i % 3
        record["meta"] = {"source": "ab"[i % 2]}
    texts = [{"text": text} for text in corpus(300)]
    for name, rows in (("chat", records), ("text", texts)):
        write_records(tmp_path / f"{name}.jsonl", rows)
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet",
                            row_group_size=100)
    for name in ("chat", "text"):
        run("prepare_data.py", f"{name}={name}.jsonl", f"p{name}={name}.parquet", cwd=tmp_path)
        one = contents(tmp_path / "data" / name)
        other = contents(tmp_path / "data" / f"p{name}")
        assert one.pop("meta.json") != other.pop("meta.json") and one == other and len(one) >= 3
    stdout = run("prepare_data.py", "s=chat.parquet", "--split_by", "meta.source", cwd=tmp_path)
    assert stdout.count("(350 documents, messages") == 0  # one in three has nothing to learn
    assert sorted(os.listdir(tmp_path / "data")) == ["chat", "pchat", "ptext", "s_a", "s_b", "text"]
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    line = refused("prepare_data.py", "x=bad.parquet", cwd=tmp_path)
    assert "bad.parquet: " in line and "arquet" in line.split("bad.parquet: ")[1]
    bad = {"prompt": b"x", "response": "y"}
    parquet.write_table(pyarrow.Table.from_pylist(5 * [bad]), tmp_path / "bytes.parquet")
    stdout = run("prepare_data.py", "x=bytes.parquet", cwd=tmp_path, status=2)
    assert "1 different documents" in stdout


def test_without_the_packages_a_hint(tmp_path, monkeypatch, capsys):
    """Of a file that is named, and of a folder of nothing else."""
    for package in ("compression", "zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    prepare_data.zstd_decompressors.cache_clear()
    monkeypatch.chdir(tmp_path)
    hints = {"x.parquet": "pandas.read_parquet('{}').to_json('{}.jsonl', orient",
             "x.jsonl.zst": "zstd -d {}"}
    for name, hint in hints.items():
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        (folder / name).write_bytes(b"\xff\0")
        (tmp_path / name).write_bytes(b"\xff\0")
        for path, file in ((name, name), (folder.name, f"{folder.name}/{name}")):
            line = line_of(capsys, prepare_data.main, [f"x={path}"])
            assert f"{file} is not read as it is" in line and hint.format(file, file) in line
            assert "pip install" in line
    prepare_data.zstd_decompressors.cache_clear()


def test_zstd_is_read_a_piece_at_a_time():
    """Whatever the sizes asked for, the same bytes."""
    data = "".join(corpus(3000)).encode()
    for size in (1, 7, 4096, 10**6):
        reader = prepare_data.ZstdReader(io.BytesIO(zstd_of(data)))
        found = b""
        while piece := reader.read(size if size > 1 or len(found) < 100 else 9999):
            found += piece
        assert found == data


# ---- one set for each value of a key -------------------------------------------------------------

DOMAINS = ["RedPajamaC4", "Stack Exchange", "a/../b", "ünï", 7, True]
NAMES = ["slim_RedPajamaC4", "slim_Stack_Exchange", "slim_a_.._b", "slim__n_", "slim_7",
         "slim_True"]


def mixed(n, domains=DOMAINS):
    """n documents of each domain, in turn -> (records, {domain: texts})"""
    records = []
    texts = {domain: [] for domain in domains}
    for i, text in enumerate(corpus(n * len(domains))):
        domain = domains[i % len(domains)]
        texts[domain].append(text)
        records.append({"body": text, "meta": {"set": domain}})
    return records, texts


def test_one_set_for_each_value(tmp_path):
    """As if each domain had been a file of its own, split by split; a long document as a whole."""
    records, texts = mixed(300)
    book = "".join(longer_corpus(100))
    records.insert(50, {"body": book, "meta": {"set": DOMAINS[0]}})
    texts[DOMAINS[0]].insert(9, book)
    records[70:70] = [{"body": "x", "meta": {}}, {"body": "x"}, {"body": "x", "meta": None},
                      {"body": "x", "meta": {"set": ""}}]
    records += [{"body": f"rare {i % 2}", "meta": {"set": "rare"}} for i in range(40)]
    records += [{"body": "", "meta": {"set": "empty"}}]
    write_records(tmp_path / "slim" / "a.jsonl", records[:700])
    write_records(tmp_path / "slim" / "b.jsonl", records[700:])
    stdout = run("prepare_data.py", "slim=slim/*.jsonl", "--split_by", "meta.set", "--text_key",
                 "body", cwd=tmp_path)
    assert "slim: in records, 4 records without meta.set left out\n" in stdout
    assert "slim: left out 1 records without a text to learn\n" in stdout
    assert ("slim: left out 1 values of meta.set with fewer than 3 different documents, too few "
            "for train, val and test: rare (40)\n") in stdout
    assert sorted(os.listdir(tmp_path / "data")) == sorted(NAMES)
    for i, (name, domain) in enumerate(zip(NAMES, DOMAINS)):
        assert f"  {name}" in stdout
        write_records(tmp_path / f"{i}.jsonl", [{"text": text} for text in texts[domain]])
        run("prepare_data.py", f"d{i}={i}.jsonl", cwd=tmp_path)
        one = contents(tmp_path / "data" / name)
        other = contents(tmp_path / "data" / f"d{i}")
        meta = json.loads(one.pop("meta.json"))
        expected = json.loads(other.pop("meta.json"))
        assert one == other and len(one) >= 3
        assert meta["splits"] == expected["splits"]
        assert meta["documents"] == len(texts[domain]) and meta["name"] == name
        assert meta["origin"] == f"slim/*.jsonl (meta.set {domain})"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_memory_is_flat_whatever_is_read(tmp_path, suffix):
    """Ten times the text, the same peak."""
    rng = np.random.default_rng(0)
    for name, n in (("small", 1000), ("large", 10_000)):
        rows = []
        for i in range(n):
            letters = rng.integers(97, 123, 3000, np.uint8).tobytes().decode()
            rows.append({"text": letters, "source": "abcdefg"[i % 7]})
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            continue
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if suffix == "jsonl.zst":
            data = zstd_of(data)
        path.write_bytes(data)
    small = peak_mb(tmp_path, f"small=small.{suffix}", "--split_by", "source")
    large = peak_mb(tmp_path, f"large=large.{suffix}", "--split_by", "source")
    assert large < small + 12, (small, large)


def test_values_of_examples_and_of_a_folder(tmp_path):
    """A folder's texts hold no value; a key may have its dot in its name; each set may be of a
    schema of its own."""
    rows = chats(200)
    for i, row in enumerate(rows):
        row["meta.set"] = "ab"[i % 2]
    rows += [{"text": f"document {i}", "meta.set": "c"} for i in range(50)]
    write_records(tmp_path / "hub" / "x.jsonl", rows)
    (tmp_path / "hub" / "README.md").write_text("about\n" * 9999)
    stdout = run("prepare_data.py", "q=hub", "--split_by", "meta.set", cwd=tmp_path)
    assert "q: left out 1 files that hold no records" in stdout and "hub/README.md" in stdout
    assert stdout.count("(100 documents, messages, ") == 2
    assert stdout.count("(50 documents)") == 1
    assert sorted(os.listdir(tmp_path / "data")) == ["q_a", "q_b", "q_c"]


def test_split_by_keeps_what_is_there(tmp_path):
    """A set that exists is replaced with --overwrite only, and no other is touched before."""
    records, _ = mixed(20, ["one", "two"])
    write_records(tmp_path / "x.jsonl", records)
    write_jsonl(tmp_path / "mine.jsonl", corpus(50))
    run("prepare_data.py", "s_two=mine.jsonl", "s=mine.jsonl", cwd=tmp_path)
    before = contents(tmp_path / "data" / "s_two")
    flags = ["s=x.jsonl", "--split_by", "meta.set", "--text_key", "body"]
    assert "data/s_two exists" in refused("prepare_data.py", *flags, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "data")) == ["s", "s_two"]
    assert contents(tmp_path / "data" / "s_two") == before
    run("prepare_data.py", *flags, "--overwrite", cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "data")) == ["s", "s_one", "s_two"]
    assert contents(tmp_path / "data" / "s_two") != before


SPLIT_ERRORS = {  # name: (records of 5 documents each, or arguments; parts of the message)
    "many": ([{"k": f"value {i}"} for i in range(65)],
             ["k has more than 64 values, among them 'value 0', 'value 1'", "choose a key with"]),
    "alike": ([{"k": "a b"}, {"k": "a_b"}, {"k": "c"}],
              ["'a b' of x and 'a_b' of x would both be the set x_a_b"]),
    "case": ([{"k": "ArXiv"}, {"k": "arxiv"}], ["'ArXiv' of x and 'arxiv' of x would both be"]),
    "list": ([{"k": ["a", "b"]}],
             ["line 1: --split_by k needs a text or a number, not ['a', 'b']"]),
}


@pytest.mark.parametrize("case", SPLIT_ERRORS)
def test_values_that_make_no_sets(tmp_path, case):
    values, parts = SPLIT_ERRORS[case]
    records = [{"text": f"document {i}", **values[i // 5]} for i in range(5 * len(values))]
    write_records(tmp_path / "x.jsonl", records)
    line = refused("prepare_data.py", "x=x.jsonl", "--split_by", "k", cwd=tmp_path)
    assert all(part in line for part in parts), line
    assert os.listdir(tmp_path / "data") == []


def test_split_by_needs_records_and_a_key(tmp_path):
    write_records(tmp_path / "x.jsonl", [{"text": f"document {i}"} for i in range(9)])
    (tmp_path / "x.txt").write_text("\n".join(corpus(200)))
    cases = [(["x=x.txt"], "x.txt: --split_by needs records"),
             ([], "--split_by needs NAME=PATH"),
             (["x=x.jsonl"], "x: x.jsonl has no value of k with enough documents")]
    for args, part in cases:
        stderr = run("prepare_data.py", *args, "--split_by", "k", cwd=tmp_path, status=2)
        assert stderr.startswith(f"error: {part}") and len(stderr.splitlines()) == 1


def test_two_corpora_whose_values_meet(tmp_path):
    records, _ = mixed(5, ["b_c", "c"])
    for record in records:
        record["text"] = record.pop("body")
    write_records(tmp_path / "x.jsonl", records)
    args = ["a=x.jsonl", "a_b=x.jsonl", "--split_by", "meta.set", "--overwrite"]
    line = refused("prepare_data.py", *args, cwd=tmp_path)
    assert "'b_c' of a and 'c' of a_b would both be the set a_b_c" in line
