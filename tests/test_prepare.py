"""prepare_data.py: from texts to token files and back, splits, and what a run reads of them."""
import base64
import collections
import io
import itertools
import json
import os
import time

import numpy as np
import pytest

import prepare_data
from conftest import chain_set, example_set, refused, run, start, write_set
from prepare_data import (IGNORE, PAGE, SAMPLE_TARGETS, SPLITS, WHOLE, TokenSet, load_sets,
                          place_units, text_units)


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


def test_the_end_of_text_stands_where_a_text_ends(sample):
    """Behind a document, and behind a page whose next page goes to another split."""
    folder, sets = sample
    written = {split: b"" for split in SPLITS}
    last = None
    for unit, split in place_units(sets["python"], 1337, (0.05, 0.05)):
        if last and (unit.starts_document or split != last):
            written[last] += b"\xff"  # which is no byte of UTF-8
        written[split] += unit.parts[0][0].encode()
        last = split
    written[last] += b"\xff"
    for split in SPLITS:
        ids = np.fromfile(folder / f"python/{split}.bin", np.uint16)
        assert np.where(ids == 256, 255, ids).astype(np.uint8).tobytes() == written[split]
        counts = meta_of(folder / "python")["splits"][split]
        assert counts["tokens"] == counts["learned"] == len(ids)
        assert counts["bytes"] == np.count_nonzero(ids < 256)


def test_sample_is_prepared_once(sample, tmp_path, monkeypatch, capsys):
    folder, sets = sample
    assert list(sets)[-1] == SAMPLE_TARGETS[0]  # what prepare_sample() looks for
    prepare_data.prepare_sample(folder)
    assert capsys.readouterr().out == ""
    assert prepare_data.sample_sources(folder) == list(prepare_data.SAMPLE_SOURCES)
    splits = meta_of(folder / "numpy")["splits"]
    assert splits["train"]["tokens"] < splits["val"]["tokens"]  # a target is there to measure with
    # no source holds a target's text
    load_sets(folder, ["python", "describe", "implement"], ["numpy", "numpy_tasks"], 64)
    assert "warning" not in capsys.readouterr().out
    # another tokenizer is not mixed with the one that it was made with
    write_tiktoken(tmp_path / "t.tiktoken", BYTES)
    monkeypatch.setattr(prepare_data, "sample_sets", lambda seed: sets)
    line = error_of(capsys, prepare, "--data_dir", folder, "--tokenizer", tmp_path / "t.tiktoken")
    assert "was made with the tokenizer bytes" in line


# ---- tokens --------------------------------------------------------------------------------------

BYTES = [bytes([i]) for i in range(256)]


def write_tiktoken(path, tokens, gap=0):
    """A tokenizer's file. The last rank is so much higher than the one before."""
    ranks = list(range(len(tokens)))
    ranks[-1] += gap
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in zip(tokens, ranks)]
    path.write_bytes(b"".join(lines))


def test_round_trip_by_a_vocabulary(here):
    """Of more ids than 16 bits hold, and of ranks with a gap."""
    tokens = BYTES + [b" %05d" % i for i in range(70_000)]
    write_tiktoken(here / "t.tiktoken", tokens, gap=5)
    texts = corpus(200) + ["it spells <|endoftext|> as text"]
    write_texts(here / "web.jsonl", texts)
    prepare("web=web.jsonl", "--tokenizer", "t.tiktoken")
    meta = meta_of(here / "data/web")
    assert meta["vocab_size"] == meta["eot_token"] + 1 == 256 + 70_000 + 5 + 1
    assert meta["dtype"] == "uint32"
    tokenizer = prepare_data.get_tokenizer("t.tiktoken")
    assert meta["tokenizer"] == tokenizer.name
    assert all_documents(here / "data/web", tokenizer) == sorted(texts)
    # another file of this name is another tokenizer
    write_tiktoken(here / "t.tiktoken", tokens)
    assert prepare_data.get_tokenizer("t.tiktoken").name != tokenizer.name


