"""The run that the mixture is for: caps, bounds, repetition, weighted targets."""
import json
import sys

import numpy as np
import pytest

import fastmix
import prepare_data
from conftest import TINY, chain_set, example_set, log_rows, refused, run, write_set
from model import parse_names, plan, read_bounds

BASE = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", 60]


class Source:

    def __init__(self, name, n):
        self.name, self.n, self.visible = name, n, 1.0

    def available(self, split):
        return self.n


def args_of(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["fastmix.py", *map(str, flags)])
    return fastmix.parse_args({})


def planned(monkeypatch, sizes, *flags):
    sources = [Source(f"s{k}", n) for k, n in enumerate(sizes)]
    bounds = plan(args_of(monkeypatch, *flags), sources, 16)
    return bounds, sources


def test_caps_are_epochs_of_the_real_run(monkeypatch):
    """No source gets more than E N_k / R; what the proxy is shown shrinks in proportion to the length."""
    bounds, sources = planned(monkeypatch, [2e9, 10e9, 80e9], "--train_tokens", 25e9, "--max_steps", 1000,
                              "--block_size", 64)
    np.testing.assert_allclose(bounds, [[0, 0, 0], [4 * 2 / 25, 1, 1]])
    assert all(s.visible == pytest.approx(1000 * 16 * 64 / 25e9) for s in sources)
    bounds, sources = planned(monkeypatch, [2e9, 10e9, 80e9], "--train_tokens", 25e9, "--max_epochs", 1, "--bounds",
                              "s1=0.1:0.2,s2=:0.9,s0=0.01:")
    np.testing.assert_allclose(bounds, [[0.01, 0.1, 0], [0.08, 0.2, 0.9]])
    bounds, sources = planned(monkeypatch, [1000, 1000], "--train_tokens", 100)  # shorter than the proxy's own run
    np.testing.assert_allclose(bounds, [[0, 0], [1, 1]])
    assert all(s.visible == 1 for s in sources)
    bounds, sources = planned(monkeypatch, [5, 5])
    np.testing.assert_allclose(bounds, [[0, 0], [1, 1]])


@pytest.mark.parametrize("sizes, flags, most", [
    ([1e9, 2e9], [], 12e9), ([1e9, 2e9], ["--max_epochs", 1], 3e9),
    ([1e9, 100e9], ["--bounds", "s0=0.2:"], 20e9),  # of the least share of s0
    ([1e9, 1e9, 1e9], ["--bounds", "s0=:0.25"], 32e9 / 3)])  # 0.25 + 8e9 / R = 1
def test_the_longest_run_that_can_be_had_is_said(monkeypatch, capsys, sizes, flags, most):
    with pytest.raises(SystemExit) as ended:
        planned(monkeypatch, sizes, "--train_tokens", most * 1.001, *flags)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and len(line.splitlines()) == 1
    assert float(line.split("at most ")[1].split(" ")[0]) == pytest.approx(most, rel=1e-4), line
    planned(monkeypatch, sizes, "--train_tokens", line.split("at most ")[1].split(" ")[0], *flags)  # what it says


@pytest.mark.parametrize("text, part", [
    ("x=0:1", "'x=0:1' is not NAME=LEAST:LARGEST with one of a, b, each once"), ("a=0.1:,a=:0.9", "'a=:0.9' is not"), ("a", "'a' is not NAME="), ("a=0.3", "'a=0.3' is"),
    ("a=x:", "'a=x:' is not"), ("a=:nan", "is no range"), ("a=0.5:0.4", "0.5:0.4 is no range"), ("a=:0", "leave a out"),
    ("a=-1:", "is no range"), ("a=:2", "is no range"), ("a=0.6:,b=0.6:", "the least shares add up to 1.2"),
    ("a=:0.3,b=:0.3", "the largest to 0.6"), ("a=0:1,", "'' is not NAME=")])
def test_bounds_that_cannot_be(capsys, text, part):
    with pytest.raises(SystemExit) as ended:
        read_bounds(text, ["a", "b"])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and len(line.splitlines()) == 1 and part in line, line


def test_bounds_of_sources_by_name():
    np.testing.assert_array_equal(read_bounds(" b = 0.2:0.5, a=:0.9", ["a", "b", "c"]), [[0, 0.2, 0], [0.9, 0.5, 1]])
    np.testing.assert_array_equal(read_bounds(None, ["a"]), [[0], [1]])


@pytest.mark.parametrize("visible", [0.001, 0.01, 0.3, 1.0])
def test_what_a_shorter_run_is_shown(tmp_path, visible):
    """As many of the tokens, spread over the split, in windows that fit; never less than one window."""
    ids = np.arange(50_000, dtype=np.uint16)
    write_set(tmp_path / "text", {"train": ids, "val": ids[:500], "test": ids[:500]}, 60_000)
    data = prepare_data.TokenSet(tmp_path, "text", 16)
    data.visible = visible
    u = np.append(np.random.default_rng(0).random(200_000), [0.0, np.nextafter(1, 0)])
    starts = data.at_fraction("train", u)
    assert starts.min() == 0 and starts.max() <= 50_000 - 17
    seen = np.zeros(50_000, bool)
    for start in np.unique(starts):
        seen[start: start + 17] = True
    assert seen.sum() == pytest.approx(max(50_000 * visible, 17), rel=0.02, abs=17)
    thirds = [seen[i: i + 16_666].sum() for i in (0, 16_667, 33_334)]
    if visible == 0.3:  # 13 stretches
        assert min(thirds) > 0.7 * max(thirds)
    assert data.at_fraction("val", u).max() == 500 - 17  # other splits as before
    example_set(tmp_path / "qa", 1, 2, n=4000)
    data = prepare_data.TokenSet(tmp_path, "qa", 40)
    data.visible = visible
    starts, rows = np.unique(data.at_fraction("train", u)), data.rows["train"][0]
    assert np.isin(starts, rows).all() and len(starts) == pytest.approx(max(1, len(rows) * visible), abs=5)


