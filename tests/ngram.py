"""
A mixture in seconds and without training, to compare a search with: by what weights must the
predictions of the sources' byte n-gram models be averaged to predict the target best?

    python tests/ngram.py                                               the sample, toward numpy
    python tests/ngram.py --sources code,web,books --target task=2,web=1 --out ngram.json
    python fastmix.py --mixture ngram.json --out_dir out-ngram          train at what was found

An n-gram model p_k of each source k is fitted to its train split. --order is n: at 3, the default,
pieces of three bytes are counted, so that a symbol x is predicted by the two before it, its context
c. Then EM finds the weights w of the sources, which sum to 1, that make the target's val split
likeliest:

    maximise over w   sum_t log sum_k w_k p_k(x_t | c_t)

This is akin to MixMin (arXiv 2502.10510), which has a neural model for each source, and to DSIR
(arXiv 2302.03169), which selects documents by n-grams. What lies beyond the context is not seen,
nor that a text teaches less when it is read again. And w weighs predictions, while a model that is
trained on a mixture of texts weighs its sources anew in each context.

Tokens are turned into bytes, so that an order means the same with every tokenizer. <|endoftext|> is
a symbol beside the 256 bytes: it is predicted as they are, and a context reaches over it into the
document before. Of examples the models read prompts and responses, but of the target only learned
symbols count, and several targets are weighed by their losses per byte. w_k is taken for source k's
share of the learned symbols. With d_k of these per token of the source, its share of the tokens is
in proportion to w_k / d_k. That is what --mixture takes.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastmix import parse_pairs, parse_weights  # noqa: E402
from prepare_data import (SAMPLE_TARGETS, fail, get_tokenizer, load_sets,  # noqa: E402
                          prepare_sample, sample_sources, save_atomically, say)

END = 256  # the symbol of <|endoftext|>
SYMBOLS = 257
# Of a longer split so many tokens are read, in stretches from all of it.
MOST_TOKENS = 2**22
STRETCHES = 64


# ---- symbols -------------------------------------------------------------------------------------

def read_symbols(token_set, split):
    """
    A split of a TokenSet -> (its symbols (n,), whether each is learned (n,), symbols per token of
    what is learned).
    """
    ids = token_set.tokens(split)
    learned = np.ones(len(ids), bool)
    if token_set.masked:
        learned = token_set.mask(split) > 0
    if len(ids) > MOST_TOKENS:
        length = MOST_TOKENS // STRETCHES
        starts = np.linspace(0, len(ids) - length, STRETCHES).astype(np.int64)
        at = (starts[:, None] + np.arange(length)).ravel()
        ids = ids[at]
        learned = learned[at]
    if ids.max() >= token_set.vocab_size:
        token_set.fail_damaged(f"{token_set.name}/{split}.bin holds token id {ids.max()}, outside "
                               f"the vocabulary of {token_set.vocab_size}")
    if token_set.tokenizer == "bytes":  # its ids are the symbols
        return ids.astype(np.int64), learned, 1.0

    encoding = open_tokenizer(token_set)
    symbols_of = {token_set.meta["eot_token"]: np.array([END])}
    for token in np.unique(ids).tolist():
        if token not in symbols_of:
            text = encoding.decode_single_token_bytes(token)
            symbols_of[token] = np.frombuffer(text, np.uint8).astype(np.int64)
    pieces = [symbols_of[token] for token in ids.tolist()]
    lengths = np.array([len(piece) for piece in pieces])
    return np.concatenate(pieces), np.repeat(learned, lengths), lengths[learned].mean()


def open_tokenizer(token_set):
    """The tiktoken.Encoding that a set was made with."""
    # the settings have a file's path, the tokenizer's name a digest of its content
    name = token_set.meta.get("settings", {}).get("tokenizer", token_set.tokenizer)
    try:
        encoding = get_tokenizer(name)
    except OSError as error:
        fail(f"cannot read {name}, the tokenizer of '{token_set.name}' ({error.strerror}); start "
             "where prepare_data.py was started, or put the file there")
    if encoding.name != token_set.tokenizer:
        fail(f"'{token_set.name}' was made with the tokenizer {token_set.tokenizer}, but {name} is "
             f"now {encoding.name}; put the old file back, or prepare the sets again")
    return encoding


def grams_of(symbols, order):
    """
    The gram that ends at each symbol, (n,): it and the order - 1 symbols before it, as the digits
    of a number to the base 257. The text is read as a ring, so that the first symbols have a
    context, too.
    """
    grams = np.zeros(len(symbols), np.int64)
    for back in range(order - 1, -1, -1):
        grams = grams * SYMBOLS + np.roll(symbols, back)
    return grams


# ---- the model of a source -----------------------------------------------------------------------

def fit(symbols, order):
    """
    The n-gram model of a text. For each length from 1 to `order` it has the grams of the text and
    how often each is there, both (G,), the grams' contexts, how often each of these is there, and
    how many different symbols follow it, all (C,). Grams and contexts are ascending.
    """
    grams, counts = np.unique(grams_of(symbols, order), return_counts=True)
    model = []
    for _ in range(order):
        contexts, first, followers = np.unique(grams // SYMBOLS, return_index=True,
                                               return_counts=True)
        totals = np.add.reduceat(counts, first)
        model.append((grams, counts, contexts, totals, followers))
        # In a ring every context is also a gram, which is shorter by one symbol.
        grams = contexts
        counts = totals
    return model[::-1]


def look_up(wanted, keys, values):
    """The values (m,) that belong to ascending keys (m,), for the keys wanted (n,); 0 if none."""
    at = np.searchsorted(keys, wanted)
    at = np.minimum(at, len(keys) - 1)  # behind the last one
    return np.where(keys[at] == wanted, values[at], 0)


def predict(model, grams):
    """
    The probability of the last symbol x of each gram after its context c, (n,), by Witten and Bell.
    With N the count of c, T the number of different symbols that follow it, and c' the context
    without its first symbol, it is

        p(x | c) = (count(c x) + T p(x | c')) / (N + T)      or p(x | c'), where c was never seen.

    Below the empty context stands p(x) = 1 / 257.
    """
    p = np.full(len(grams), 1 / SYMBOLS)
    for length, (known, counts, contexts, totals, followers) in enumerate(model, 1):
        shorter = grams % SYMBOLS**length  # the last symbols
        count = look_up(shorter, known, counts)
        N = look_up(shorter // SYMBOLS, contexts, totals)
        T = look_up(shorter // SYMBOLS, contexts, followers)
        seen = N > 0
        p[seen] = (count[seen] + T[seen] * p[seen]) / (N[seen] + T[seen])
    return p


# ---- the mixture ---------------------------------------------------------------------------------

def em(p, weight, gap=1e-5, most_steps=10_000):
    """
    The w (K,) that maximises sum_i weight_i log sum_k w_k p_ik, for p (n, K), and weights (n,) that
    sum to 1. A step gives each source the share of the text that, at the w of the moment, is
    ascribed to it; by this the sum never falls. The slopes are the derivatives by w. Since the sum
    is concave and sum_k w_k slope_k = 1, it is at most max slope - 1 below its maximum: the steps
    end where that is `gap`, in nats.
    """
    w = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(most_steps):
        slope = (weight / (p @ w)) @ p  # (K,)
        if slope.max() <= 1 + gap:
            break
        w = w * slope
    return w / w.sum()


def read_targets(targets, target_weights, order):
    """
    The different grams of the targets that end in a learned symbol (n,), and what each counts in
    the targets' loss per byte (n,), which is weighed by target_weights (J,).
    """
    grams = []
    counts_per_byte = []
    for target, weight in zip(targets, target_weights):
        symbols, learned, _ = read_symbols(target, "val")
        different, counts = np.unique(grams_of(symbols, order)[learned], return_counts=True)
        n_bytes = np.count_nonzero(symbols[learned] != END)
        grams.append(different)
        counts_per_byte.append(weight * counts / n_bytes)
    return np.concatenate(grams), np.concatenate(counts_per_byte)


def read_sources(sources, grams, order):
    """
    How likely each source's model finds the last symbol of each gram (n,), p (n, K), and d (K,),
    the sources' learned symbols per token: 1 for text in bytes, less where prompts are not learned.
    """
    p = np.empty((len(grams), len(sources)))
    d = np.empty(len(sources))
    for k, source in enumerate(sources):
        symbols, _, symbols_per_token = read_symbols(source, "train")
        p[:, k] = predict(fit(symbols, order), grams)
        d[k] = source.density("train") * symbols_per_token
    return p, d


def ngram_mixture(sources, targets, target_weights, order=3):
    """
    TokenSets, and weights of the targets (J,) that sum to 1 -> (the mixture in shares of tokens
    (K,), the target's bits per byte by it, those by the uniform mixture).
    """
    grams, counts_per_byte = read_targets(targets, target_weights, order)
    p, d = read_sources(sources, grams, order)
    w = em(p, counts_per_byte / counts_per_byte.sum())
    bits = -counts_per_byte @ np.log2(p @ w)
    uniform = d / d.sum()  # equal shares of tokens, as shares of learned symbols
    uniform_bits = -counts_per_byte @ np.log2(p @ uniform)
    shares = w / d  # the fewer of its tokens are learned, the more of them it takes
    return shares / shares.sum(), bits, uniform_bits


# ---- the command line ----------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, usage="python tests/ngram.py [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sources", help="comma-separated names of prepared sets (default: the sample's)")
    add("--target", help="sets to do well on: a,b or a=2,b=1 (default: the sample's, or --sources)")
    add("--data_dir", default="data", help="where prepare_data.py wrote (data)")
    add("--block_size", type=int, default=64, help="of fastmix.py, which cuts examples (64)")
    add("--order", type=int, default=3, help="length of the n-grams, in bytes (3)")
    add("--out", type=Path, default="ngram.json", help="gets the mixture (ngram.json)")
    add("--overwrite", action="store_true", help="replace a file that this program did not write")
    args = parser.parse_args(argv)
    if not 1 <= args.order <= 7:  # 257**7 is below 2**63
        fail(f"--order {args.order} is out of range; it must be from 1 to 7")
    if args.block_size < 1:
        fail(f"--block_size {args.block_size} is out of range; it must be 1 or more")
    if args.data_dir == "":
        fail("--data_dir is empty; leave it out, or give it a value")
    check_out(args)
    return args


def check_out(args):
    """Refuses a place that cannot be written, or holds a file that is not this program's."""
    if args.out.suffix != ".json":
        fail(f"--out {args.out} must end in .json, by which fastmix.py --mixture knows a file")
    if not args.out.parent.is_dir() or args.out.is_dir():
        fail(f"--out {args.out} cannot be written; name a file in a folder that exists")
    if not os.path.lexists(args.out) or args.overwrite:  # a link that leads nowhere is there, too
        return
    try:
        written_by = json.loads(args.out.read_text())["method"]
    except (OSError, ValueError, KeyError, TypeError):
        written_by = None
    if written_by != "n-grams":
        fail(f"--out {args.out} exists and is not from tests/ngram.py; choose another name, or "
             "replace it with --overwrite")


def main(argv=None):
    args = parse_args(argv)
    if args.sources is None:
        prepare_sample(args.data_dir)
        args.sources = ",".join(sample_sources(args.data_dir))
        if args.target is None:
            args.target = SAMPLE_TARGETS[0]
    if args.target is None:
        args.target = args.sources
    names = list(parse_pairs("--sources", args.sources))
    if "=" in args.sources:
        fail(f"--sources '{args.sources}' must be names alone")
    weights = parse_weights("--target", args.target)
    if 0 in weights.values():
        fail(f"--target '{args.target}': leave out a target that weighs nothing")
    sets = load_sets(args.data_dir, names, list(weights), args.block_size)

    started = time.perf_counter()
    sources = [sets[name] for name in names]
    targets = [sets[name] for name in weights]
    target_weights = np.array(list(weights.values())) / sum(weights.values())
    shares, bits, uniform_bits = ngram_mixture(sources, targets, target_weights, args.order)
    seconds = time.perf_counter() - started

    result = {
        "mixture": dict(zip(names, shares.tolist())),
        "unit": "tokens",
        "method": "n-grams",
        "order": args.order,
        "target": weights,
        "bits_per_byte": bits,
        "uniform_bits_per_byte": uniform_bits,
        "tokenizer": sources[0].tokenizer,
        "seconds": round(seconds, 3)}
    text = json.dumps(result, indent=1) + "\n"
    save_atomically(args.out, lambda file: file.write(text.encode()))
    say(f"{'source':16s} {'tokens':>14s}  share")
    for source, share in zip(sources, shares):
        say(f"{source.name:16s} {source.available('train'):14,d}  {share:.3f}")
    say(f"target {', '.join(weights)}, val split: {bits:.4f} bits per byte by this mixture of "
        f"{args.order}-gram models, {uniform_bits:.4f} by the uniform one\n"
        f"wrote {args.out}, found in {seconds:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that may not be written
        fail(error)
