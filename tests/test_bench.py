"""The benches: what turns stored runs into claims, the other methods' rules, and RESULTS.md."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench_gpu
import bench_loss
import bench_methods
import bench_speed
import bench_tables
import fastmix
from bench_tables import Key, Run
from conftest import ROOT, markov, run, write_set
from ensemble import train_many
from model import GPT, GPTConfig

RESULTS = (ROOT / "tests" / "RESULTS.md").read_text()
README = (ROOT / "README.md").read_text()


def table_rows(text):
    """The rows of Markdown tables, without the lines above and below the rule."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| |", "| ---")):
            rows.append(line)
    return rows


# ---- statistics ----------------------------------------------------------------------------------

def test_regmix_style_search_finds_the_minimum_of_a_quadratic():
    best = np.array([0.5, 0.3, 0.15, 0.05])
    rng = np.random.default_rng(3)
    mixtures = rng.dirichlet(np.ones(4), 40)
    losses = 2 + ((mixtures - best) ** 2).sum(1) + 1e-4 * rng.standard_normal(40)
    assert np.abs(bench_methods.regmix(mixtures, losses) - best).max() < 0.05


def test_response_surface_predicts_what_it_has_not_seen():
    """
    Losses with noise at 60 mixtures. Elsewhere it is closer to the truth than one run, and says
    how far it is off.
    """
    rng = np.random.default_rng(0)
    best = np.array([0.5, 0.3, 0.2])

    def truth(mixtures):
        distance = np.log(mixtures + 0.05) - np.log(best + 0.05)
        return 2 + (distance**2).sum(-1) / 50

    seen = rng.dirichlet(np.ones(3), 60)
    new = rng.dirichlet(np.ones(3), 200)
    noise = np.full(60, 0.01)
    y = truth(seen) + noise * rng.standard_normal(60)
    predict, error = bench_tables.gaussian_process(bench_tables.log_shares(seen), y, noise)
    off = predict(bench_tables.log_shares(new)) - truth(new)
    assert np.sqrt((off**2).mean()) < 0.007 < error < 0.02


def test_response_surface_takes_the_seeds_apart():
    """
    Seed 12 reads 0.3 more on every mixture, and some mixtures ran on it alone: that is not their
    fault.
    """
    rng = np.random.default_rng(0)
    args = SimpleNamespace(seeds=[11, 12, 13], steps=100)
    results = {}
    for i, mixture in enumerate(rng.dirichlet(np.ones(6), 40)):
        seeds = (11, 12, 13) if i % 2 else (12,)
        for seed in seeds:
            loss = 2 + 0.2 * mixture[0] + 0.3 * (seed == 12) + 1e-3 * rng.standard_normal()
            key = Key("numpy", f"random {i}", seed, 100, "base")
            results[key] = Run(loss, 1.0, mixture.tolist())
    predict, error = bench_tables.response_surface(results, "numpy", args)
    new = rng.dirichlet(np.ones(6), 50)
    np.testing.assert_allclose(predict(new), 2.1 + 0.2 * new[:, 0], atol=0.03)
    assert error < 0.5


# ---- stored runs and tables ----------------------------------------------------------------------

