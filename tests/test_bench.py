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
import bench_mixtures
import bench_speed
import bench_tables
import fastmix
import prepare_data
from bench_tables import Key, Run
from conftest import ROOT, example_set, markov, run, write_set
from ensemble import train_many
from model import GPT, GPTConfig
from prepare_data import TokenSet

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
    fault. What the seeds do not explain is the noise.
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
    surface = bench_tables.response_surface(results, "numpy", args)
    new = rng.dirichlet(np.ones(6), 50)
    np.testing.assert_allclose(surface.predict(new), 2.1 + 0.2 * new[:, 0], atol=0.03)
    assert surface.error < 0.5
    assert surface.n_whole == 20
    assert list(surface.seed_effect.values()) == pytest.approx([-0.1, 0.2, -0.1], abs=2e-3)
    assert 0.03 < surface.noise < 0.07  # 1e-3 is 0.05% of 2.1


def test_best_by_the_surface_where_few_mixtures_ran_on_all_seeds():
    """
    The best mixture is not the one with the lucky run, and what a run is compared with has the
    effect of its seed.
    """
    rng = np.random.default_rng(0)
    args = SimpleNamespace(seeds=[11, 12, 13, 14, 15], steps=None)
    best = np.array(bench_methods.TASKS["sample"].dirichlet)
    best /= best.sum()
    results = {}

    def truth(mixture):
        return 2 + 0.02 * ((np.log(mixture + 0.05) - np.log(best + 0.05)) ** 2).sum()

    def put(what, seed, mixture, luck=0.0):
        loss = truth(mixture) + 0.1 * (seed == 12) + 2e-3 * rng.standard_normal() - luck
        results[Key("sample", what, seed, 2400, "sample")] = Run(loss, 1.0, mixture.tolist())

    tried = bench_methods.tried_mixtures("sample")
    tried[4] = best
    for i, mixture in enumerate(tried):
        put(f"design {i}", (11, 12, 13)[i % 3], mixture, luck=0.06 * (i == 30))
    for what in ("uniform", "proportional", "sqrt", "ngram"):
        named = rng.dirichlet(np.ones(6))
        for seed in (11, 12, 13):
            put(what, seed, named)
    surface = bench_tables.response_surface(results, "sample", args)
    bests = {seed: bench_tables.best_fixed(results, "sample", args, surface, seed)
             for seed in (11, 12, 13)}
    for seed, found in bests.items():
        assert truth(np.array(found.mixture)) < 2.01
        assert found.loss == pytest.approx(2 + 0.1 * (seed == 12), abs=0.01)
    values = bench_tables.regret(results, "sample", "uniform", args, bests)
    expected = 100 * (truth(np.array(results[Key("sample", "uniform", 11, 2400, "sample")].mixture))
                      / 2 - 1)
    np.testing.assert_allclose(values, expected, rtol=0.1)
    assert len(values) == 3  # the first seed measures, too


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
               key._replace(what="RegMix 8"): Run(2.0, 1.0, [0.25, 0.75])}
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
              "random 2": (2.11, 2.0, 2.2), "none: last": (2.02, 2.2, 2.222),
              "FastMix: last": (2.04, 2.31, 2.31)}
    results = {}
    for what, values in losses.items():
        for seed, loss in zip((11, 12, 13), values):
            mixture = [0.5] * 6
            if "last" in what:  # differs by seed, and is no candidate
                mixture = [0.1 * seed] * 6
            if loss is not None:
                results[Key("numpy", what, seed, 100, "base")] = Run(loss, 1.0, mixture)
    bench_tables.save(tmp_path / "results.jsonl", results)
    out = run("tests/bench_mixtures.py", "--table", "--results", "results.jsonl", "--tasks",
              "numpy", "--seeds", 11, 12, 13, "--steps", 100, cwd=tmp_path)
    assert "numpy: best fixed mixture known 2.1000" in out and "(random 0: " in out
    assert "| uniform | 0.00 | +9.55 (+9.09 to +10.00) |" in out
    assert "none`) | 1." in out and "| +0.50 (+0.00 to +1.00) |" in out
    assert "| toward numpy | +9.55 | +4.55 |  |  | +5.00 |  |" in out  # the README's
    assert (tmp_path / "mixtures.png").stat().st_size > 10_000


def test_costs():
    """In training runs: the authors' K + 1 passes of 8 sequences of 16, every 20 steps."""
    assert bench_tables.cost_of("uniform", "numpy") == 0
    assert bench_tables.cost_of("RegMix 8", "numpy") == 8
    assert bench_tables.cost_of("authors: last", "numpy") == pytest.approx(1 + 7 * 8 / 16 / 20)
    assert bench_tables.cost_of("authors: last", "own") == pytest.approx(1 + 6 * 8 / 16 / 20)
    assert bench_tables.cost_of("DoReMi: run_average", "numpy") == pytest.approx(2 + 1 / 3)
    paper = bench_tables.cost_of("paper: last", "numpy")  # every 20 steps, without a curvature
    assert 1 + 20 * (paper - 1) <= bench_tables.cost_of("FastMix: last", "numpy") < 1.06
    assert 1.03 < 1 + 20 * (paper - 1) < 1.05
    # a search of a quarter of the steps
    short = bench_tables.cost_of("FastMix: last", "scarce_long")
    assert short == pytest.approx(bench_tables.cost_of("FastMix: last", "scarce") / 4)


