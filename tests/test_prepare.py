"""prepare_data.py: from texts to token files and back, splits, and what a run reads of them."""
import base64
import collections
import gzip
import io
import itertools
import json
import os
import time

import numpy as np
import pytest

import prepare_data
from conftest import chain_set, example_set, refused, run, start, write_set
from prepare_data import IGNORE, PAGE, SPLITS, WHOLE, TokenSet, load_sets, place_of, text_units


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(*args):
    """prepare_data.py in this process"""
    prepare_data.main([str(arg) for arg in args])


def error_of(capsys, call, *args):
    """Calls what must end the program with status 2 and one line. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(*args)
    line = capsys.readouterr().err
    assert ended.value.code == 2, line
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def contents(folder):
    """{name: bytes} of the files in a folder"""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(folder, split, tokenizer=None):
    """The texts of a split, cut at <|endoftext|> and decoded."""
    tokenizer = tokenizer or prepare_data.get_tokenizer("bytes")
    ids = np.fromfile(folder / f"{split}.bin", meta_of(folder)["dtype"])
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert ends[-1] == len(ids) - 1
    pieces = np.split(ids, ends + 1)[:-1]
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def all_documents(folder, tokenizer=None):
    """The texts of all splits, sorted."""
    texts = []
    for split in SPLITS:
        texts += documents(folder, split, tokenizer)
    return sorted(texts)


def corpus(n, seed=0, words=60):
    """n documents of up to so many words, with letters of more than one byte."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(n):
        numbers = map(str, rng.integers(0, 10**6, rng.integers(1, words)))
        texts.append(f"document {i}: {' '.join(numbers)} ünï ☃ 漢字\n")
    return texts


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_texts(path, texts):
    write_records(path, [{"text": text} for text in texts])


# ---- the sample ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(data_dir, {name: units}) of the sample"""
    folder = tmp_path_factory.mktemp("sample")
    sets = prepare_data.sample_sets(1337)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "sample_sets", lambda seed: sets)
        prepare("--data_dir", folder)
    return folder, sets


def test_sample_holds_its_texts(sample):
    """Each token and each mask, by a plain loop over units."""
    folder, sets = sample
    for name, units in sets.items():
        share = 0.45 if name in prepare_data.SAMPLE_TARGETS else 0.05
        places = [place_of(unit, 1337) for unit in units]
        val_end = share
        test_start = 1 - share
        if len(units) < 200:
            val_end = max(val_end, min(places))
            test_start = min(test_start, max(places))
        written = {split: [] for split in SPLITS}  # (bytes, learned?)
        before = None
        for unit, place in zip(units, places):
            split = "val" if place <= val_end else "test" if place >= test_start else "train"
            if before and (unit.starts_document or split != before):
                written[before].append((None, True))
            written[split] += [(text.encode(), learned) for text, learned in unit.parts]
            before = split
        written[before].append((None, True))
        meta = meta_of(folder / name)
        for split in SPLITS:
            ids = []
            mask = []
            for raw, learned in written[split]:
                ids.append([256] if raw is None else np.frombuffer(raw, np.uint8))
                mask.append(np.full(len(ids[-1]), learned))
            ids = np.concatenate(ids)
            mask = np.concatenate(mask)
            assert np.array_equal(np.fromfile(folder / name / f"{split}.bin", np.uint16), ids)
            if meta["masked"]:
                found = np.fromfile(folder / name / f"{split}.mask.bin", np.uint8)
                assert np.array_equal(found, mask)
            counts = meta["splits"][split]
            assert counts["tokens"] == len(ids)
            assert counts["learned"] == mask.sum()
            assert counts["bytes"] == np.count_nonzero(ids < 256)


def test_sample_is_prepared_once(sample, capsys):
    folder, sets = sample
    assert list(sets)[-1] == prepare_data.SAMPLE_TARGETS[0]  # what prepare_sample() looks for
    prepare_data.prepare_sample(folder)
    assert capsys.readouterr().out == ""
    assert prepare_data.sample_sources(folder) == list(prepare_data.SAMPLE_SOURCES)
    # no source holds a target's text
    load_sets(folder, ["python", "describe", "implement"], ["numpy", "numpy_tasks"], 64)
    assert "warning" not in capsys.readouterr().out


def test_sample_with_another_tokenizer(sample, tmp_path, monkeypatch, capsys):
    folder, sets = sample
    write_tiktoken(tmp_path / "t.tiktoken", [bytes([i]) for i in range(256)])
    monkeypatch.setattr(prepare_data, "sample_sets", lambda seed: sets)
    line = error_of(capsys, prepare, "--data_dir", folder, "--tokenizer", tmp_path / "t.tiktoken")
    assert "was made with the tokenizer bytes" in line


