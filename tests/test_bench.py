"""The benches: README's table is what the stored runs give, and a surface finds a minimum."""
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import bench_tables  # noqa: E402
from bench_methods import regmix  # noqa: E402
from bench_tables import response_surface  # noqa: E402


def test_readme_has_the_table_of_the_stored_runs(capsys):
    bench_tables.main([])
    printed = capsys.readouterr().out.splitlines()
    readme = (HERE.parent / "README.md").read_text().splitlines()
    start = readme.index(next(line for line in readme if line.startswith("| | uniform |")))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), readme[start:]))
    assert len(rows) == 11  # titles, a line, eight tasks and their mean
    assert [row for row in rows[2:] if row not in printed] == []


def quadratic_runs(rng, n):
    """
    {mixture: {seed: loss}} of a loss with its minimum at (0.5, 0.3, 0.2); each mixture ran on one
    of three seeds, the first four on all of them.
    """
    best = np.array([0.5, 0.3, 0.2])
    level = {11: 0.0, 12: 0.02, 13: -0.02}
    runs = {}
    for i, mixture in enumerate(rng.dirichlet([2, 2, 2], n)):
        loss = 2 + 0.5 * ((mixture - best) ** 2).sum()
        seeds = [11 + i % 3]
        if i < 4:
            seeds = level
        runs[tuple(mixture)] = {seed: loss + level[seed] + rng.normal(0, 1e-3) for seed in seeds}
    return runs, best


def test_a_surface_finds_the_minimum_of_a_quadratic():
    rng = np.random.default_rng(0)
    runs, best = quadratic_runs(rng, 40)
    surface = response_surface(runs)
    candidates = rng.dirichlet([1, 1, 1], 2000)
    found = candidates[surface.predict(candidates).argmin()]
    assert np.abs(found - best).max() < 0.05
    # the levels of the seeds are not taken for the mixtures'
    effects = [surface.seed_effect[seed] for seed in (11, 12, 13)]
    assert effects == pytest.approx([0, 0.02, -0.02], abs=3e-3)
    assert surface.predict(best)[0] == pytest.approx(2, abs=3e-3)
    # what it says that it may be off by is about what it is off by
    error = surface.predict([best, [0.2, 0.4, 0.4]]) - [2, 2 + 0.5 * 0.14]
    assert abs(error[0] - error[1]) < 3 * surface.doubt(best, [0.2, 0.4, 0.4])


def test_regmix_finds_the_minimum_of_a_quadratic():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet([1, 1, 1], 32)
    best = np.array([0.5, 0.3, 0.2])
    losses = 2 + ((mixtures - best) ** 2).sum(1)
    assert regmix(mixtures, losses) == pytest.approx(best, abs=0.02)
