"""Does the search find what was planted? Markov chains of known origin, through the command line."""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import TINY, run

SEARCHES = {  # name: (sources, seed, further flags)
    **{f"planted-{seed}": ("a,b,c,noise", seed) for seed in (0, 1, 2)},
    "weights": ("a,b,c,noise", 3, "--uniform_share", 1),
    "sampling": ("a,b,c,noise", 3, "--uniform_share", 0),
    "seldom": ("a,b,c,noise", 3, "--outer_every", 4),
    "all": ("a,b,c,noise", 3, "--alignment", "all", "--grad_accum", 2, "--batch_size", 4),
    "once": ("a,b,noise", 4),
    **{f"twice-{seed}": ("a,b,b2,noise", seed) for seed in (4, 5, 6)},
}


@pytest.fixture(scope="module")
def found(synthetic):
    """{name: mixture} of all searches, two at a time. `target` continues the chain of b; the noise is uniform."""
    def search(item):
        name, (sources, seed, *more) = item
        run("fastmix.py", *TINY, "--sources", sources, "--target", "target", "--seed", seed, "--max_steps", 100,
            "--learning_rate", 1e-2, "--learning_rate_mixture", 0.08, "--out_dir", name, *more, cwd=synthetic)
        return name, json.loads((synthetic / name / "mixture.json").read_text())["mixture"]
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(search, SEARCHES.items()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_source_that_is_the_target(found, seed):
    mixture = found[f"planted-{seed}"]
    assert mixture["b"] > 0.9, mixture
    assert max(mixture[n] for n in ("a", "c", "noise")) < 0.05, mixture


@pytest.mark.parametrize("name", ["weights", "sampling", "seldom", "all"])
def test_finds_it_by_every_variant(found, name):
    mixture = found[name]
    assert max(mixture, key=mixture.get) == "b" and mixture["b"] > 0.5, mixture


def test_a_source_given_twice_shares_its_weight(found):
    """Together both halves get what the source gets alone; between them only noise moves the mixture, and little."""
    for seed in (4, 5, 6):
        twice = found[f"twice-{seed}"]
        assert abs(twice["b"] + twice["b2"] - found["once"]["b"]) < 0.1, (found["once"], twice)
        assert 0.35 < twice["b"] / (twice["b"] + twice["b2"]) < 0.65, twice
