"""tests/ngram.py: models against plain Python, EM against a grid, masks, tokenizers, its file."""
import base64
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

import ngram
from conftest import TINY, refused, result_json, run, write_set
from prepare_data import TokenSet

END = 256


# ---- the n-gram model ----------------------------------------------------------------------------

class Reference:
    """Witten-Bell by dictionaries, symbol by symbol, of a text that is read as a ring."""

    def __init__(self, symbols, order):
        self.order = order
        self.after = defaultdict(Counter)  # {context: Counter of the symbols that follow it}
        for t in range(len(symbols)):
            for length in range(order):
                context = tuple(symbols[t - back] for back in range(length, 0, -1))
                self.after[context][symbols[t]] += 1

    def probability(self, context, x):
        if len(context) == 0:
            shorter = 1 / 257
        else:
            shorter = self.probability(context[1:], x)
        if context not in self.after:
            return shorter
        followers = self.after[context]
        n = sum(followers.values())
        return (followers[x] + len(followers) * shorter) / (n + len(followers))


def words(seed, letters, n=400):
    """A text of n symbols: some letters, more or less often, in pieces with an END behind each."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice(list(letters), n, p=rng.dirichlet(np.ones(len(letters))))
    symbols = symbols.astype(np.int64)
    symbols[rng.integers(0, n, n // 50)] = END
    symbols[-1] = END
    return symbols


def as_gram(symbols):
    """The number that stands for a gram."""
    number = 0
    for symbol in symbols:
        number = number * 257 + int(symbol)
    return number


@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
def test_probabilities_are_those_of_witten_and_bell(order):
    """Also after contexts, and parts of them, that were never seen, and at the ends of the ring."""
    text = words(1, b"abcde").tolist()
    other = words(2, b"cdefg", n=60).tolist()
    reference = Reference(text, order)
    grams = ngram.grams_of(np.array(other), order)
    found = ngram.predict(ngram.fit(np.array(text), order), grams)
    unseen = 0
    for t in range(len(other)):
        context = tuple(other[t - back] for back in range(order - 1, 0, -1))
        assert grams[t] == as_gram((*context, other[t]))
        assert found[t] == pytest.approx(reference.probability(context, other[t]), rel=1e-12)
        unseen += context not in reference.after
    assert unseen > 10 or order == 1


@pytest.mark.parametrize("context", [b"ab", b"ac", b"za", b"zz", (END, ord("a")), (255, END)])
def test_probabilities_sum_to_1(context):
    text = words(3, b"abc")
    grams = np.array([as_gram((*context, x)) for x in range(257)])
    p = ngram.predict(ngram.fit(text, 3), grams)
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_largest_order_has_room_in_64_bits():
    symbols = np.full(9, END)
    assert ngram.grams_of(symbols, 7)[0] == as_gram([END] * 7) < 2**63


# ---- EM ------------------------------------------------------------------------------------------

def log_likelihood(p, weight, w):
    return weight @ np.log(p @ w)


def problem(seed, K, n=50):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(n, 0.3), K).T + 1e-6, rng.dirichlet(np.ones(n))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("K", [2, 3])
def test_em_finds_the_best_of_a_grid(K, seed):
    p, weight = problem(seed, K)
    w = ngram.em(p, weight, gap=1e-9)
    assert w.shape == (K,)
    assert w.sum() == pytest.approx(1, abs=1e-12)
    steps = 200
    best = -math.inf
    for i in range(steps + 1):
        for j in range(steps + 1 - i):
            if K == 2:
                j = steps - i
            shares = np.array([i, j, steps - i - j])[:K] / steps
            value = log_likelihood(p, weight, shares)
            if value > best:
                best = value
                best_shares = shares
    assert np.abs(w - best_shares).max() <= 1.5 / steps
    assert log_likelihood(p, weight, w) >= best


def test_em_leaves_a_useless_source():
    """The second source is worse everywhere, so that the best mixture is on the edge."""
    p, weight = problem(5, 2)
    p[:, 1] = 0.5 * p[:, 0]
    assert ngram.em(p, weight, gap=1e-9)[1] < 1e-5


def test_em_gives_each_source_its_part():
    """One step, written out: the mean probability that a row comes from the source."""
    p, weight = problem(8, 3)
    expected = np.zeros(3)
    for i in range(len(p)):
        for k in range(3):
            expected[k] += weight[i] * p[i, k] / sum(p[i])
    np.testing.assert_allclose(ngram.em(p, weight, most_steps=1), expected, rtol=1e-12)


def test_em_never_lowers_the_likelihood():
    p, weight = problem(6, 5)
    values = []
    for steps in range(30):
        values.append(log_likelihood(p, weight, ngram.em(p, weight, gap=0, most_steps=steps)))
    assert values[0] == pytest.approx(log_likelihood(p, weight, np.full(5, 0.2)))
    assert (np.diff(values) >= -1e-14).all()
    assert values[-1] > values[0] + 0.01


def test_em_stops_within_the_gap():
    p, weight = problem(7, 5)
    best = log_likelihood(p, weight, ngram.em(p, weight, gap=1e-12))
    for gap in (1e-1, 1e-3, 1e-5):
        value = log_likelihood(p, weight, ngram.em(p, weight, gap=gap))
        assert best - gap <= value < best - gap / 1e4  # and stops early


# ---- sets ----------------------------------------------------------------------------------------

def text_set(folder, train, val=None):
    val = train if val is None else val
    write_set(folder, {"train": train, "val": val, "test": val}, 257, tokenizer="bytes")


def example_set(folder, parts):
    """Examples from [(prompt, response), ...], in bytes; all splits are the same."""
    ids = []
    mask = []
    for prompt, response in parts:
        ids += [*prompt, *response, END]
        mask += [0] * len(prompt) + [1] * (len(response) + 1)
    splits = dict.fromkeys(("train", "val", "test"), np.array(ids))
    masks = dict.fromkeys(splits, np.array(mask, np.uint8))
    write_set(folder, splits, 257, tokenizer="bytes", schema="prompt/response", masks=masks)


def open_sets(data, *names):
    return [TokenSet(data, name, 32) for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sources and a target that is 0.6 of a and 0.4 of c."""
    folder = tmp_path_factory.mktemp("ngram") / "data"
    for seed, (name, letters) in enumerate({"a": b"abcd", "b": b"bcde", "c": b"cdefg"}.items()):
        text_set(folder / name, words(seed, letters, n=20_000))
    mixed = np.concatenate([words(0, b"abcd", n=6_000), words(2, b"cdefg", n=4_000)])
    text_set(folder / "target", mixed)
    return folder


