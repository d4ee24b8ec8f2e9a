"""tests/ngram.py: models against plain Python, EM at its maximum, masks, tokenizers, bad input."""
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

import ngram
from conftest import refused, write_set
from prepare_data import SPLITS, TokenSet, get_tokenizer
from test_prepare import here  # noqa: F401  a fixture
from test_prepare import write_tiktoken

END = 256


def letters(seed, alphabet, n):
    """n symbols, some letters oftener than others, with an END behind each 50 or so."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice(list(alphabet), n, p=rng.dirichlet(np.ones(len(alphabet))))
    symbols[rng.integers(0, n, n // 50)] = END
    symbols[-1] = END
    return symbols


# ---- the model and EM ----------------------------------------------------------------------------

def witten_bell(text, order):
    """A function p(x, context) by dictionaries, of a text that is read as a ring."""
    after = defaultdict(Counter)  # {context: Counter of the symbols that follow it}
    for t in range(len(text)):
        for length in range(order):
            context = tuple(text[t - back] for back in range(length, 0, -1))
            after[context][text[t]] += 1

    def probability(x, context):
        shorter = 1 / 257
        if context:
            shorter = probability(x, context[1:])
        followers = after.get(context, {})
        n = sum(followers.values())
        if n == 0:
            return shorter
        return (followers[x] + len(followers) * shorter) / (n + len(followers))

    return probability


def test_probabilities_are_those_of_witten_and_bell(tmp_path):
    """Also after contexts that were never seen, and at the ends of the ring."""
    order = 7  # the highest
    text = letters(1, b"abcde", 400)
    other = letters(2, b"cdefg", 60)
    write_set(tmp_path / "set", {"train": text, "val": other, "test": other}, 257, "bytes")
    both = TokenSet(tmp_path, "set", 1)
    train, _, _ = ngram.read(both, "train", order)
    val, learned, per_token = ngram.read(both, "val", order)
    assert learned.all()
    assert per_token == 1
    probability = witten_bell(text.tolist(), order)
    expected = []
    for t in range(len(other)):
        context = tuple(other[t - back] for back in range(order - 1, 0, -1))
        expected.append(probability(other[t], context))
    assert ngram.predict(train, val, order) == pytest.approx(expected, rel=1e-12)


def test_em_ends_at_the_maximum():
    """No other weights are better by more than `gap`; a source that is worse everywhere gets 0."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(50, 0.3), 4).T + 1e-6  # (50, 4)
    p[:, 3] = 0.5 * p[:, 0]
    weight = rng.dirichlet(np.ones(50))
    w = ngram.em(p, weight, gap=1e-6)
    assert w.sum() == pytest.approx(1)
    assert w[3] < 1e-4
    likelihood = weight @ np.log(p @ w)
    for v in rng.dirichlet(np.ones(4), 500):
        # from w toward v, a little and all the way
        for share in (1e-3, 1e-2, 0.1, 1):
            assert weight @ np.log(p @ (w + share * (v - w))) < likelihood + 1e-6


# ---- sets ----------------------------------------------------------------------------------------

def write_examples(folder, seed, prompts, responses, masked=True):
    """300 examples of 8 prompt symbols and 8 response symbols, of which the latter are learned."""
    rng = np.random.default_rng(seed)
    ids = []
    for _ in range(300):
        ids += [*rng.choice(list(prompts), 8), *rng.choice(list(responses), 8), END]
    masks = None
    if masked:
        masks = dict.fromkeys(SPLITS, 300 * ([0] * 8 + [1] * 9))
    write_set(folder, dict.fromkeys(SPLITS, ids), 257, "bytes", masks=masks)


def found(folder, sources, target):
    """The mixture that the program finds, (K,), and the dict of the file that it writes."""
    out = folder / f"{sources}-{target}.json"
    ngram.main(["--sources", sources, "--target", target, "--data_dir", str(folder), "--out",
                str(out)])
    result = json.loads(out.read_text())
    assert list(result["mixture"]) == sources.split(",")
    return np.array(list(result["mixture"].values())), result


def test_mixture_is_what_the_target_is_made_of(tmp_path):
    """The val split has 0.6 of a and 0.4 of c; two targets count by their weights."""
    texts = {"a": letters(0, b"abcd", 20_000), "b": letters(1, b"bcde", 20_000),
             "c": letters(2, b"cdefg", 20_000)}
    texts["target"] = np.concatenate([texts["a"][:12_000], texts["c"][:8_000]])
    for name, text in texts.items():
        write_set(tmp_path / name, dict.fromkeys(SPLITS, text), 257, "bytes")
    mixture, _ = found(tmp_path, "a,b,c", "target")
    assert mixture == pytest.approx([0.6, 0, 0.4], abs=0.03)
    weighted, _ = found(tmp_path, "a,c", "a=0.2,c=0.8")
    assert weighted == pytest.approx([0.2, 0.8], abs=0.05)