# ---- tokens --------------------------------------------------------------------------------------

def write_tiktoken(path, tokens, gap=0):
    """A tokenizer's file. The last rank is so much higher than the one before."""
    ranks = list(range(len(tokens)))
    ranks[-1] += gap
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in zip(tokens, ranks)]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("n_merged, gap", [(70_000, 0), (300, 5)])
def test_round_trip_by_a_vocabulary(here, n_merged, gap):
    """Of 32 bits, and of ranks with a gap."""
    tokens = [bytes([i]) for i in range(256)] + [b" %05d" % i for i in range(n_merged)]
    write_tiktoken(here / "t.tiktoken", tokens, gap)
    texts = corpus(200) + ["it spells <|endoftext|> as text"]
    write_texts(here / "web.jsonl", texts)
    prepare("web=web.jsonl", "--tokenizer", "t.tiktoken")
    meta = meta_of(here / "data/web")
    assert meta["vocab_size"] == 256 + n_merged + gap + 1
    assert meta["eot_token"] == 256 + n_merged + gap
    assert meta["dtype"] == ("uint32" if n_merged == 70_000 else "uint16")
    tokenizer = prepare_data.get_tokenizer("t.tiktoken")
    assert meta["tokenizer"] == tokenizer.name
    assert all_documents(here / "data/web", tokenizer) == sorted(texts)
    # another file of this name is another tokenizer
    write_tiktoken(here / "t.tiktoken", tokens[:-1], gap)
    assert prepare_data.get_tokenizer("t.tiktoken").name != tokenizer.name


