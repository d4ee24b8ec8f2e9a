"""The parts of tests/bench_mixtures.py that turn stored runs into claims."""
import json

import numpy as np
import torch

import bench_mixtures
from conftest import TINY, run


def test_regmix_style_search_finds_the_minimum_of_a_quadratic():
    best, rng = np.array([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(3)
    mixtures = rng.dirichlet(np.ones(4), 40)
    losses = 2 + ((mixtures - best) ** 2).sum(1) + 1e-4 * rng.standard_normal(40)
    assert np.abs(bench_mixtures.regmix(mixtures, losses) - best).max() < 0.05


def test_table_from_stored_lines(tmp_path):
    """
    Regret is paired by seed, against the fixed mixture that is best on average over the other seeds: for seed 12 it is
    random 0 and not random 2, whose lead is on seed 12 itself; for seed 13 it is random 2. Seed 11 measures nothing.
    """
    losses = {"uniform": (2.2, 2.4, 2.42), "proportional": (2.2, 2.3, 2.3), "random 0": (2.0, 2.2, 2.1),
              "random 1": (1.9, None, None), "random 2": (2.11, 2.0, 2.2),
              "FastMix: trajectory": (2.02, 2.2, 2.222), "FastMix: last_half_average": (2.04, 2.31, 2.31)}
    lines = []
    for what, values in losses.items():
        for seed, loss in zip((11, 12, 13), values):
            if loss:
                line = dict(zip(bench_mixtures.KEY, ("numpy", what, seed, 100, "base")), test_loss=loss, seconds=1.0)
                if "trajectory" not in what:  # a mixture found differs from seed to seed, and is no candidate
                    line["mixture"] = [0.1 * seed if "FastMix" in what else 0.5] * 6
                lines.append(json.dumps(line) + "\n")
    (tmp_path / "results.jsonl").write_text("".join(lines) + '{"task": "cut sho')
    out = run("tests/bench_mixtures.py", "--table", "--results", "results.jsonl", "--tasks", "numpy", "--seeds", 11, 12, 13,
              "--steps", 100, cwd=tmp_path)
    assert "numpy: best fixed mixture known 2.1000" in out and "(random 0: " in out
    assert "| uniform | 0.00 | +9.55 (+9.09 to +10.00) |" in out
    assert "FastMix, replayed trajectory** | 1." in out and "| +0.50 (+0.00 to +1.00) |" in out
    assert (tmp_path / "mixtures.png").stat().st_size > 10_000


def test_alignment_study_leaves_its_checkpoint_as_it_was(synthetic):
    """Each trial step is the first after the checkpoint: none finds the moments of the one before."""
    run("fastmix.py", *TINY, "--sources", "a,b", "--target", "target", "--max_steps", 5, "--out_dir", "study",
        cwd=synthetic)
    ckpt = torch.load(synthetic / "study" / "ckpt.pt", weights_only=True)
    once, again = (bench_mixtures.measure(synthetic, ["a", "b"], ["target"], ckpt) for _ in range(2))
    assert once == again and all(len(v) == 2 for v in once.values())
