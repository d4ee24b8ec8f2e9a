"""Which files and records prepare_data.py reads, what becomes of them, and what it says of it."""
import gzip
import json
import os
import sys

import numpy as np
import pytest

from conftest import refused
from prepare_data import FORMATS, SPLITS, TokenSet, read_record
from test_prepare import here  # noqa: F401  a fixture
from test_prepare import (all_documents, contents, corpus, documents, error_of, meta_of, prepare,
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
    "text": ({"text": "Once."}, "[Once.]", []),
    "text in paragraphs": ({"text": ["One.", None, "Two."]}, "[One.\nTwo.]", []),
    "a number": ({"text": 5, "id": 0}, "[5]", [(NOT_READ, "id")]),
    "prompt, response": ({"prompt": "2 + 2 =", "response": 4}, "2 + 2 =\n[4]", []),
    "a space at the end": ({"prompt": "A: ", "completion": "b \n"}, "A: \n[b ]", []),
    "no prompt": ({"prompt": "", "completion": "b"}, "[b]", []),
    "question, answer": ({"question": "q", "answer": "a", "choices": ["a", "b"]}, "q\n[a]",
                         [(NOT_READ, "choices")]),
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, "i\nx\n[o]", []),
    "alpaca without input": ({"instruction": "i", "input": "", "output": "o"}, "i\n[o]", []),
    "history": ({"system": "s", "history": [["q", "a"]], "instruction": "i", "output": "o"},
                "s\nq\na\ni\n[o]", []),
    "hidden reasoning": ({"prompt": "p", "response": "r", "label": False, "thinking": "hm"},
                         "p\n[r]", [(NOT_READ, "label"), (NOT_READ, "thinking")]),
    "chat": ({"messages": [ASK, ANSWER]}, CHAT, []),
    "chat with a system prompt": ({"system": "s", "messages": [ASK, ANSWER]},
                                  f"system:\ns\n{CHAT}", []),
    "sharegpt": ({"conversations": [{"from": "human", "value": "2 + 2?"},
                                    {"from": "gpt", "value": "4"}]}, CHAT, []),
    "content in parts": ({"messages": [
        message("user", [{"type": "image"}, {"type": "text", "text": "2 + 2?"}]), ANSWER]},
        CHAT, [("objects without a text", "image")]),
    "messages as prompt": ({"prompt": [ASK], "completion": "4"}, CHAT, []),
    "an answer in the prompt": ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
                                f"user:\n2 + 2?\nassistant:\n4\n{CHAT}", []),
    "turns": ({"messages": [ASK, message("assistant", "4 "), message("tool", "ok"), ANSWER]},
              "user:\n2 + 2?\nassistant:\n[4 \n]tool:\nok\nassistant:\n[4]",
              [("messages that are only read, by role", "tool")]),
    "a call": ({"messages": [ASK, message("assistant", "", tool_calls=[{"a": 1}]), ANSWER]}, CHAT,
               [("keys of messages that are not read", "tool_calls")]),
    "an unknown role": ({"messages": [ASK, message("Bard", "4")]}, "user:\n2 + 2?\nbard:\n4",
                        [("messages that are only read, by role", "bard")]),
    "null chooses no keys": ({"messages": None, "prompt": None, "text": "t"}, "[t]", []),
    "NaN chooses no keys": ({"prompt": "p", "response": float("nan"), "text": "t"}, "[t]",
                            [(NOT_READ, "prompt")]),
    "nothing but null": ({"text": None, "id": 7}, "", []),
}
for flag in ({"weight": 0}, {"train": False}, {"loss": False}):
    turns = [ASK, message("assistant", "5", **flag), ASK, message("assistant", "4", weight=1)]
    RECORDS[f"only read: {flag}"] = ({"messages": turns},
                                     f"user:\n2 + 2?\nassistant:\n5\n{CHAT}",
                                     [("messages that are only read, by role", "assistant")])


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
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "no known keys among prompt, chosen"),
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
        counts = meta["splits"][split]
        assert len(ids) == len(mask) == counts["tokens"]
        assert mask.sum() == counts["learned"]
        assert counts["learned_bytes"] == counts["learned"] - counts["documents"]
        for text in documents(here / "data/qa", split):
            n = len(text.encode()) + 1
            learned = bytes(ids[:n][mask[:n] == 1][:-1].astype(np.uint8)).decode()
            assert mask[n - 1] == 1  # <|endoftext|>
            assert text.endswith(f"assistant:\n{learned}")
            found.append((text.splitlines()[1], learned))
            ids = ids[n:]
            mask = mask[n:]
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
    (here / f"X.JSONL{ending}").write_bytes(pack(data))
    (here / f"two.jsonl{ending}").write_bytes(pack(data[:data.index(b"\n", 9999) + 1])
                                              + pack(data[data.index(b"\n", 9999) + 1:]))
    prepare("plain=x.jsonl", f"packed=X.JSONL{ending}", f"two=two.jsonl{ending}")
    assert all_documents(here / "data/plain") == sorted(texts)
    assert contents(here / "data/packed") == contents(here / "data/plain")
    assert contents(here / "data/two") == contents(here / "data/plain")
    (here / f"cut.jsonl{ending}").write_bytes(pack(data)[:-30])
    assert "cannot read cut.jsonl" in error_of(capsys, prepare, f"cut=cut.jsonl{ending}")