def test_files_do_not_depend_on_the_number_of_threads(here, monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH", 5000)
    tokens = [bytes([i]) for i in range(256)] + [b" 1", b" 12", b"00", b"ment"]
    write_tiktoken(here / "t.tiktoken", tokens)
    texts = corpus(300, words=300)
    write_texts(here / "text.jsonl", [*texts, "".join(texts)])
    pairs = [{"prompt": text[:50], "response": text[50:], "of": text[13]} for text in texts]
    write_records(here / "qa.jsonl", pairs)
    for tokenizer in ("bytes", "t.tiktoken"):
        for source, *flags in (["text"], ["qa"], ["qa", "--split_by", "of"]):
            found = []
            for workers in (1, 2, 7):
                prepare(f"x={source}.jsonl", "--workers", workers, "--tokenizer", tokenizer,
                        "--overwrite", *flags)
                files = [path for path in (here / "data/x").rglob("*") if path.is_file()]
                found.append({path: path.read_bytes() for path in files})
            assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("seed", range(40))
def test_pages_lose_nothing(seed):
    """Lines of many lengths, also those with which a page ends as far away as it may."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 3 * PAGE, 60)
    if seed % 2:
        lengths = rng.choice([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE], 60)
    text = "".join("a" * (n - 1) + "\n" for n in lengths)
    text = text[:rng.integers(len(text) // 2, len(text))]
    for end in (len(text), WHOLE, WHOLE + 1, 12 * PAGE):
        units = list(text_units("x", io.StringIO(text[:end])))
        pages = [unit.parts[0][0] for unit in units]
        assert "".join(pages) == text[:end]
        assert [unit.starts_document for unit in units] == [True] + [False] * (len(units) - 1)
        if end <= WHOLE:
            assert len(pages) == 1
        else:
            assert all(PAGE <= len(page) <= 2 * PAGE for page in pages[:-1])


# ---- splits --------------------------------------------------------------------------------------

def test_a_text_goes_to_one_split_in_whatever_dress_and_set(here):
    """Sets of 120, 400 and 2,000 of the same documents with other line ends, indentation or a byte
    order mark, some of them twice; and a book alone and among others. Their sizes are right."""
    texts = [f"{text}    and\n\tmore\n" for text in corpus(2000)]
    book = "".join(corpus(900, seed=1, words=99))
    write_texts(here / "large.jsonl", texts)
    write_texts(here / "crlf.jsonl", [text.replace("\n", "\r\n") for text in texts[:400]])
    write_texts(here / "tabs.jsonl", [text.replace("    ", "\t") for text in texts[:120]] * 2)
    write_texts(here / "books.jsonl", [book, *texts[:400]])
    (here / "marked").mkdir()
    for i, text in enumerate(texts[:250]):
        (here / f"marked/{i}.txt").write_text("\ufeff" + text.strip())
    (here / "book.txt").write_text(book)
    prepare("large=large.jsonl", "crlf=crlf.jsonl", "tabs=tabs.jsonl", "books=books.jsonl",
            "marked=marked", "book=book.txt")
    found = {}
    for name in ("large", "crlf", "tabs", "books", "marked", "book"):
        for split in SPLITS:
            texts = documents(here / "data" / name, split)
            assert texts
            found[name, split] = {"".join(text.split()) for text in texts}
    for one, other in itertools.product(found, repeat=2):
        if one[1] != other[1]:
            assert not found[one] & found[other], (one, other)
    assert found["book", "train"] <= found["books", "train"]
    assert found["marked", "train"] <= found["large", "train"]
    (here / "few.txt").write_text(book[:40_000])  # nine pages: val and test get one at least
    prepare("few=few.txt")
    for split in ("val", "test"):
        assert 60 < len(found["large", split]) < 140  # of 2,000, four standard deviations
    lines = "".join("".join(documents(here / "data/book", split)) for split in SPLITS).splitlines()
    assert sorted(lines) == sorted(book.splitlines())  # each whole, in one split


def test_responses_to_one_prompt_stay_together(here, capsys):
    rows = [{"prompt": f"say {i}", "response": f"{i}, {j}"} for i in range(300) for j in range(8)]
    write_records(here / "qa.jsonl", rows)
    prepare("qa=qa.jsonl")
    prompts = {}
    for split in SPLITS:
        texts = documents(here / "data/qa", split)
        prompts[split] = collections.Counter(text.partition("\n")[0] for text in texts)
        assert set(prompts[split].values()) == {8}
    assert sum(map(len, prompts.values())) == 300
    write_records(here / "one.jsonl", [{**row, "prompt": "say"} for row in rows])
    line = error_of(capsys, prepare, "one=one.jsonl")
    assert "2,400 documents" in line and "more different prompts" in line


# ---- shared text ---------------------------------------------------------------------------------

def share_found(capsys, target, source):
    """What a run prints as the share of a target's val and test that is in a source's train."""
    capsys.readouterr()
    load_sets("data", [source], [target], 100)
    out = capsys.readouterr().out
    if "warning: about " not in out:
        return 0
    return int(out.partition("warning: about ")[2].partition("%")[0]) / 100


def test_shared_text_is_found(here, capsys):
    """By another seed 90% of a text's val and test are in train. 0.1 less is a good estimate."""
    plain = corpus(800)
    write_texts(here / "plain.jsonl", plain)
    write_texts(here / "crlf.jsonl", [text.replace("\n", "\r\n") for text in plain])
    write_texts(here / "spaced.jsonl", [text.replace(" ", "\n    ") for text in plain])
    write_texts(here / "header.jsonl", ["# by somebody\n" + text for text in plain])
    write_texts(here / "half.jsonl", plain[:400] + corpus(400, seed=1))
    write_texts(here / "none.jsonl", corpus(800, seed=2))
    (here / "book.txt").write_text("".join(plain))
    pairs = [(f"what is {text[13:60]}?", text[60:]) for text in plain]
    short = [(f"what is {i}?", f"it is {i * i}") for i in range(1000)]
    write_records(here / "alpaca.jsonl", [{"instruction": a, "output": b} for a, b in pairs])
    write_records(here / "chat.jsonl", [{"messages": [{"role": "user", "content": a},
                                                      {"role": "assistant", "content": b}]}
                                        for a, b in pairs])
    write_records(here / "short.jsonl", [{"question": a, "answer": b} for a, b in short])
    prepare("plain=plain.jsonl", "alpaca=alpaca.jsonl", "short=short.jsonl")
    others = ("plain", "crlf", "spaced", "header", "half", "none", "alpaca", "chat", "short")
    prepare(*(f"{name}2={name}.jsonl" for name in others), "book=book.txt", "--seed", 5)
    for name in ("plain2", "crlf2", "spaced2", "header2", "half2", "book"):
        right = 0.45 if name == "half2" else 0.9
        assert right - 0.12 < share_found(capsys, "plain", name) < right + 0.08, name
    assert share_found(capsys, "alpaca", "chat2") > 0.5
    assert share_found(capsys, "short", "short2") > 0.8
    assert share_found(capsys, "plain", "none2") == 0
    assert share_found(capsys, "plain", "short2") == 0
    assert share_found(capsys, "plain", "plain") == 0


# ---- windows -------------------------------------------------------------------------------------

def test_windows_of_text(tmp_path):
    chain_set(tmp_path / "a", 1, n=4000)
    chosen = TokenSet(tmp_path, "a", 16)
    tokens = np.fromfile(tmp_path / "a/train.bin", np.uint16).tolist()
    ring = tokens + tokens
    start = np.array([0, 5, len(tokens) - 1])
    x, y = chosen.windows("train", start)
    assert x.dtype == y.dtype == np.int64
    for i, first in enumerate(start):
        assert x[i].tolist() == ring[first:first + 16]
        assert y[i].tolist() == ring[first + 1:first + 17]
    assert chosen.density("train") == 1
    assert len(chosen.spread("val", 10**9)) == (1000 - 1) // 16  # all that there are
    assert len(chosen.spread("val", 160)) == 10


def test_windows_of_examples(tmp_path):
    """By a plain loop over tokens."""
    T = 16
    example_set(tmp_path / "a", 1, 2)
    chosen = TokenSet(tmp_path, "a", T)
    ids = np.fromfile(tmp_path / "a/val.bin", np.uint16).tolist()
    mask = np.fromfile(tmp_path / "a/val.mask.bin", np.uint8).tolist()
    starts = [0] + [i + 1 for i, token in enumerate(ids) if token == 64][:-1]
    rows = []
    for start in starts:
        ring = [(start + i) % len(ids) for i in range(T + 1)]
        targets = [ids[i] if mask[i] else IGNORE for i in ring[1:]]
        rows.append(([ids[i] for i in ring[:-1]], targets))
    x, y = chosen.windows("val", np.array(starts))
    assert x.tolist() == [row[0] for row in rows]
    assert y.tolist() == [row[1] for row in rows]

    # fractions reach each example alike
    u = (np.arange(50_000) + 0.5) / 50_000
    drawn, counts = np.unique(chosen.at_fraction("val", u), return_counts=True)
    assert drawn.tolist() == starts
    assert counts.max() - counts.min() <= 2
    learned = np.mean([target != IGNORE for row in rows for target in row[1]])
    assert chosen.density("val") == pytest.approx(learned, abs=0.01)

    # disjoint windows, each at the first example that is a step behind the last one
    for max_tokens in (160, 1000, 10**9):
        step = max(T, len(ids) // (max_tokens // T))
        expected = []
        for start in starts:
            if start + T < len(ids) and (not expected or start >= expected[-1] + step):
                expected.append(start)
        assert chosen.spread("val", max_tokens).tolist() == expected


def test_what_a_shorter_run_is_shown(tmp_path):
    """The first of the blocks only, whatever u; from all parts of the split; and val as a whole."""
    chain_set(tmp_path / "a", 1, n=400_000)
    chosen = TokenSet(tmp_path, "a", 16)
    chosen.visible = 0.25
    u = np.random.default_rng(0).random(100_000)
    block = chosen.at_fraction("train", u) * len(chosen.starts["train"]) // 200_000
    shown, counts = np.unique(block, return_counts=True)
    shown = shown[counts > 100]  # a window may begin a token before its block does
    assert len(shown) / len(chosen.starts["train"]) == pytest.approx(0.25, abs=0.02)
    assert shown.min() < 20 and shown.max() > 170
    assert np.ptp(chosen.at_fraction("val", u)) > 0.99 * 100_000


def test_examples_whose_response_is_too_far(tmp_path, capsys):
    ids = [1] * 20 + [2, 3] + [1] * 5 + [2, 3]
    mask = [0] * 20 + [1, 1] + [0] * 5 + [1, 1]
    write_set(tmp_path / "a", dict.fromkeys(SPLITS, ids * 99), vocab_size=4,
              masks=dict.fromkeys(SPLITS, mask * 99))
    # windows of 16 begin at a long prompt or at a short one, with 2 learned tokens in all but one
    assert TokenSet(tmp_path, "a", 16).density("train") == pytest.approx(2 / 16 / 2, abs=0.01)
    line = error_of(capsys, TokenSet(tmp_path, "a", 4).density, "train")
    assert "'a' has no response within --block_size 4 in its train split" in line


def test_sets_that_do_not_go_together(tmp_path, capsys):
    chain_set(tmp_path / "a", 1)
    chain_set(tmp_path / "c/web", 2)
    write_set(tmp_path / "other", dict.fromkeys(SPLITS, range(60)), tokenizer="other")
    assert list(load_sets(tmp_path, ["a", "c/web"], ["a"], 16)) == ["a", "c/web"]
    for names, size, text in ((["a", "b"], 16, "no set 'b' in"), (["c"], 16, "there: a, c/web"),
                              (["a", "other"], 16, "'other' was made with the tokenizer other"),
                              (["other"], 60, "too short for --block_size 60")):
        assert text in error_of(capsys, load_sets, tmp_path, names, names, size)


# ---- whole or not at all -------------------------------------------------------------------------

def test_a_failed_rename_brings_the_old_set_back(here, monkeypatch):
    write_texts(here / "x.jsonl", corpus(300))
    prepare("x=x.jsonl")
    before = contents(here / "data/x")
    write_texts(here / "x.jsonl", corpus(300, seed=1))
    rename = os.rename

    def fail_once(old, new):
        if new == here / "data/x" or str(new) == "data/x":
            monkeypatch.setattr(os, "rename", rename)
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        prepare("x=x.jsonl", "--overwrite")
    assert os.rename is rename  # it got that far
    assert contents(here / "data/x") == before
    assert os.listdir(here / "data") == ["x"]
    prepare("x=x.jsonl", "--overwrite")
    assert contents(here / "data/x") != before


def test_killed_in_the_middle(tmp_path):
    """It leaves no set, and what it leaves is not in the next one."""
    write_texts(tmp_path / "x.jsonl", corpus(2000) * 15)
    process = start("prepare_data.py", "x=x.jsonl", cwd=tmp_path)
    while not list(tmp_path.glob("data/.*/x/train.bin")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (tmp_path / "data/x").exists()
    run("prepare_data.py", "x=x.jsonl", cwd=tmp_path)
    run("prepare_data.py", "x=x.jsonl", "--data_dir", "fresh", cwd=tmp_path)
    assert contents(tmp_path / "data/x") == contents(tmp_path / "fresh/x")


def test_what_is_there_is_kept(here, capsys):
    """Without --overwrite every folder, with it those that are no sets."""
    write_texts(here / "x.jsonl", corpus(300))
    prepare("x=x.jsonl")
    before = contents(here / "data/x")
    assert "data/x exists" in error_of(capsys, prepare, "y=x.jsonl", "x=x.jsonl")
    assert os.listdir(here / "data") == ["x"]
    assert contents(here / "data/x") == before
    (here / "data/mine").mkdir()
    (here / "data/mine/thesis.txt").write_text("the only copy")
    assert "data/mine exists" in error_of(capsys, prepare, "mine=x.jsonl", "--overwrite")
    assert (here / "data/mine/thesis.txt").exists()


# ---- one line for what goes wrong ----------------------------------------------------------------

ERRORS = {
    "no such file": (["x=nowhere/*.txt"], "nowhere/*.txt: no file there"),
    "name twice": (["x=x.txt", "x=y.jsonl"], "the name x is given twice"),
    "table": (["x=t.csv"], "convert it to .jsonl"),
    "pointer": (["x=lfs.jsonl"], "git lfs pull"),
    "binary": (["x=zeros.txt"], "holds zero bytes"),
    "empty": (["x=empty.txt"], "x: it holds no text"),
    "cut": (["x=cut.txt.gz"], "cannot read cut.txt.gz: Compressed file ended"),
    "too short": (["x=short.txt"], "too little text for three splits"),
    "no records": (["x=x.txt", "--text_key", "body"], "x.txt: not records"),
    "the sample's records": (["--split_by", "a"], "need records; name their files"),
    "one key": (["x=y.jsonl", "--prompt_key", "q"], "go together"),
    "tokenizer": (["x=x.txt", "--tokenizer", "no.tiktoken"], "use --tokenizer bytes"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    text = "".join(corpus(900)).encode()
    (folder / "x.txt").write_bytes(text)
    write_texts(folder / "y.jsonl", corpus(300))
    (folder / "t.csv").write_text("id,text\n" * 999)
    (folder / "lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    (folder / "zeros.txt").write_bytes(bytes(999))
    (folder / "empty.txt").write_text("\n \n")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(text)[:-20])
    (folder / "short.txt").write_text("a short one")
    return folder


@pytest.mark.parametrize("case", ERRORS)
def test_errors(bad_inputs, case):
    args, text = ERRORS[case]
    line = refused("prepare_data.py", *args, cwd=bad_inputs)
    assert text in line, line
    data = bad_inputs / "data"
    assert not data.exists() or os.listdir(data) == []