def test_mixture_is_what_the_target_is_made_of(data):
    a, b, c, target = open_sets(data, "a", "b", "c", "target")
    shares, bits, uniform_bits = ngram.ngram_mixture([a, b, c], [target], [1.0])
    assert np.abs(shares - [0.6, 0, 0.4]).max() < 0.03
    assert bits < uniform_bits - 0.05
    # the bits of the mixture, one symbol after the other
    models = [Reference(s.tokens("train").tolist(), 3) for s in (a, b, c)]
    ids = target.tokens("val").tolist()
    total = 0.0
    for t in range(len(ids)):
        context = (ids[t - 2], ids[t - 1])
        p = [model.probability(context, ids[t]) for model in models]
        total -= math.log2(np.dot(shares, p))
    assert bits == pytest.approx(total / (len(ids) - ids.count(END)), rel=1e-9)


def test_targets_count_by_their_weights(data):
    a, c = open_sets(data, "a", "c")
    for weight in (0.2, 0.7):
        shares, _, _ = ngram.ngram_mixture([a, c], [a, c], [weight, 1 - weight], order=1)
        # a and c share two letters, and are else told apart by one symbol
        again, _, _ = ngram.ngram_mixture([c, a], [c, a], [1 - weight, weight], order=1)
        np.testing.assert_allclose(shares, again[::-1], atol=1e-9)
        assert abs(shares[0] - weight) < 0.05