def test_a_search_for_a_longer_run(synthetic):
    """b, the best source, may have 0.4 of it: it does not get more, and of each source a tenth is shown."""
    tokens = 60 * 8 * 16
    for flags, out in ((["--max_epochs", 0.4 * 10 * tokens / 10_000], "plan-long"), (["--max_epochs", 1e9], "plan-shown")):
        run("fastmix.py", *BASE, "--learning_rate_mixture", 0.1, "--train_tokens", 10 * tokens, *flags, "--out_dir", out,
            cwd=synthetic)
    result = json.loads((synthetic / "plan-long" / "mixture.json").read_text())
    assert result["mixture"]["b"] == pytest.approx(0.4, abs=0.01) and result["sources"]["b"]["upper"] == pytest.approx(0.4)
    assert all(row["alpha"]["b"] < 0.4 + 1e-9 for row in log_rows(synthetic / "plan-long"))
    assert json.loads((synthetic / "plan-shown" / "mixture.json").read_text())["mixture"]["b"] > 0.5
    run("fastmix.py", *BASE, "--train_tokens", 10 * tokens, "--mixture", "uniform", "--out_dir", "plan-fixed", cwd=synthetic)
    assert "at most" in refused("fastmix.py", *BASE, "--train_tokens", 1e9, "--out_dir", "no", cwd=synthetic)
    assert not (synthetic / "no").exists()


def test_resume_keeps_the_plan(synthetic):
    flags = [*BASE, "--train_tokens", 50_000, "--max_epochs", 2, "--bounds", "a=0.2:"]
    run("fastmix.py", *flags, "--out_dir", "plan-resumed", cwd=synthetic)
    run("fastmix.py", "--resume", "--out_dir", "plan-resumed", cwd=synthetic)
    assert "--bounds a=0.2:, not a=0.1:" in refused("fastmix.py", "--resume", "--bounds", "a=0.1:", "--out_dir", "plan-resumed",
                                                   cwd=synthetic)


def test_names_and_weights(capsys):
    assert parse_names("--target", "a, b=3 ,c=0.5") == {"a": 1.0, "b": 3.0, "c": 0.5}
    for flag, text, part in (("--target", "a=0", "'a=0' is not a name or NAME=WEIGHT"), ("--target", "a=x", "'a=x' is not"),
                             ("--target", "a=inf", "'a=inf' is not"), ("--target", "a=1,a", "names a twice"),
                             ("--sources", "a=2", "'a=2' is not a name"), ("--target", "=2", "empty name")):
        with pytest.raises(SystemExit):
            parse_names(flag, text)
        assert part in capsys.readouterr().err


def test_weighted_targets(tmp_path):
    """The loss that is reported is the weighted one, and the mixture goes where the weight is."""
    for name, seed in (("b", 2), ("c", 3)):
        chain_set(tmp_path / "data" / name, seed)
        chain_set(tmp_path / "data" / f"like_{name}", seed, draw_seed=7)
    shares = {}
    for weights in ("like_b=9,like_c=1", "like_b,like_c=9"):
        out = weights.replace("=", "").replace(",", "-")
        run("fastmix.py", *TINY, "--sources", "b,c", "--target", weights, "--max_steps", 150, "--learning_rate", 1e-2,
            "--learning_rate_mixture", 0.05, "--out_dir", out, cwd=tmp_path)
        result, rows = json.loads((tmp_path / out / "mixture.json").read_text()), log_rows(tmp_path / out)
        w = [0.9, 0.1] if weights.startswith("like_b=9") else [0.1, 0.9]
        assert [t["weight"] for t in result["targets"].values()] == pytest.approx(w)
        for row in rows:
            assert row["target_val_loss"] == pytest.approx(np.dot(w, list(row["target_losses"].values())))
        assert result["before"] == rows[0]["target_losses"]
        assert {n: t["val_loss"] for n, t in result["targets"].items()} == rows[-1]["target_losses"]
        shares[weights] = result["mixture"]["b"]
    assert shares["like_b=9,like_c=1"] > 0.7 and shares["like_b,like_c=9"] < 0.3, shares


def test_a_fixed_mixture_has_no_bounds(monkeypatch):
    """It is trained as it is, but shows the repetition of the longer run."""
    bounds, sources = planned(monkeypatch, [2e9, 10e9], "--train_tokens", 25e9, "--bounds", "s0=0.5:0.6", "--mixture",
                              "uniform", "--max_steps", 1000, "--block_size", 64)
    np.testing.assert_array_equal(bounds, [[0, 0], [1, 1]])
    assert all(s.visible == pytest.approx(1000 * 16 * 64 / 25e9) for s in sources)


def test_the_table_counts_epochs_of_the_real_run(synthetic):
    run("fastmix.py", *BASE, "--train_tokens", 30_000, "--max_epochs", 2, "--out_dir", "plan-table", cwd=synthetic)
    result = json.loads((synthetic / "plan-table" / "mixture.json").read_text())
    lines = run("plot_mixture.py", "plan-table", cwd=synthetic).splitlines()
    assert any("epochs: of 30,000 tokens drawn by it" in line for line in lines)
    row = next(line.split() for line in lines if line.startswith("b "))
    assert float(row[4]) == pytest.approx(result["mixture"]["b"] * 30_000 / 10_000, abs=0.02)