def test_stored_runs_are_read_back(tmp_path):
    """One line per mixture, whatever was appended in between, and whatever a kill cut short."""
    path = tmp_path / "results.jsonl"
    key = Key("numpy", "uniform", 11, 100, "base")
    search = Key("numpy", "search FastMix", 11, 100, "base")
    results = {key: Run(2.5, 1.0, [0.5, 0.5]),
               key._replace(seed=12): Run(2.25, 2.0, [0.5, 0.5]),
               search: Run(2.0, 3.0, found={"last": [0.75, 0.25]}),
               search._replace(seed=12): Run(2.125, 3.0, found={"last": [1.0, 0.0]}),
               key._replace(what="FastMix: trajectory"): Run(2.0, 1.0)}
    for stored, one_run in results.items():
        bench_tables.append(path, stored, one_run)
    assert bench_tables.load(path) == results
    assert path.read_text().count("\n") == 5

    with open(path, "a") as f:
        f.write('{"task": "cut sho')
    bench_tables.save(path, bench_tables.load(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0] == {"task": "numpy", "what": "uniform", "size": "base", "steps": 100,
                        "mixture": [0.5, 0.5], "losses": {"11": 2.5, "12": 2.25}, "seconds": 3.0}
    again = bench_tables.load(path)
    assert again.keys() == results.keys()
    for stored, one_run in results.items():
        assert again[stored].test_loss == one_run.test_loss
        assert again[stored].mixture == one_run.mixture
        assert again[stored].found == one_run.found


def test_table_from_stored_lines(tmp_path):
    """
    Regret is paired by seed, against the fixed mixture that is best on average over the other
    seeds: for seed 12 it is random 0 and not random 2, whose lead is on seed 12 itself; for seed
    13 it is random 2. Seed 11 measures nothing.
    """
    losses = {"uniform": (2.2, 2.4, 2.42), "proportional": (2.2, 2.3, 2.3),
              "random 0": (2.0, 2.2, 2.1), "random 1": (1.9, None, None),
              "random 2": (2.11, 2.0, 2.2), "FastMix: trajectory": (2.02, 2.2, 2.222),
              "FastMix: last_half_average": (2.04, 2.31, 2.31)}
    results = {}
    for what, values in losses.items():
        for seed, loss in zip((11, 12, 13), values):
            mixture = [0.5] * 6
            if what == "FastMix: last_half_average":  # differs by seed, and is no candidate
                mixture = [0.1 * seed] * 6
            if what == "FastMix: trajectory":
                mixture = None
            if loss is not None:
                results[Key("numpy", what, seed, 100, "base")] = Run(loss, 1.0, mixture)
    bench_tables.save(tmp_path / "results.jsonl", results)
    out = run("tests/bench_mixtures.py", "--table", "--results", "results.jsonl", "--tasks",
              "numpy", "--seeds", 11, 12, 13, "--steps", 100, cwd=tmp_path)
    assert "numpy: best fixed mixture known 2.1000" in out and "(random 0: " in out
    assert "| uniform | 0.00 | +9.55 (+9.09 to +10.00) |" in out
    assert "FastMix, replayed trajectory** | 1." in out and "| +0.50 (+0.00 to +1.00) |" in out
    assert (tmp_path / "mixtures.png").stat().st_size > 10_000


def test_costs():
    """In training runs: the authors' K + 1 passes of 8 sequences of 16, every 20 steps."""
    assert bench_tables.cost_of("uniform", "numpy") == 0
    assert bench_tables.cost_of("RegMix 8", "numpy") == 8
    assert bench_tables.cost_of("authors: last", "numpy") == pytest.approx(1 + 7 * 8 / 16 / 20)
    assert bench_tables.cost_of("authors: last", "own") == pytest.approx(1 + 6 * 8 / 16 / 20)
    assert bench_tables.cost_of("DoReMi: run_average", "numpy") == pytest.approx(2 + 1 / 3)
    assert 1.04 < bench_tables.cost_of("FastMix: last", "numpy") < 1.06


# ---- RESULTS.md ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stored_tables(tmp_path_factory):
    """What bench_mixtures.py prints of the lines in the repository."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copy(ROOT / "tests" / "bench_mixtures.jsonl", folder / "results.jsonl")
    return run("tests/bench_mixtures.py", "--table", "--results", "results.jsonl", cwd=folder)


def test_table_of_the_stored_runs(stored_tables):
    """What the README and RESULTS.md report comes from the lines in the repository."""
    rows = table_rows(stored_tables)
    assert len(rows) > 40
    assert not [row for row in rows if row not in RESULTS]
    titles = {"uniform": "| uniform", "proportional to tokens": "| proportional to tokens",
              "the authors' setting": "| the authors' setting",
              "FastMix, default": "| **FastMix, average of the last half**",
              "RegMix-style, 64 runs": "| RegMix-style, 64 runs"}
    for in_readme, start in titles.items():
        row = next(row for row in rows if row.startswith(start))
        cost, *cells = [cell.strip() for cell in row.split("|")[2:-1]]
        means = [re.escape(cell.split()[0].rstrip(",")) for cell in cells]
        pattern = rf"\| {in_readme} \| ([^|]*) \| " + r" \| ".join(means)
        match = re.search(pattern, README)
        assert match, pattern
        assert float(match[1]) == float(cost), in_readme


def listed(numbers):
    *first, last = numbers
    return f"{', '.join(first)} and {last}"


def test_numbers_of_mixtures(stored_tables):
    """How many were tried in each task, and how many ran on all seeds."""
    counts = re.findall(r"(\d+) mixtures, (\d+) of them on all seeds", stored_tables)
    assert len(counts) == 6
    words = " ".join(RESULTS.split())
    for group, seeds in ((counts[:4], "five"), (counts[4:], "three")):
        tried = listed([tried for tried, _ in group])
        whole = listed([whole for _, whole in group])
        assert re.search(rf"{tried} [a-z ]*were tried, of which {whole} ran on all {seeds}", words)


def test_table_on_paper(tmp_path):
    """It is what the command beside it prints."""
    out = run("tests/bench_gpu.py", "--part", "paper", cwd=tmp_path)
    assert len(table_rows(out)) == 9  # with the header
    section = RESULTS.partition("### On paper")[2].partition("\n## ")[0]
    assert out.strip() in section


def test_results_have_the_rows_that_the_commands_print():
    """Names of rows; and no place-holder stands where a table should be."""
    names = [bench_speed.PLAIN, bench_loss.PLAIN]
    for K in bench_speed.KS:
        names += [bench_speed.fixed_name(K), bench_speed.search_name(K), bench_speed.sparse_name(K)]
    for name in names:
        assert f"| {name} |" in RESULTS, name
    assert not re.search(r"^[A-Z]+$", RESULTS, re.MULTILINE)


# ---- methods and runs ----------------------------------------------------------------------------

@pytest.mark.parametrize("mixture", [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
def test_runs_trained_at_once_are_those_of_the_command_line(tmp_path, mixture):
    """Two seeds and two mixtures, four runs at once: the losses of four runs one by one."""
    for k, name in enumerate("abc"):
        ids = markov(k, 6000)
        splits = {"train": ids[:3000], "val": ids[3000:4500], "test": ids[4500:]}
        write_set(tmp_path / "data" / name, splits, 65)
    flags = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8,
             "max_steps": 25, "learning_rate": 1e-2, "warmup_steps": 5, "log_every": 25,
             "device": "cpu", "sources": "a,b,c", "target": "b,c"}
    settings = bench_methods.DEFAULTS | flags | {"data_dir": tmp_path / "data"}
    mixtures = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3], mixture, mixture])
    seeds = [3, 4, 3, 4]
    found = train_many(SimpleNamespace(**settings), seeds, mixtures, "cpu", fastmix.TEST_TOKENS)
    words = []
    for flag, value in flags.items():
        words += [f"--{flag}", value]
    expected = []
    for i, (seed, shares) in enumerate(zip(seeds, mixtures)):
        listed = ",".join(f"{name}={share}" for name, share in zip("abc", shares))
        run("fastmix.py", *words, "--mixture", listed, "--seed", seed, "--out_dir", f"out-{i}",
            cwd=tmp_path)
        result = json.loads((tmp_path / f"out-{i}" / "mixture.json").read_text())
        expected.append(result["test_loss"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.01


def test_doremi_gets_each_source_s_mean_excess_loss(tmp_path, monkeypatch):
    """Clipped token by token, whatever the loss weights are; an absent source keeps its logit."""
    config = GPTConfig(vocab_size=32, block_size=8, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    reference = GPT(config)
    model = GPT(config)
    ckpt = {"config": vars(config), "model": reference.state_dict()}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for name, rule in bench_methods.rules_of("DoReMi", tmp_path / "ckpt.pt").items():
        monkeypatch.setattr(fastmix, name, rule)

    x, y = torch.randint(32, (2, 6, 8))
    counts = torch.tensor([1, 0, 3, 2])  # sequences of each source
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5])
    source = torch.arange(4).repeat_interleave(counts)
    ends = (counts.cumsum(0) * 8).tolist()
    head = model.lm_head.weight
    _, token_loss, parts = fastmix.batch_loss(model, head, x, y, weights[source], 48, None, ends)
    logits = reference(x) @ reference.lm_head.weight.T
    known = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    excess = (token_loss - known).clamp(min=0)  # (6, 8)
    A = parts * 48 / (weights * counts * 8)  # as the loop takes them
    for k in (0, 2, 3):
        torch.testing.assert_close(A[k], excess[source == k].mean())

    present = counts > 0
    z = torch.zeros(4, dtype=torch.float64)
    fastmix.mixture_step(z, A.double(), present, torch.ones(4), 0.1)
    torch.testing.assert_close(z, torch.where(present, 0.1 * A.double(), 0.0))


@pytest.mark.parametrize("search", bench_methods.SEARCHES)
def test_rules_run_in_the_loop(tmp_path, monkeypatch, search):
    """A few steps of each search at the loop's own calls; each moves the mixture."""
    for k, name in enumerate("abc"):
        ids = markov(k, 6000)
        splits = {"train": ids[:3000], "val": ids[3000:4500], "test": ids[4500:]}
        write_set(tmp_path / "data" / name, splits, 65)
    flags = {"data_dir": tmp_path / "data", "sources": "a,b,c", "target": "b", "n_layer": 1,
             "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "max_steps": 4,
             "device": "cpu"}
    argv = []
    for flag, value in flags.items():
        argv += [f"--{flag}", str(value)]
    monkeypatch.setattr(fastmix, "draw_run", lambda folder: folder)
    reference = tmp_path / "reference"
    if search == "DoReMi":
        fastmix.main([*argv, "--mixture", "uniform", "--out_dir", str(reference)])
    for name, rule in bench_methods.rules_of(search, reference / "ckpt.pt").items():
        monkeypatch.setattr(fastmix, name, rule)
    for flag, value in bench_methods.SEARCHES[search].items():
        argv += [f"--{flag}", str(value)]
    fastmix.main([*argv, "--out_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "mixture.json").read_text())["mixtures"]["last"]
    assert max(found.values()) > 1 / 3 + 1e-4


def test_formulas_in_the_precisions_of_a_gpu():
    """The checks of bench_gpu.py that need no runs, on the CPU."""
    assert bench_gpu.report(bench_gpu.loss_and_gradients, "cpu")
    assert bench_gpu.report(bench_gpu.alignments, "cpu")