def test_parquet_and_json_hold_the_same_records(here):
    """An array, objects over many lines in files of their own, and a table with null."""
    rows = [{"text": text, "n": i} for i, text in enumerate(corpus(250))]
    write_records(here / "lines.ndjson", rows)
    (here / "array.json").write_text(json.dumps(rows))
    (here / "indented.json").write_text(json.dumps(rows, indent=1))
    for i, row in enumerate(rows):
        (here / "many").mkdir(exist_ok=True)
        (here / f"many/{i:03}.json").write_text(json.dumps(row, indent=[None, 2][i % 2]))
    names = ["lines.ndjson", "array.json", "indented.json", "many"]
    try:
        import pyarrow.parquet
        table = pyarrow.Table.from_pylist([*rows, {"text": None}])
        pyarrow.parquet.write_table(table, here / "table.parquet")
        names.append("table.parquet")
    except ImportError:
        pass
    for name in names:
        prepare(f"x={name}", "--data_dir", name[:5])
        assert contents(here / name[:5] / "x") == contents(here / "lines/x"), name


def test_a_missing_package_ends_the_program(here, monkeypatch, capsys):
    """Also in a folder: the file is not bad."""
    (here / "src").mkdir()
    (here / "src/x.jsonl.zst").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(capsys, prepare, "x=src")


def test_folders(here, capsys):
    """What is no text is left out and named with its reason. Links do not run in circles."""
    texts = corpus(250)
    for i, text in enumerate(texts):
        folder = here / f"src/d{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(text)
    (here / "src/.git").mkdir()
    (here / "src/.git/config").write_text("hidden")
    os.symlink(here / "src", here / "src/d0/circle")
    os.symlink(here / "nowhere", here / "src/d0/nowhere")
    prepare("x=src", "y=src/**/*.txt")
    assert "left out" not in capsys.readouterr().out
    assert all_documents(here / "data/x") == sorted(texts)
    assert contents(here / "data/y") != {}

    (here / "src/package.json").write_text(json.dumps({"name": "x", "version": 1}, indent=1))
    (here / "src/TABLE.CSV").write_text("a,b\n1,2\n")
    prepare("x=src", "--overwrite")
    out = capsys.readouterr().out
    assert "x: left out 2 files, such as src/TABLE.CSV (data of a kind that is not read" in out
    assert "src/package.json (record 1: no known keys among name, version" in out
    assert all_documents(here / "data/x") == sorted(texts)

    (here / "src/z.jsonl").write_text(json.dumps({"text": "t"}) + "\n{broken\n")
    assert "src/z.jsonl: record 2" in error_of(capsys, prepare, "z=src")
    write_records(here / "src/z.jsonl", [{"prompt": "p", "response": "r"}])
    assert "holds text and the rest examples" in error_of(capsys, prepare, "z=src")


# ---- --split_by ----------------------------------------------------------------------------------

def test_a_set_for_each_value(here, capsys):
    """Also of values that are alike, or no good names."""
    values = ["C++", "C#", "漢", "字", "a/b", "..", "web,new=1", 3]
    names = ["C%2B%2B", "C%23", "%E6%BC%A2", "%E5%AD%97", "a%2Fb", "%2E.", "web%2Cnew%3D1", "3"]
    texts = corpus(800)
    rows = [{"text": text, "meta": {"of": values[i % 8]}} for i, text in enumerate(texts)]
    rows += [{"text": "one", "meta": {"of": "small"}}, {"text": "none"}]
    write_records(here / "c.jsonl", rows)
    prepare("c=c.jsonl", "--split_by", "meta.of")
    out = capsys.readouterr().out
    assert sorted(os.listdir(here / "data/c")) == sorted(names)
    assert sorted(os.listdir(here / "data")) == ["c"]
    for i, name in enumerate(names):
        assert all_documents(here / "data/c" / name) == sorted(texts[i::8])
        assert f"  c/{name}" in out
        assert TokenSet("data", f"c/{name}", 16).name == f"c/{name}"
    assert "left out 1 of too little text: c/small (no " in out
    assert "skipped: records without meta.of (1)" in out
    assert "not read" not in out


def test_values_are_replaced_together(here, capsys):
    rows = [{"text": text, "of": "ab"[i % 2]} for i, text in enumerate(corpus(400))]
    write_records(here / "two.jsonl", rows)
    write_records(here / "one.jsonl", [{**row, "of": "a"} for row in rows])
    write_records(here / "each.jsonl", [{**row, "of": i} for i, row in enumerate(rows[:30])])
    prepare("c=two.jsonl", "--split_by", "of")
    assert "data/c exists" in error_of(capsys, prepare, "c=one.jsonl", "--split_by", "of")
    prepare("c=one.jsonl", "--split_by", "of", "--overwrite")
    assert os.listdir(here / "data/c") == ["a"]
    line = error_of(capsys, prepare, "d=each.jsonl", "--split_by", "of")
    assert "too little text for three splits: d/0 (no " in line
    assert os.listdir(here / "data") == ["c"]


def test_split_by_needs_records(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    line = refused("prepare_data.py", "x=x.txt", "--split_by", "of", cwd=tmp_path)
    assert "not records (.jsonl" in line