def piece(rng, letters, n=8):
    return rng.choice(list(letters), n).tolist()


@pytest.fixture
def masked(tmp_path):
    """
    Examples with prompts of x and y and responses of a and b: `half` learns the responses, `whole`
    is the same text with all of it learned. `target` has z in its responses, too.
    """
    rng = np.random.default_rng(0)
    parts = [(piece(rng, b"xy"), piece(rng, b"ab")) for _ in range(100)]
    example_set(tmp_path / "half", parts)
    example_set(tmp_path / "whole", [([], prompt + response) for prompt, response in parts])
    parts = [(piece(rng, b"xy"), piece(rng, b"aabz")) for _ in range(100)]
    example_set(tmp_path / "target", parts)
    # only the last symbol of a prompt is seen from its response, if the order is 2
    parts = [(piece(rng, b"pqz", 9) + prompt[-1:], response) for prompt, response in parts]
    example_set(tmp_path / "other_prompts", parts)
    text_set(tmp_path / "text", words(1, b"xyz", n=3000))
    return tmp_path


def test_shares_are_of_tokens(masked):
    """Two sources have one text and so the same share of learned symbols. The one of which half as
    much is learned gets twice the tokens."""
    half, whole, target = open_sets(masked, "half", "whole", "target")
    shares, _, _ = ngram.ngram_mixture([half, whole], [target], [1.0])
    assert half.density("train") < 0.6
    assert shares[0] / shares[1] == pytest.approx(whole.density("train") / half.density("train"))


def test_only_learned_symbols_of_the_target_count(masked):
    """Against a grid, by models of whole examples."""
    half, text, target = open_sets(masked, "half", "text", "target")
    shares, bits, uniform_bits = ngram.ngram_mixture([half, text], [target], [1.0], order=2)
    symbols = target.tokens("val").tolist()
    learned = np.flatnonzero(target.mask("val"))
    models = [Reference(s.tokens("train").tolist(), 2) for s in (half, text)]
    p = []
    for t in learned:
        p.append([model.probability((symbols[t - 1],), symbols[t]) for model in models])
    p = np.array(p)
    n_bytes = len(learned) - symbols.count(END)

    grid = np.linspace(0.001, 0.999, 999)
    values = [np.log(p @ [share, 1 - share]).sum() for share in grid]
    density = np.array([half.density("train"), text.density("train")])
    w = shares * density / (shares * density).sum()
    assert abs(w[0] - grid[np.argmax(values)]) < 0.002
    assert bits == pytest.approx(-np.log2(p @ w).sum() / n_bytes)
    w = density / density.sum()
    assert uniform_bits == pytest.approx(-np.log2(p @ w).sum() / n_bytes)


def test_prompts_of_the_target_do_not_count(masked):
    half, text, target, other = open_sets(masked, "half", "text", "target", "other_prompts")
    expected = ngram.ngram_mixture([half, text], [target], [1.0], order=2)
    found = ngram.ngram_mixture([half, text], [other], [1.0], order=2)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-12)


def test_long_splits_are_read_in_stretches(data, monkeypatch):
    a, = open_sets(data, "a")
    whole, _, _ = ngram.read_symbols(a, "train")
    monkeypatch.setattr(ngram, "MOST_TOKENS", 6400)
    symbols, learned, _ = ngram.read_symbols(a, "train")
    assert len(symbols) == len(learned) == 6400
    np.testing.assert_array_equal(symbols[:100], whole[:100])
    np.testing.assert_array_equal(symbols[-100:], whole[-100:])
    step = (len(whole) - 100) / 63
    np.testing.assert_array_equal(symbols[3200:3300], whole[int(32 * step):][:100])