def test_masks(tmp_path):
    """
    Of the target only responses count: its prompts are like `text`, which gets next to nothing.
    Two sources with one text share the learned symbols alike; the one of which 9 of 17 are learned
    gets as many more tokens.
    """
    write_examples(tmp_path / "half", 1, b"xy", b"ab")
    write_examples(tmp_path / "whole", 1, b"xy", b"ab", masked=False)
    write_examples(tmp_path / "text", 2, b"pq", b"pq", masked=False)
    write_examples(tmp_path / "target", 3, b"pq", b"ab")
    mixture, _ = found(tmp_path, "half,whole,text", "target")
    assert mixture[0] / mixture[1] == pytest.approx(17 / 9)
    assert mixture[2] < 0.1


def test_long_splits_are_read_in_stretches(tmp_path, monkeypatch):
    ids = np.arange(20_000) % 256
    write_set(tmp_path / "a", dict.fromkeys(SPLITS, ids), 257, "bytes")
    monkeypatch.setattr(ngram, "MOST_TOKENS", 6400)
    grams, _, _ = ngram.read(TokenSet(tmp_path, "a", 1), "train", 1)
    starts = np.arange(64) * 19_900 // 63
    assert grams.reshape(64, 100).tolist() == [ids[i:i + 100].tolist() for i in starts]


def write_tokenized(folder):
    """The same text in bytes (data/) and in tokens of up to three bytes (data-bpe/)."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b"cd", b" e", "é".encode()]
    write_tiktoken(folder / "t.tiktoken", tokens)
    pieces = {"many": ["abc", "ab", "cd", " e"], "few": ["b", "ca", "dx", "é"]}
    pieces["target"] = pieces["many"] + pieces["few"]
    for name, choices in pieces.items():
        text = "".join(np.random.default_rng(0).choice(choices, 6000))
        for data, tokenizer in (("data", "bytes"), ("data-bpe", str(folder / "t.tiktoken"))):
            encoding = get_tokenizer(tokenizer)
            ids = [*encoding.encode(text), encoding.eot_token]
            write_set(folder / data / name, dict.fromkeys(SPLITS, ids), encoding.n_vocab,
                      encoding.name)


def test_another_tokenizer_gives_the_same_shares_of_bytes(here):
    write_tokenized(here)
    in_bytes, result = found(here / "data", "many,few", "target")
    in_tokens, other = found(here / "data-bpe", "many,few", "target")
    ids = np.fromfile(here / "data/target/val.bin", np.uint16).tolist()
    p = np.zeros(len(ids))  # by the mixture of models
    for name, share in zip(("many", "few"), in_bytes):
        text = np.fromfile(here / "data" / name / "train.bin", np.uint16).tolist()
        model = witten_bell(text, 3)
        for t in range(len(ids)):
            p[t] += share * model(ids[t], (ids[t - 2], ids[t - 1]))
    assert result["bits_per_byte"] == pytest.approx(-np.log2(p).sum() / (len(ids) - 1))
    assert other["bits_per_byte"] == pytest.approx(result["bits_per_byte"])
    sizes = []  # symbols per token
    for name in ("many", "few"):
        sets = [TokenSet(data, name, 1) for data in ("data", "data-bpe")]
        sizes.append(sets[0].n_tokens("train") / sets[1].n_tokens("train"))
    assert sizes[0] > 1.5
    assert in_tokens * sizes / (in_tokens * sizes).sum() == pytest.approx(in_bytes)


def test_bad_input(tmp_path):
    write_tokenized(tmp_path)
    argv = ["tests/ngram.py", "--sources", "many,few", "--target", "target", "--data_dir"]
    (tmp_path / "ngram.json").write_text("mine")
    assert "FileExistsError" in refused(*argv, "data", cwd=tmp_path)
    assert (tmp_path / "ngram.json").read_text() == "mine"
    content = (tmp_path / "t.tiktoken").read_bytes()
    (tmp_path / "t.tiktoken").write_bytes(content + content)
    assert "was made with t.tiktoken:" in refused(*argv, "data-bpe", cwd=tmp_path)
