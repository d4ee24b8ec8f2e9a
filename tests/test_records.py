"""Which files and records prepare_data.py reads, what becomes of them, and what it says of it."""
import gzip
import itertools
import json
import os
import sys

import numpy as np
import pytest

from prepare_data import FORMATS, SPLITS, TokenSet, read_record
from test_prepare import here  # noqa: F401  a fixture
from test_prepare import (all_documents, corpus, documents, error_of, meta_of, prepare,
                          write_records, write_texts)


class Args:
    formats = FORMATS
    split_by = ""


# ---- a record, as the model reads it -------------------------------------------------------------

def message(role, content, **more):
    return {"role": role, "content": content, **more}


ASK = message("user", "2 + 2?")
ANSWER = message("assistant", "4")
CHAT = "user:\n2 + 2?\nassistant:\n[4]"
NOT_READ = "keys of the records that are not read"

# {name: (record, what the model reads with [what is learned], what is noted of it)}
RECORDS = {
    "text in paragraphs": ({"text": ["One.", None, "Two."]}, "[One.\nTwo.]", []),
    "a number": ({"text": 5, "id": 0}, "[5]", [(NOT_READ, "id")]),
    "prompt, response": ({"prompt": "2 + 2 =", "response": 4}, "2 + 2 =\n[4]", []),
    "a space at the end": ({"prompt": "A: ", "completion": "b \n"}, "A: \n[b ]", []),
    "no prompt": ({"prompt": "", "completion": "b"}, "[b]", []),
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, "i\nx\n[o]", []),
    "history": ({"system": "s", "history": [["q", "a"]], "instruction": "i", "output": "o"},
                "s\nq\na\ni\n[o]", []),
    "chat": ({"messages": [ASK, ANSWER]}, CHAT, []),
    "sharegpt": ({"conversations": [{"from": "human", "value": "2 + 2?"},
                                    {"from": "gpt", "value": "4"}]}, CHAT, []),
    "content in parts": ({"messages": [
        message("user", [{"type": "image"}, {"type": "text", "text": "2 + 2?"}]), ANSWER]},
        CHAT, [("objects without a text", "image")]),
    "an answer in the prompt": ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
                                f"user:\n2 + 2?\nassistant:\n4\n{CHAT}", []),
    "turns": ({"messages": [ASK, message("assistant", "4 "), message("tool", "ok"), ANSWER]},
              "user:\n2 + 2?\nassistant:\n[4 \n]tool:\nok\nassistant:\n[4]",
              [("messages that are only read, by role", "tool")]),
    "a call": ({"messages": [ASK, message("assistant", "", tool_calls=[{"a": 1}]), ANSWER]}, CHAT,
               [("keys of messages that are not read", "tool_calls")]),
    "marked as not to learn": ({"messages": [ASK, message("assistant", "5", train=False), ASK,
                                              message("assistant", "4", weight=1)]},
                               f"user:\n2 + 2?\nassistant:\n5\n{CHAT}",
                               [("messages that are only read, by role", "assistant")]),
    "null and NaN choose no keys": ({"messages": None, "prompt": "p", "response": float("nan"),
                                     "text": "t"}, "[t]", [(NOT_READ, "prompt")]),
    "nothing but null": ({"text": None, "id": 7}, "", []),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    record, expected, expected_notes = RECORDS[name]
    _, parts, notes = read_record(record, Args)
    read = "".join(f"[{text}]" if learned else text for text, learned in parts)
    assert read == expected
    notes = [note for note in notes if note[1] != "user"]  # whose messages are only read anyway
    assert sorted(notes) == sorted(expected_notes)


@pytest.mark.parametrize("record, text", [
    ({"input": "i", "output": "o"}, "no known keys among input, output; say which to read by"),
    ({"messages": ["hello"]}, "a message of a chat needs role and content"),
    (["text"], "a JSON object is needed"),
])
def test_records_that_are_refused(record, text):
    with pytest.raises(ValueError, match=text):
        read_record(record, Args)


# ---- a set of examples ---------------------------------------------------------------------------

def test_masks_counts_and_what_is_printed(here, capsys):
    rows = []
    for i in range(400):
        rows.append({"messages": [message("user", f"what is ☃ {i}?"),
                                  message("assistant", f"ü {i * i}")], "id": i + 1})
    write_records(here / "qa.jsonl", rows + [{"messages": None}] * 3)
    prepare("qa=qa.jsonl")
    out = capsys.readouterr().out
    assert "its first example\n    read    'user:\\n'\n    read    'what is" in out
    assert "learned 'ü 0'" in out
    assert "keys of the records that are not read: id (400)" in out
    assert "messages that are only read, by role: user (400)" in out
    assert "skipped: records without a text to learn (3)" in out
    meta = meta_of(here / "data/qa")
    assert meta["masked"] and meta["documents"] == 400
    found = []
    for split in SPLITS:
        ids = np.fromfile(here / f"data/qa/{split}.bin", np.uint16)
        mask = np.fromfile(here / f"data/qa/{split}.mask.bin", np.uint8)
        learned = ids[mask == 1]  # of each example the response, and <|endoftext|>
        pieces = np.split(learned, np.flatnonzero(learned == 256) + 1)[:-1]
        responses = [bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces]
        for text, response in zip(documents(here / "data/qa", split), responses, strict=True):
            assert text.endswith(f"assistant:\n{response}")
            found.append((text.splitlines()[1], response))
    assert sorted(found) == sorted((f"what is ☃ {i}?", f"ü {i * i}") for i in range(400))


