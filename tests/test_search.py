"""Does the search find what was planted? Markov chains of known origin, through the command line."""
import json

import pytest

from conftest import TINY, run


def search(synthetic, out, sources, seed, *more):
    run("fastmix.py", *TINY, "--sources", sources, "--target", "target", "--seed", seed, "--max_steps", 200,
        "--learning_rate", 1e-2, "--learning_rate_mixture", 0.05, "--out_dir", out, *more, cwd=synthetic)
    return json.loads((synthetic / out / "mixture.json").read_text())["mixture"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_source_that_is_the_target(synthetic, seed):
    """`target` continues the chain of b; the noise is uniform."""
    mixture = search(synthetic, f"planted-{seed}", "a,b,c,noise", seed)
    assert mixture["b"] > 0.8, mixture
    assert max(mixture[n] for n in ("a", "c", "noise")) < 0.1, mixture


@pytest.mark.parametrize("more", [("--uniform_share", 1), ("--uniform_share", 0), ("--outer_every", 4)])
def test_finds_it_at_both_ends_of_the_equivalence(synthetic, more):
    mixture = search(synthetic, f"ends-{more[0][2:]}-{more[1]}", "a,b,c,noise", 3, *more)
    assert max(mixture, key=mixture.get) == "b" and mixture["b"] > 0.5, mixture


def test_a_source_given_twice_shares_its_weight(synthetic):
    """
    Both halves keep a part, and together they get what the source gets alone. They need not be equal in one run:
    between two equal alignments Adam moves on noise alone, so it is their average over seeds that is symmetric.
    """
    once = search(synthetic, "once", "a,b,noise", 4)
    shares = []
    for seed in range(4, 8):
        twice = search(synthetic, f"twice-{seed}", "a,b,b2,noise", seed)
        assert abs(twice["b"] + twice["b2"] - once["b"]) < 0.1, (once, twice)
        shares.append(twice["b"] / (twice["b"] + twice["b2"]))
        assert 0.1 < shares[-1] < 0.9, shares
    assert 0.3 < sum(shares) / len(shares) < 0.7, shares