# ---- other tokenizers ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """The same text in bytes (data/) and in tokens of up to three bytes (data-bpe/)."""
    folder = tmp_path_factory.mktemp("tokenized")
    rng = np.random.default_rng(0)
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b"cd", b" e", "é".encode()]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "t.tiktoken").write_bytes(b"\n".join(lines))
    pieces = {"many": ["abc", "ab", "cd", " e"], "few": ["b", "ca", "dx", "é"]}
    pieces["target"] = pieces["many"] + pieces["few"]
    for name, choices in pieces.items():
        documents = ["".join(rng.choice(choices, 60)) for _ in range(120)]
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    paths = [f"{name}={name}.jsonl" for name in pieces]
    run("prepare_data.py", *paths, cwd=folder)
    run("prepare_data.py", *paths, "--tokenizer", "t.tiktoken", "--data_dir", "data-bpe",
        cwd=folder)
    return folder


def test_tokenizers_agree_on_shares_of_bytes(tokenized, monkeypatch):
    monkeypatch.chdir(tokenized)
    in_bytes = open_sets("data", "many", "few", "target")
    in_tokens = open_sets("data-bpe", "many", "few", "target")
    for some, others in zip(in_bytes, in_tokens):
        symbols, _, _ = ngram.read_symbols(some, "train")
        again, learned, symbols_per_token = ngram.read_symbols(others, "train")
        np.testing.assert_array_equal(again, symbols)
        assert learned.all()
        assert symbols_per_token == len(symbols) / len(others.tokens("train"))
    assert len(in_tokens[0].tokens("train")) < 0.6 * len(in_bytes[0].tokens("train"))

    shares, bits, uniform_bits = ngram.ngram_mixture(in_bytes[:2], in_bytes[2:], [1.0])
    of_tokens, token_bits, _ = ngram.ngram_mixture(in_tokens[:2], in_tokens[2:], [1.0])
    assert token_bits == pytest.approx(bits, rel=1e-12)
    assert bits < uniform_bits
    bytes_per_token = [len(some.tokens("train")) / len(others.tokens("train"))
                       for some, others in zip(in_bytes[:2], in_tokens[:2])]
    size = of_tokens * bytes_per_token
    np.testing.assert_allclose(size / size.sum(), shares, rtol=1e-12)
    assert abs(of_tokens[0] - shares[0]) > 0.05


def test_tokenizer_that_is_gone_or_another_one(tokenized, tmp_path):
    args = ("--sources", "many,few", "--target", "target", "--data_dir", tokenized / "data-bpe")
    line = refused("tests/ngram.py", *args, cwd=tmp_path)
    assert "cannot read t.tiktoken" in line and "No such file" in line
    content = (tokenized / "t.tiktoken").read_bytes()
    (tmp_path / "t.tiktoken").write_bytes(content.rpartition(b"\n")[0])
    line = refused("tests/ngram.py", *args, cwd=tmp_path)
    assert "'target' was made with the tokenizer t.tiktoken:" in line and "is now" in line
    assert not (tmp_path / "ngram.json").exists()


# ---- the program ---------------------------------------------------------------------------------

def test_fastmix_takes_the_file(data):
    folder = data.parent
    args = ("--sources", "a,b,c", "--target", "target=2,a")
    text = run("tests/ngram.py", *args, cwd=folder)
    result = json.loads((folder / "ngram.json").read_text())
    a, b, c, target = open_sets(data, "a", "b", "c", "target")
    shares, bits, uniform_bits = ngram.ngram_mixture([a, b, c], [target, a], [2 / 3, 1 / 3])
    assert result["mixture"] == dict(zip("abc", shares.tolist()))
    assert (result["unit"], result["order"], result["tokenizer"]) == ("tokens", 3, "bytes")
    assert (result["bits_per_byte"], result["uniform_bits_per_byte"]) == (bits, uniform_bits)
    for name, share in result["mixture"].items():
        assert f"{name:16s} {20_000:14,d}  {share:.3f}" in text.splitlines()
    assert f"{result['seconds']:.1f} s" in text

    run("fastmix.py", "--sources", "a,b,c", "--target", "target", "--mixture", "ngram.json", *TINY,
        "--max_steps", "2", cwd=folder)
    for name, share in result_json(folder / "out")["mixture"].items():
        assert share == pytest.approx(result["mixture"][name], abs=1e-7)

    # its own file is replaced, without being asked
    run("tests/ngram.py", *args, "--order", "2", cwd=folder)
    assert json.loads((folder / "ngram.json").read_text())["order"] == 2