@pytest.mark.parametrize("flags", [["x=text.jsonl"], ["x=qa.jsonl", "--split_by", "of"]])
def test_files_do_not_depend_on_the_size_of_batches(here, monkeypatch, flags):
    write_tiktoken(here / "t.tiktoken", BYTES + [b" 1", b" 12", b"00", b"ment"])
    texts = corpus(300, words=300)
    write_texts(here / "text.jsonl", [*texts, "".join(texts)])
    pairs = [{"prompt": text[:50], "response": text[50:], "of": text[13]} for text in texts]
    write_records(here / "qa.jsonl", pairs)
    found = []
    for size in (1, 5000, prepare_data.BATCH):
        monkeypatch.setattr(prepare_data, "BATCH", size)
        data = here / f"data-{size}"
        prepare(*flags, "--tokenizer", "t.tiktoken", "--data_dir", str(data))
        files = {path.relative_to(data): path.read_bytes() for path in (data / "x").rglob("*.bin")}
        metas = [json.loads(path.read_text()) for path in sorted((data / "x").rglob("meta.json"))]
        found.append((files, [meta["splits"] for meta in metas]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("seed", range(20))
def test_pages_lose_nothing(seed):
    """Lines of many lengths, also those with which a page ends as far away as it may."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 3 * PAGE, 60)
    if seed % 2:
        lengths = rng.choice([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE], 60)
    text = "".join("a" * (n - 1) + "\n" for n in lengths)
    for end in (WHOLE, WHOLE + 1, rng.integers(12 * PAGE, len(text))):
        units = list(text_units("x", io.StringIO(text[:end])))
        pages = [unit.parts[0][0] for unit in units]
        assert "".join(pages) == text[:end]
        assert [unit.starts_document for unit in units] == [True] + [False] * (len(units) - 1)
        assert (len(pages) == 1) == (end == WHOLE)
        assert all(PAGE <= len(page) <= 2 * PAGE for page in pages[:-1])


# ---- splits --------------------------------------------------------------------------------------

def test_a_text_goes_to_one_split_in_whatever_dress_and_set(here):
    """
    Sets of 2,000 and of 400 documents that differ in line ends and indentation, and some of which
    are there twice; and a book alone and among others.
    """
    texts = [f"{text}    and\n\tmore\n" for text in corpus(2000)]
    dressed = [text.replace("\n", "\r\n").replace("    ", "\t") for text in texts[:400]]
    book = "".join(corpus(900, seed=1, words=99))
    write_texts(here / "large.jsonl", texts)
    write_texts(here / "dressed.jsonl", dressed + texts[:120])
    write_texts(here / "books.jsonl", [book, *texts[:400]])
    (here / "book.txt").write_text("\ufeff" + book)  # with a byte order mark
    (here / "few.txt").write_text(book[:40_000])  # nine pages
    names = ("large.jsonl", "dressed.jsonl", "books.jsonl", "book.txt", "few.txt")
    prepare(*(f"{name.partition('.')[0]}={name}" for name in names))
    found = {}
    for name in ("large", "dressed", "books", "book"):
        for split in SPLITS:
            pages = documents(here / "data" / name, split)
            found[name, split] = {"".join(page.split()) for page in pages}
    for one, other in itertools.product(found, repeat=2):
        if one[1] != other[1]:
            assert not found[one] & found[other], (one, other)
    assert found["book", "train"] <= found["books", "train"]
    for split in ("val", "test"):
        assert 60 < len(found["large", split]) < 140  # of 2,000, four standard deviations
        assert documents(here / "data/few", split)  # of a few one goes there at least
    lines = "".join(all_documents(here / "data/book")).splitlines()
    assert sorted(lines) == sorted(book.splitlines())  # each whole, in one split


def test_responses_to_one_prompt_stay_together(here):
    rows = [{"prompt": f"say {i}", "response": f"{i}, {j}"} for i in range(300) for j in range(8)]
    write_records(here / "qa.jsonl", rows)
    prepare("qa=qa.jsonl")
    n_prompts = 0
    for split in SPLITS:
        texts = documents(here / "data/qa", split)
        counts = collections.Counter(text.partition("\n")[0] for text in texts)
        assert set(counts.values()) == {8}
        n_prompts += len(counts)
    assert n_prompts == 300


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
    write_texts(here / "spaced.jsonl", [text.replace(" ", "\n    ") for text in plain])
    write_texts(here / "header.jsonl", ["# by somebody\n" + text for text in plain])
    write_texts(here / "half.jsonl", plain[:400] + corpus(400, seed=1))
    write_texts(here / "none.jsonl", corpus(800, seed=2))
    write_texts(here / "short.jsonl", [f"{i}^2 = {i * i}" for i in range(1000)])
    (here / "book.txt").write_text("".join(plain))
    prepare("plain=plain.jsonl", "short=short.jsonl")
    others = ("plain", "spaced", "header", "half", "none", "short")
    prepare(*(f"{name}2={name}.jsonl" for name in others), "book=book.txt", "--seed", 5)
    for name in ("plain2", "spaced2", "header2", "half2", "book"):
        right = 0.45 if name == "half2" else 0.9
        assert right - 0.12 < share_found(capsys, "plain", name) < right + 0.08, name
    assert share_found(capsys, "short", "short2") > 0.8
    assert share_found(capsys, "plain", "none2") == 0
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
    assert len(chosen.spread("val", 160)) == 10


def test_windows_of_examples(tmp_path):
    """By a plain loop over tokens."""
    T = 16
    example_set(tmp_path / "a", 1, 2)
    chosen = TokenSet(tmp_path, "a", T)
    ids = np.fromfile(tmp_path / "a/val.bin", np.uint16).tolist()
    mask = np.fromfile(tmp_path / "a/val.mask.bin", np.uint8).tolist()
    starts = [0] + [i + 1 for i, token in enumerate(ids) if token == 64][:-1]
    inputs = []
    targets = []
    for start in starts:
        ring = [(start + i) % len(ids) for i in range(T + 1)]
        inputs.append([ids[i] for i in ring[:-1]])
        targets.append([ids[i] if mask[i] else IGNORE for i in ring[1:]])
    x, y = chosen.windows("val", np.array(starts))
    assert x.tolist() == inputs
    assert y.tolist() == targets

    # fractions reach each example alike
    u = (np.arange(50_000) + 0.5) / 50_000
    drawn, counts = np.unique(chosen.at_fraction("val", u), return_counts=True)
    assert drawn.tolist() == starts
    assert counts.max() - counts.min() <= 2
    learned = np.mean(np.array(targets) != IGNORE)
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
    """A quarter of train, from all parts of it, whatever u is; and val as a whole."""
    chain_set(tmp_path / "a", 1, n=400_000)
    chosen = TokenSet(tmp_path, "a", 16)
    chosen.visible = 0.25
    u = np.random.default_rng(0).random(100_000)
    start = chosen.at_fraction("train", u)
    # so many of 50,000 tokens are met by 100,000 draws
    assert len(np.unique(start)) == pytest.approx(50_000 * (1 - np.exp(-2)), rel=0.05)
    assert start.min() < 20_000 and start.max() > 170_000
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


# ---- whole or not at all -------------------------------------------------------------------------

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
    write_texts(here / "x.jsonl", corpus(300))
    prepare("x=x.jsonl")
    before = contents(here / "data/x")
    assert "data/x exists" in error_of(capsys, prepare, "y=x.jsonl", "x=x.jsonl")
    assert os.listdir(here / "data") == ["x"]
    assert contents(here / "data/x") == before


# ---- one line for what goes wrong ----------------------------------------------------------------

ERRORS = {
    "no such file": (["x=nowhere/*.txt"], "nowhere/*.txt: no file there"),
    "name twice": (["x=x.txt", "x=y.jsonl"], "the name x is given twice"),
    "table": (["x=t.csv"], "convert it to .jsonl"),
    "pointer": (["x=lfs.jsonl"], "git lfs pull"),
    "binary": (["x=zeros.txt"], "holds zero bytes"),
    "empty": (["x=empty.txt"], "x: it holds no text"),
    "too short": (["x=short.txt"], "too little text for three splits"),
    "no records": (["x=x.txt", "--text_key", "body"], "x.txt: not records"),
    "the sample's records": (["--split_by", "a"], "need records; name their files"),
    "one key": (["x=y.jsonl", "--prompt_key", "q"], "go together"),
    "tokenizer": (["x=x.txt", "--tokenizer", "no.tiktoken"], "use --tokenizer bytes"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "x.txt").write_text("".join(corpus(300)))
    write_texts(folder / "y.jsonl", corpus(300))
    (folder / "t.csv").write_text("id,text\n" * 999)
    (folder / "lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    (folder / "zeros.txt").write_bytes(bytes(999))
    (folder / "empty.txt").write_text("\n \n")
    (folder / "short.txt").write_text("a short one")
    return folder


@pytest.mark.parametrize("case", ERRORS)
def test_errors(bad_inputs, case):
    args, text = ERRORS[case]
    line = refused("prepare_data.py", *args, cwd=bad_inputs)
    assert text in line, line
    data = bad_inputs / "data"
    assert not data.exists() or os.listdir(data) == []