def test_what_was_tried_is_in_the_table_of_settings(capsys):
    """Stored lines name it; a mean is over the tuning seeds that ran, by the surface."""
    best = [1.0, 0, 0, 0, 0, 0]
    worse = [0, 1.0, 0, 0, 0, 0]
    surface = bench_tables.Surface(lambda m: 2 + 0.2 * np.atleast_2d(m)[:, 1], 0.1, 0.1, {}, 0,
                                   [best, worse])
    results = {Key("numpy", "only python", 11, 600, "base"): Run(2.0, 1.0, best),
               Key("numpy", "search FastMix", 1, 600, "base"): Run(
                   2.0, 1.0, found={"last": worse})}
    for seed, found in ((1, best), (2, worse)):
        results[Key("numpy", "search tried a/b", seed, 600, "base")] = Run(
            2.0, 1.0, found={"last": found})
    args = SimpleNamespace(seeds=[11, 12, 13], steps=None)
    bench_tables.show_tuning(results, ["numpy"], args, {"numpy": surface})
    assert table_rows(capsys.readouterr().out) == ["| tried a/b | +5.00 |"]


# ---- RESULTS.md ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stored_tables(tmp_path_factory):
    """What bench_mixtures.py prints of the lines in the repository."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copy(ROOT / "tests" / "bench_mixtures.jsonl", folder / "results.jsonl")
    return run("tests/bench_mixtures.py", "--table", "--results", "results.jsonl", cwd=folder)


def test_tables_of_the_stored_runs(stored_tables):
    """What RESULTS.md and the README report comes from the lines in the repository."""
    in_results, _, in_readme = stored_tables.partition("\nthe README's table")
    rows = table_rows(in_results)
    assert len(rows) > 40
    assert not [row for row in rows if row not in RESULTS]
    rows = table_rows(in_readme)
    assert len(rows) >= 4
    assert not [row for row in rows if row not in README]


def listed(numbers):
    *first, last = numbers
    return f"{', '.join(first)} and {last}"


def test_numbers_of_mixtures(stored_tables):
    """How many were tried in each task, and how many ran on all seeds."""
    counts = re.findall(r"(\d+) mixtures, (\d+) of them on all seeds", stored_tables)
    assert len(counts) >= 6
    words = " ".join(RESULTS.split())
    for group, seeds in ((counts[:4], "five"), (counts[4:6], "three")):
        tried = listed([tried for tried, _ in group])
        whole = listed([whole for _, whole in group])
        assert re.search(rf"{tried} [a-z ]*were tried, of which {whole} ran on all {seeds}", words)
    if counts[6:]:
        assert listed([tried for tried, _ in counts[6:]]) in words


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


# ---- tasks and their data ------------------------------------------------------------------------

def read(data, name, file, dtype):
    return np.fromfile(data / name / file, dtype=dtype)


def test_pieces_in_random_order(tmp_path):
    """All pieces of a split are there, whole, and not in their order."""
    lengths = {"train": 803, "val": 160, "test": 80}
    write_set(tmp_path / "text", {split: np.arange(n) for split, n in lengths.items()}, 1000)
    bench_methods.derive_pieces(tmp_path, "pieces", "text", 8)
    for split, n in lengths.items():
        pieces = read(tmp_path, "pieces", f"{split}.bin", np.uint16).reshape(-1, 8)
        in_order = np.arange(n // 8 * 8).reshape(-1, 8)
        first = pieces[:, 0].tolist()
        assert first != sorted(first)
        np.testing.assert_array_equal(pieces[np.argsort(first)], in_order)
    assert len(TokenSet(tmp_path, "pieces", 16).tokens("train")) == 800


def test_ends_of_responses(tmp_path):
    """Of each response the last quarter is learned, at least one token; the set is whole."""
    example_set(tmp_path / "examples", 1, 2, n=100)
    bench_methods.derive_ends(tmp_path, "ends", "examples", 0.25)
    for split in ("train", "val", "test"):
        ids = read(tmp_path, "examples", f"{split}.bin", np.uint16)
        before = read(tmp_path, "examples", f"{split}.mask.bin", np.uint8)
        after = read(tmp_path, "ends", f"{split}.mask.bin", np.uint8)
        cuts = np.flatnonzero(ids == 64)[:-1] + 1
        for old, new in zip(np.split(before, cuts), np.split(after, cuts)):
            n = max(1, round(old.sum() / 4))
            assert new.tolist() == [0] * (len(new) - n) + [1] * n
    ends = TokenSet(tmp_path, "ends", 32)
    assert ends.density("train") < TokenSet(tmp_path, "examples", 32).density("train") / 3
    counts = ends.meta["splits"]["train"]
    n_examples = np.count_nonzero(read(tmp_path, "ends", "train.bin", np.uint16) == 64)
    assert counts["learned_bytes"] == counts["learned"] - n_examples  # <|endoftext|> has no bytes


def test_a_set_is_made_only_if_missing(tmp_path, monkeypatch):
    """A folder of an earlier bench has the sample and some of the sets, and keeps them."""
    for k, name in enumerate(("python", "cpp", "prose", "legal", "noise"), 1):
        ids = markov(k, 4000)
        write_set(tmp_path / name, {"train": ids[:3000], "val": ids[3000:3500],
                                    "test": ids[3500:]}, 257)
    example_set(tmp_path / "implement", 1, 2, n=100)
    monkeypatch.setattr(prepare_data, "SAMPLE", ("python", "prose", "implement"))
    bench_methods.prepare(tmp_path, "bytes")
    for task in ("half", "scarce", "order", "masked"):
        for name in set(bench_methods.sources_of(task)) - {"math", "describe", "declare"}:
            assert (tmp_path / name / "meta.json").exists(), name
    assert len(read(tmp_path, "prose_2", "train.bin", np.uint16)) == 60
    before = read(tmp_path, "noise_4", "train.bin", np.uint16)
    derived = []
    monkeypatch.setattr(bench_methods, "derive", lambda data, name, *_: derived.append(name))
    shutil.rmtree(tmp_path / "prose_p8")
    bench_methods.prepare(tmp_path, "bytes")
    assert derived == ["prose_p8"]
    np.testing.assert_array_equal(read(tmp_path, "noise_4", "train.bin", np.uint16), before)


def test_tried_mixtures_are_around_a_good_one():
    for task in filter(bench_methods.few_runs, bench_methods.TASKS):
        dirichlet = np.array(bench_methods.TASKS[task].dirichlet)
        assert len(dirichlet) == len(bench_methods.sources_of(task))
        tried = bench_methods.tried_mixtures(task)
        np.testing.assert_allclose(tried.sum(1), 1, atol=1e-3)
        np.testing.assert_allclose(tried.mean(0), dirichlet / dirichlet.sum(), atol=0.15)


@pytest.fixture
def tiny_task(tmp_path, monkeypatch):
    """A task with flags of its own, on three Markov chains; their train splits differ in length."""
    for k, name in enumerate("abc", 1):
        ids = markov(k, 6000)
        train = ids[: 1000 * k**2 // 4]
        write_set(tmp_path / "data" / name, {"train": train, "val": ids[3000:4500],
                                             "test": ids[4500:]}, 257, tokenizer="bytes")
    flags = {"block_size": 16, "batch_size": 8, "learning_rate": 1e-2}
    task = bench_methods.Task("tiny", "a,b,c", "b", "tiny", 6, flags, {"max_steps": 4})
    monkeypatch.setitem(bench_methods.TASKS, "tiny", task)
    monkeypatch.setitem(bench_methods.SIZES, "tiny", (1, 2, 32))
    return tmp_path


def test_runs_of_a_task_have_its_flags(tiny_task, monkeypatch):
    """A search has some of its own beside; K shares become --mixture."""
    settings = []
    train = bench_mixtures.train

    def recorded(work, key, out, flags, rules):
        result = train(work, key, out, flags, rules)
        settings.append(result["settings"])
        return result

    monkeypatch.setattr(bench_mixtures, "train", recorded)
    key = Key("tiny", "search FastMix", 11, 6, "tiny")
    search = bench_mixtures.one_run(str(tiny_task), bench_mixtures.Job(key))
    shares = bench_methods.sqrt_mixture(tiny_task / "data", "abc")
    np.testing.assert_allclose(shares, [1 / 6, 2 / 6, 3 / 6])
    job = bench_mixtures.Job(key._replace(what="sqrt"), shares)
    run_at = bench_mixtures.one_run(str(tiny_task), job)
    assert [s["max_steps"] for s in settings] == [4, 6]
    for s in settings:
        assert (s["block_size"], s["learning_rate"], s["n_embd"], s["seed"]) == (16, 1e-2, 32, 11)
    assert search.mixture is None and run_at.found is None
    assert sum(search.found["last"]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(run_at.mixture, shares, atol=1e-5)


def test_search_by_ngrams_is_stored_without_a_loss(tiny_task):
    """Its line holds the mixture, whose target is b itself, and the seconds."""
    key = Key("tiny", "search ngram", 11, 6, "tiny")
    run_of = bench_mixtures.one_run(str(tiny_task), bench_mixtures.Job(key))
    assert run_of.found["mixture"][1] > 0.8
    bench_tables.append(tiny_task / "results.jsonl", key, run_of)
    assert bench_tables.load(tiny_task / "results.jsonl") == {key: run_of}


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
    fastmix.mixture_step(z, None, A.double(), present, torch.ones(4), 0.1, 0)
    torch.testing.assert_close(z, torch.where(present, 0.1 * A.double(), 0.0))
    fastmix.mixture_step(z, None, A.double(), present, torch.ones(4), 0.05, 1)  # the rate stays
    torch.testing.assert_close(z, torch.where(present, 0.2 * A.double(), 0.0))


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