def test_the_sample_is_the_default(data, tmp_path):
    for name in ("prose", "python", "numpy"):
        text_set(tmp_path / "data" / name, words(1, b"abc"))
    run("tests/ngram.py", cwd=tmp_path)
    result = json.loads((tmp_path / "ngram.json").read_text())
    assert list(result["mixture"]) == ["python", "prose"]
    assert result["target"] == {"numpy": 1.0}
    # with --sources and no target, their own val splits
    run("tests/ngram.py", "--sources", "a,c", cwd=data.parent, status=0)
    result = json.loads((data.parent / "ngram.json").read_text())
    assert result["target"] == {"a": 1.0, "c": 1.0}


@pytest.mark.parametrize("args, words_of_error", [
    (["--sources", "a,nothing"], "no set 'nothing'"),
    (["--sources", "a,,b"], "--sources 'a,,b'"),
    (["--sources", "a,a"], "--sources 'a,a'"),
    (["--sources", "a=2,b"], "names alone"),
    (["--target", "a=x"], "--target 'a=x'"),
    (["--target", "a=0,b"], "--target 'a=0,b'"),
    (["--target", "a=inf"], "--target 'a=inf'"),
    (["--target", ""], "--target ''"),
    (["--data_dir", "gone"], "no set 'a' in gone/"),
    (["--data_dir", ""], "--data_dir is empty"),
    (["--order", "0"], "--order 0"),
    (["--order", "8"], "--order 8"),
    (["--block_size", "0"], "--block_size 0"),
    (["--block_size", "30000"], "too short for --block_size 30000"),
    (["--out", "gone/x.json"], "--out gone/x.json"),
    (["--out", "folder.json"], "--out folder.json"),
    (["--out", "x.txt"], "must end in .json"),
    (["--out", "other.json"], "--overwrite"),
    (["--out", "list.json"], "--overwrite"),
    (["--out", "dangling.json"], "--overwrite"),
    (["--sources", "a,bpe"], "'bpe' was made with the tokenizer other"),
    (["--sources", "a,damaged"], "holds token id 300"),
])
def test_bad_input(data, args, words_of_error):
    folder = data.parent
    if not (folder / "folder.json").exists():
        (folder / "folder.json").mkdir()
        (folder / "dangling.json").symlink_to("nowhere")
        splits = dict.fromkeys(("train", "val", "test"), np.arange(99))
        write_set(data / "bpe", splits, 257, tokenizer="other")
        text_set(data / "damaged", np.array([*range(90), 300, END]))
    (folder / "other.json").write_text('{"mixture": {"a": 1.0}}')
    (folder / "list.json").write_text("[1]")
    given = ["--sources", "a,b,c", "--target", "target", *args]
    line = refused("tests/ngram.py", *given, cwd=folder)
    assert words_of_error in line
    assert (folder / "other.json").read_text() == '{"mixture": {"a": 1.0}}'
    assert (folder / "list.json").read_text() == "[1]"


def test_overwrite_replaces_another_file(data, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    run("tests/ngram.py", "--sources", "a,b", "--target", "target", "--data_dir", data, "--out",
        "x.json", "--overwrite", cwd=tmp_path)
    assert json.loads((tmp_path / "x.json").read_text())["method"] == "n-grams"