def test_keys_of_the_user(here):
    rows = [{"q": f"q {i}", "a": f"a {i}", "messages": []} for i in range(300)]
    write_records(here / "x.jsonl", rows)
    prepare("pair=x.jsonl", "--prompt_key", "q", "--response_key", "a")
    prepare("text=x.jsonl", "--text_key", "a")
    assert all_documents(here / "data/pair") == sorted(f"q {i}\na {i}" for i in range(300))
    assert all_documents(here / "data/text") == sorted(f"a {i}" for i in range(300))


# ---- files ---------------------------------------------------------------------------------------

def pack_zst(data):
    import pyarrow
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".zst", pack_zst)])
def test_packed_files(here, capsys, ending, pack):
    if ending == ".zst":
        pytest.importorskip("pyarrow")
    texts = corpus(300)
    write_texts(here / "x.jsonl", texts)
    data = (here / "x.jsonl").read_bytes()
    # two packed pieces one after the other are a packed file, too
    (here / f"X.JSONL{ending}").write_bytes(pack(data[:9999]) + pack(data[9999:]))
    prepare(f"packed=X.JSONL{ending}")
    assert all_documents(here / "data/packed") == sorted(texts)
    (here / f"cut.jsonl{ending}").write_bytes(pack(data)[:-30])
    assert "cannot read cut.jsonl" in error_of(capsys, prepare, f"cut=cut.jsonl{ending}")


def test_json_over_many_lines(here):
    """An array, and files of one object each."""
    rows = [{"text": text} for text in corpus(250)]
    (here / "array.json").write_text(json.dumps(rows, indent=1))
    (here / "many").mkdir()
    for i, row in enumerate(rows):
        (here / f"many/{i}.json").write_text(json.dumps(row, indent=2))
    for path in ("array.json", "many"):
        name = path[:4]
        prepare(f"{name}={path}")
        assert all_documents(here / "data" / name) == sorted(corpus(250))


def test_parquet(here):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [*corpus(300), None]}), here / "x.parquet")
    prepare("x=x.parquet")
    assert all_documents(here / "data/x") == sorted(corpus(300))


def test_a_missing_package_ends_the_program(here, monkeypatch, capsys):
    """Also in a folder: the file is not bad."""
    (here / "src").mkdir()
    (here / "src/x.jsonl.zst").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(capsys, prepare, "x=src")


def test_folders(here, capsys):
    """What is no text is left out and named with its reason. Links do not run in circles."""
    texts = corpus(250)
    (here / "src/sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        (here / "src/sub" / f"{i}.txt").write_text(text)
    prepare("y=src/**/*.txt")
    (here / "src/.git").mkdir()
    (here / "src/.git/config").write_text("hidden")
    os.symlink(here / "src", here / "src/sub/circle")
    os.symlink(here / "nowhere", here / "src/sub/nowhere")
    (here / "src/package.json").write_text(json.dumps({"name": "x", "version": 1}, indent=1))
    (here / "src/TABLE.CSV").write_text("a,b\n1,2\n")
    prepare("x=src")
    out = capsys.readouterr().out
    assert "x: left out 2 files, such as src/TABLE.CSV (data of a kind that is not read" in out
    assert "src/package.json (record 1: no known keys among name, version" in out
    assert all_documents(here / "data/x") == all_documents(here / "data/y") == sorted(texts)

    (here / "src/z.jsonl").write_text(json.dumps({"text": "t"}) + "\n{broken\n")
    assert "src/z.jsonl: record 2" in error_of(capsys, prepare, "z=src")
    write_records(here / "src/z.jsonl", [{"prompt": "p", "response": "r"}])
    assert "holds text and the rest examples" in error_of(capsys, prepare, "z=src")


# ---- --split_by ----------------------------------------------------------------------------------

def test_a_set_for_each_value(here, capsys):
    """Also of values that are alike, or no good names."""
    names = {"C++": "C%2B%2B", "漢": "%E6%BC%A2", "a/b": "a%2Fb", "..": "%2E.", 3: "3"}
    texts = corpus(800)
    rows = []
    for text, value in zip(texts, itertools.cycle(names)):
        rows.append({"text": text, "meta": {"of": value}})
    few = [{"text": "one", "meta": {"of": "small"}}, {"text": "none"}]
    write_records(here / "c.jsonl", rows + few)
    prepare("c=c.jsonl", "--split_by", "meta.of")
    out = capsys.readouterr().out
    assert sorted(os.listdir(here / "data/c")) == sorted(names.values())
    assert os.listdir(here / "data") == ["c"]
    for i, name in enumerate(names.values()):
        assert all_documents(here / "data/c" / name) == sorted(texts[i::5])
        assert TokenSet("data", f"c/{name}", 16).name == f"c/{name}"
    assert "left out 1 of too little text: c/small (no " in out
    assert "skipped: records without meta.of (1)" in out
    assert "not read" not in out
    assert "data/c exists" in error_of(capsys, prepare, "c=c.jsonl", "--split_by", "meta.of")
