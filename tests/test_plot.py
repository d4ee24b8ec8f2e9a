"""plot_mixture.py: tables; export; pictures, whose text is measured; bad input."""
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from types import SimpleNamespace

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

import plot_mixture
from conftest import ROOT, TINY, refused, run, start
from plot_mixture import read_log, result_table


# ---- the files of a run, by hand ---------------------------------------------------------------

def write_log(folder, K=3, steps=30, searched=True, tail="", names=None, targets=()):
    """A log.jsonl as fastmix.py writes it, of random mixtures; tail: what follows the last row."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = names or [f"source{k}" for k in range(K)]
    lines = []
    for step in range(steps):
        loss = 5.0 - step / 30
        row = {"step": step, "max_steps": 30,
               "alpha": dict(zip(names, rng.dirichlet(np.ones(len(names))))),
               "alignment": dict.fromkeys(names), "source_loss": dict.fromkeys(names),
               "train_loss": 1.0, "target_val_loss": loss if step % 10 == 0 else None,
               "target_losses": {t: loss - 0.1 + i / 5 for i, t in enumerate(targets)},
               "tokens": step, "seconds": 0.1}
        if step:
            row["source_loss"] = dict.fromkeys(names, loss)
        if step and searched:
            row["alignment"] = {name: float(rng.normal()) for name in names}
        lines.append(json.dumps(row) + "\n")
    (folder / "log.jsonl").write_text("".join(lines) + tail)


def write_result(folder, mixture, average=None, seed=1, losses=None, weights=None, searched=True,
                 sources=None, **settings):
    """
    A mixture.json as fastmix.py writes it, and a log.jsonl if there is none; returns the dict.
    mixture {source: share}; losses {target: test loss}; sources {source: more about it}.
    """
    if not folder.exists():
        write_log(folder, names=list(mixture))
    losses = losses or {"t": 1.5}
    weights = weights or [1 / len(losses)] * len(losses)
    targets = {}
    for (name, loss), weight in zip(losses.items(), weights):
        targets[name] = {"weight": weight, "val_loss": loss + 0.1, "test_loss": loss,
                         "test_bits_per_byte": 2 * loss, "learned_only": False}
    described = {}
    for name, share in mixture.items():
        described[name] = {"tokens_available": 100, "tokens_seen": 50, "epochs_seen": 0.5,
                           "epochs": share * 10, "start": 1 / len(mixture), "lower": 0.0,
                           "upper": 1.0, "bound": "", "val_loss": 1.0, "bytes_per_token": 1.0,
                           "tokens_per_document": 40.0}
        described[name] |= (sources or {}).get(name, {})
    mean = sum(weight * loss for weight, loss in zip(weights, losses.values()))
    result = {"mixture": mixture, "recommended": "last", "unit": "tokens",
              "mixtures": {"last": mixture, "last_half_average": average or mixture,
                           "run_average": mixture},
              "bytes": mixture, "target": list(losses), "test_loss": mean,
              "test_bits_per_byte": 2 * mean, "targets": targets,
              "before": dict.fromkeys(losses, 4.0), "sources": described, "searched": searched,
              "tokenizer": "bytes", "seed": seed, "steps": 10, "tokens": 1000, "seconds": 1.0,
              "torch": "2.13.0",
              "settings": {"seed": seed, "out_dir": str(folder), "max_steps": 10, **settings}}
    (folder / "mixture.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    write_log(folder / "out")
    write_log(folder / "running", steps=2, tail='{"step": 2, "al')
    write_log(folder / "first", steps=1)
    write_log(folder / "fixed", searched=False)
    write_log(folder / "many", K=64)
    return folder


# ---- tables ------------------------------------------------------------------------------------

def test_table_of_a_finished_run(synthetic):
    """The same command prints again what the run ended with; nothing for one without a result."""
    argv = [*TINY, "--sources", "a,b", "--max_steps", 5, "--out_dir", "table"]
    stdout = run("fastmix.py", *argv, cwd=synthetic)
    again = run("plot_mixture.py", "table", cwd=synthetic)
    table = stdout.split("\n\n")[1].split("\nwrote ")[0]
    assert table in again and "mean of the targets" in table
    assert "final: share of the tokens at the end of the run" in table
    (synthetic / "table" / "mixture.json").write_text("[1]")
    line = refused("plot_mixture.py", "table", cwd=synthetic)
    assert "mixture.json: not what this fastmix.py writes" in line
    (synthetic / "table" / "mixture.json").unlink()
    assert run("plot_mixture.py", "table", cwd=synthetic) == "wrote table/mixture.png\n"


@pytest.mark.parametrize("at_the_end, warned", [(2.0, False), (2.05, False), (2.41, True)])
def test_a_run_that_ends_above_its_lowest_val_loss(tmp_path, at_the_end, warned):
    """From 3% on; results of earlier versions do not know their lowest."""
    result = write_result(tmp_path / "out", {"a": 1.0})
    assert "lowest" not in result_table(result)
    result |= {"lowest": {"step": 4, "val_loss": 2.0}, "val_loss": at_the_end}
    line = (f"warning: the target's val loss was lowest, 2.0000, at step 4, and is "
            f"{at_the_end:.4f} at the end")
    assert (line in result_table(result)) == warned
    result |= {"lowest": {"step": 4, "val_loss": 0.0043}, "val_loss": 0.0053}
    assert "lowest" not in result_table(result)  # nothing is left to lose


def test_every_line_of_the_table(tmp_path):
    """Each column says what it counts; epochs are those of the run that the search is for."""
    sources = {"a": {"tokens_available": 12345, "epochs": 1.25, "start": 0.4, "val_loss": 2.5},
               "b": {"tokens_available": 1000, "epochs": 31, "start": 0.6, "val_loss": 3}}
    result = write_result(tmp_path / "out", {"a": 0.3, "b": 0.7}, sources=sources)
    result["targets"]["t"]["learned_only"] = True
    table = [
        "source               tokens   start   final  epochs  val loss",
        "a                    12,345   0.400   0.300    1.25     2.500",
        "b                     1,000   0.600   0.700   31.00     3.000",
        "final: share of the tokens at the end of the run",
        "epochs: how often 1,000 tokens, drawn at the final mixture, read a source",
        "val loss: loss per token (nats) on the source's own val split",
        "target t: test loss 1.5000 per learned token, 3.0000 bits per byte; "
        "val loss 4.0000 before, 1.6000 after"]
    assert result_table(result).splitlines() == table
    result["settings"]["train_tokens"] = 25e9
    assert "how often 25,000,000,000 tokens, drawn" in result_table(result)


def test_several_targets_in_the_table(tmp_path):
    """What each gained or lost, its weight, and their mean."""
    result = write_result(tmp_path / "out", {"a": 0.5, "b": 0.5}, losses={"x": 1.0, "y": 2.0},
                          weights=[0.75, 0.25])
    assert ("target y: test loss 2.0000 per token, 4.0000 bits per byte; val loss 4.0000 before, "
            "2.1000 after; weight 0.250\nmean of the targets: test loss 1.2500 per token, 2.5000 "
            "bits per byte") in result_table(result)
    one = result_table(write_result(tmp_path / "out", {"a": 0.5, "b": 0.5}))
    assert "weight" not in one and "mean of the targets" not in one


def test_bounds_in_the_table(tmp_path):
    mixture = {"capped": 0.5, "kept": 0.05, "none": 0.0, "free": 0.45}
    bounds = {"capped": {"bound": "cap"}, "kept": {"bound": "floor"}}
    result = write_result(tmp_path / "out", mixture, sources=bounds)
    lines = result_table(result).splitlines()
    assert lines[1].endswith("final at its cap") and lines[2].endswith("final at its floor")
    assert not any("final at" in line for line in (lines[3], lines[4]))
    assert len(lines[0]) == len(lines[3]) == len(lines[4])


SPLIT = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.mark.parametrize("mixture, average, searched, parts", [
    ({"a": 0.95, "b": 0.05}, None, True, ["nearly all of the mixture is a"]),
    ({"a": 0.95, "b": 0.05}, None, False, []),
    ({"a": 1.0}, None, True, []),
    (SPLIT, {"a": 0.31, "b": 0.3, "c": 0.39}, True, []),
    (SPLIT, {"a": 0.28, "b": 0.3, "c": 0.42}, True, ["over the last half by 22%"]),
    ({"a": 0.91, "b": 0.09}, {"a": 0.2, "b": 0.8}, True, ["nearly all", "by 71%"])])
def test_warning_of_a_search_that_collapsed_or_moves(tmp_path, mixture, average, searched, parts):
    result = write_result(tmp_path / "out", mixture, average, searched=searched)
    stdout = run("plot_mixture.py", "out", cwd=tmp_path)
    warnings = [line for line in stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(parts), stdout
    assert all(part in line for part, line in zip(parts, warnings)), stdout
    assert "warning" not in result_table(result)


def test_seeds(tmp_path):
    """The table, what changes places, and the spread of each target."""
    shares = [(0.6, 0.1, 0.2, 0.1), (0.5, 0.3, 0.1, 0.1), (0.55, 0.2, 0.2, 0.05)]
    for i, mixture in enumerate(shares):
        write_result(tmp_path / f"out-{i}", dict(zip("abcd", mixture)), seed=i, device="cpu" * i,
                     losses={"x": 1 + i / 10, "y": 2.0})
    lines = run("plot_mixture.py", "out-0", "out-1", "out-2", cwd=tmp_path).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["source", "mean", "share", "lowest", "highest"], ["a", "0.550", "0.500", "0.600"],
        ["b", "0.200", "0.100", "0.300"], ["c", "0.167", "0.100", "0.200"],
        ["d", "0.083", "0.050", "0.100"]]
    assert lines[5:] == [
        "cannot be told apart: b and c",
        "target x: test loss 1.1000 per token, 1.0000 to 1.2000 over 3 seeds",
        "target y: test loss 2.0000 per token, 2.0000 to 2.0000 over 3 seeds",
        "mean of the targets: test loss 1.5500 per token, 1.5000 to 1.6000 over 3 seeds",
        "wrote out-0/comparison.png"]


def test_seeds_that_agree(tmp_path):
    for i in range(2):
        write_result(tmp_path / f"out-{i}", {"a": 0.6, "b": 0.4}, seed=i)
    stdout = run("plot_mixture.py", "out-0", "out-1", cwd=tmp_path)
    assert "cannot be told apart: none, all seeds give the same order\n" in stdout


def test_a_copy_of_a_run_is_no_other_seed(tmp_path):
    """It counts once, in the table and in an export; of one run and its copy one is left."""
    write_result(tmp_path / "out-1", {"a": 0.6, "b": 0.4}, seed=1)
    write_result(tmp_path / "out-2", {"a": 0.3, "b": 0.7}, seed=2)
    shutil.copytree(tmp_path / "out-1", tmp_path / "copy")
    write_result(tmp_path / "again", {"a": 0.6, "b": 0.4}, seed=1)  # the same command, run again
    line = "is the same run as out-1, seed 1; counted once"
    process = start("plot_mixture.py", "out-1", "copy", "out-2", "again", cwd=tmp_path)
    stdout, err = process.communicate()
    assert err.splitlines() == [f"copy {line}", f"again {line}"]
    assert "over 2 seeds" in stdout
    assert stdout.splitlines()[1].split() == ["a", "0.450", "0.300", "0.600"]
    process = start("plot_mixture.py", "out-1", "copy", cwd=tmp_path)
    stdout, err = process.communicate()
    assert err.splitlines() == [f"copy {line}"]
    assert stdout == result_table(plot_mixture.read_result(tmp_path / "out-1")) + (
        "\nwrote out-1/mixture.png\n")
    assert shares_of(tmp_path, "mosaic", "out-1", "copy", "out-2") == {"a": 0.45, "b": 0.55}


def test_one_seed_with_two_results_is_no_range(tmp_path):
    """As of a changed fastmix.py: the runs are compared, each by itself."""
    write_result(tmp_path / "out", {"a": 0.6, "b": 0.4})
    write_result(tmp_path / "changed", {"a": 0.5, "b": 0.5})
    assert run("plot_mixture.py", "out", "changed", cwd=tmp_path) == "wrote out/comparison.png\n"


def test_runs_that_differ_in_more_are_compared(tmp_path):
    """In a setting, in the sources, or because one has not ended: no table."""
    write_result(tmp_path / "a", {"a": 0.5, "b": 0.5})
    write_result(tmp_path / "b", {"a": 0.4, "b": 0.6}, max_steps=20)
    write_result(tmp_path / "c", {"a": 0.4, "c": 0.6})
    write_result(tmp_path / "d", {"a": 0.4, "b": 0.6}, losses={"u": 1.0})
    write_log(tmp_path / "running")
    pairs = [("a", "b"), ("a", "c"), ("a", "d"), ("a", "running"), ("running", "a")]
    for pair in pairs:
        stdout = run("plot_mixture.py", *pair, cwd=tmp_path)
        assert stdout == f"wrote {pair[0]}/comparison.png\n"


# ---- export: do trainers that follow its lines draw the mixture's shares of tokens? ------------

TRAINERS = ["hf", "megatron", "mosaic", "llamafactory"]
MIXTURE = {"tweets": 0.5, "news": 0.3, "books": 0.19998, "noise": 0.00002}
LENGTHS = {"tweets": 20, "news": 500, "books": 3000, "noise": 100}  # tokens per document


def lengths_of(lengths):
    return {name: {"tokens_per_document": float(n)} for name, n in lengths.items()}


@pytest.fixture
def out(tmp_path):
    write_result(tmp_path / "out", MIXTURE, sources=lengths_of(LENGTHS))
    return tmp_path


def exported(out, trainer, *folders):
    """
    (first, others): the lines for a trainer, of which the first is a comment with the unit.
    Nothing else is printed or written.
    """
    before = set(out.glob("**/*"))
    stdout = run("plot_mixture.py", *(folders or ["out"]), "--export", trainer, cwd=out)
    assert before == set(out.glob("**/*"))
    comment, *lines = stdout.splitlines()
    unit = "examples" if trainer in ("hf", "llamafactory") else "fixed-length samples"
    assert comment.startswith(f"# shares of {unit} = shares of tokens")
    assert not any("#" in line.split("  # ")[0] for line in lines)
    return comment, lines


def shares_of(out, trainer, *folders):
    """{source: number} as the trainer would read them."""
    text = "\n".join(exported(out, trainer, *folders)[1])
    if trainer == "megatron":
        flag, *words = text.split()
        weights, names = words[::2], words[1::2]
        assert flag == "--data-path" and all(n.endswith("_text_document") for n in names)
        return {n.removesuffix("_text_document"): float(w) for w, n in zip(weights, names)}
    if trainer == "mosaic":
        assert text.startswith("streams:\n")
        entry = r'^  "(\w+)":\n    local: "(\w+)"\n    proportion: (\S+)$'
        entries = re.findall(entry, text, re.MULTILINE)
        assert all(name == local for name, local, _ in entries)
        assert len(entries) * 3 + 1 == len(text.splitlines())
        return {name: float(p) for name, _, p in entries}
    if trainer == "llamafactory":
        yaml = dict(line.split(": ") for line in text.splitlines())
        assert len(yaml) == 3 and yaml["mix_strategy"] == "interleave_over"
        names = json.loads(yaml["dataset"]).split(",")
        p = json.loads(yaml["interleave_probs"]).split(",")
        return dict(zip(names, map(float, p), strict=True))
    return dict(zip(*called(text)[:2], strict=True))


def called(text):
    """(sources, probabilities, others): the arguments of interleave_datasets in lines of Python."""
    calls = []
    yours = {name: name for name in LENGTHS}
    before = sys.modules.get("datasets")

    def interleave_datasets(sets, probabilities, **others):
        calls.append((sets, probabilities, others))

    sys.modules["datasets"] = SimpleNamespace(interleave_datasets=interleave_datasets)
    try:
        exec(text, {"yours": yours})
    finally:
        sys.modules.pop("datasets")
        if before is not None:
            sys.modules["datasets"] = before
    call, = calls
    return call


@pytest.mark.parametrize("trainer", TRAINERS)
def test_tokens_drawn(out, trainer):
    """Examples of their source's length, or samples of 1024, drawn by p: the mixture in tokens."""
    p = shares_of(out, trainer)
    lengths = LENGTHS if trainer in ("hf", "llamafactory") else dict.fromkeys(LENGTHS, 1024)
    assert list(p) == ["tweets", "news", "books"] and abs(sum(p.values()) - 1) < 1e-8
    draws = np.random.default_rng(0).choice(len(p), 2_000_000, p=list(p.values()))
    drawn = np.bincount(draws, minlength=len(p))
    tokens = {name: count * lengths[name] for name, count in zip(p, drawn)}
    for name, count in tokens.items():
        assert abs(count / sum(tokens.values()) - MIXTURE[name]) < 0.01, (name, tokens)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_sources_without_a_share_are_left_out(out, trainer):
    """
    Megatron-LM and interleave_datasets refuse 0, and what is drawn one time in 50,000 is not
    read to its end.
    """
    comment, _ = exported(out, trainer)
    assert comment.endswith("; left out, under 0.0001: noise")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_very_long_documents_are_still_drawn(out, trainer):
    """Their share of the examples has more digits than others, and is not printed as 0."""
    lengths = {"tweets": 1, "news": 1, "books": 3e9}
    write_result(out / "long", {"tweets": 0.5, "news": 0.4999, "books": 0.0001},
                 sources=lengths_of(lengths))
    p = shares_of(out, trainer, "long")
    assert min(p.values()) > 0 and abs(sum(p.values()) - 1) < 1e-12
    expected = 1e-4 / 0.9999 / 3e9 if trainer in ("hf", "llamafactory") else 1e-4
    assert p["books"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("share", [0.5, 0.0001])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_probabilities_are_above_0_and_sum_to_1(out, trainer, share):
    """As they are printed, in decimals. A document of 28 MB, and records of 5 bytes."""
    lengths = {"news": 28e6, "tweets": 6, "books": 2e5 / 3}
    mixture = {"news": share, "tweets": 0.7 - share, "books": 0.3}
    write_result(out / "unlike", mixture, sources=lengths_of(lengths))
    text = "\n".join(exported(out, trainer, "unlike")[1])
    printed = [Decimal(number) for number in re.findall(r"\d\.\d{8,}", text)]
    assert len(printed) == 3 and min(printed) > 0 and sum(printed) == 1
    if trainer in ("hf", "llamafactory"):
        per_token = {name: mixture[name] / lengths[name] for name in mixture}
        expected = [value / sum(per_token.values()) for value in per_token.values()]
    else:
        expected = list(mixture.values())
    assert [float(p) for p in printed] == pytest.approx(expected, rel=0.01)


def test_arguments_of_interleave_datasets(out):
    text = "\n".join(exported(out, "hf")[1])
    assert called(text)[2] == {"seed": 1, "stopping_strategy": "all_exhausted"}


@pytest.mark.parametrize("trainer", ["megatron", "hf"])
def test_mean_of_several_runs(out, trainer):
    """Whether or not they differ in the seed alone, if all have the same sources."""
    lengths = lengths_of({"tweets": 10, "news": 40})
    for name, a in (("one", 0.6), ("two", 0.2)):
        write_result(out / name, {"tweets": a, "news": 1 - a}, sources=lengths,
                     max_steps=int(10 * a))
    expected = {"tweets": 8 / 11, "news": 3 / 11}
    if trainer == "megatron":
        expected = {"tweets": 0.4, "news": 0.6}
    assert shares_of(out, trainer, "one", "two") == pytest.approx(expected, abs=1e-8)
    for several in (["one", "out"], ["one", "out", "two"]):  # also where the last is as the first
        line = refused("plot_mixture.py", *several, "--export", trainer, cwd=out)
        assert ("runs of the same sources, not tweets, news (one) and "
                "tweets, news, books, noise (out)") in line


def test_one_source(out):
    write_result(out / "alone", {"news": 1.0})
    for trainer in TRAINERS:
        assert shares_of(out, trainer, "alone") == {"news": 1.0}


def test_hundreds_of_sources_sum_to_one(out):
    """numpy, which draws for interleave_datasets, wants it to within 1.5e-8."""
    rng = np.random.default_rng(0)
    names = [f"s{k}" for k in range(300)]
    write_result(out / "many", dict(zip(names, rng.dirichlet(np.ones(300)))),
                 sources=lengths_of(dict(zip(names, rng.uniform(5, 1e5, 300)))))
    for trainer in ("llamafactory", "megatron"):
        text = "\n".join(exported(out, trainer, "many")[1])
        p = [float(x) for x in re.findall(r"\d\.\d{8,}", text)]
        assert len(p) > 250 and abs(sum(p) - 1) < 1e-9 and min(p) > 0
        rng.choice(len(p), p=p)


def test_what_cannot_be_exported(out):
    """
    A run that has not ended; one of an older fastmix.py, whose mixture in tokens still can; an
    unknown trainer.
    """
    line = refused("plot_mixture.py", "gone", "--export", "hf", cwd=out)
    assert "gone/mixture.json: No such file or directory; finish the run" in line
    result = write_result(out / "older", {"a": 0.5, "b": 0.5})
    for source in result["sources"].values():
        source.pop("tokens_per_document")
    (out / "older" / "mixture.json").write_text(json.dumps(result))
    for trainer in ("hf", "llamafactory"):
        line = refused("plot_mixture.py", "older", "--export", trainer, cwd=out)
        assert "older/mixture.json" in line and "search again" in line
        assert "tokens_per_document" in line
    assert shares_of(out, "megatron", "older") == {"a": 0.5, "b": 0.5}
    line = run("plot_mixture.py", "out", "--export", "torchtitan", cwd=out, status=2)
    assert "invalid choice: 'torchtitan'" in line


def test_interleave_datasets_itself(out):
    """Hugging Face's package, where it is installed: examples of unlike lengths, all read."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    yours = {}
    for name, documents in (("tweets", 1000), ("news", 1000), ("books", 2000)):
        tokens = rng.integers(1, 2 * LENGTHS[name], documents)
        yours[name] = datasets.Dataset.from_dict({"source": [name] * documents, "tokens": tokens})
    lengths = {name: np.mean(yours[name]["tokens"]) for name in yours}
    write_result(out / "out", MIXTURE, sources=lengths_of(lengths))
    scope = {"yours": yours}
    exec("\n".join(exported(out, "hf")[1]), scope)
    mixed = scope["mixed"].with_format("numpy")[:]
    tokens = {name: mixed["tokens"][mixed["source"] == name].sum() for name in yours}
    for name, count in tokens.items():
        assert abs(count / sum(tokens.values()) - MIXTURE[name]) < 0.01, (name, tokens)


# ---- pictures ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["out", "running", "first", "fixed", "many"])
def test_picture_of_one_run(runs, name):
    run("plot_mixture.py", name, cwd=runs)
    picture = matplotlib.image.imread(runs / name / "mixture.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 900
    assert np.unique(picture.reshape(-1, 4), axis=0).shape[0] > 20


def test_picture_at_the_end_of_a_run(runs):
    """fastmix.py calls draw_run() and prints the path that it returns."""
    (runs / "out" / "mixture.png").unlink(missing_ok=True)
    assert plot_mixture.draw_run(str(runs / "out")) == runs / "out" / "mixture.png"
    assert (runs / "out" / "mixture.png").exists()


def drawn(monkeypatch, cwd, *argv):
    """The figure that plot_mixture.py saves, which is the README's 10 inches wide."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def savefig(fig, *args, **kw):
        figures.append(fig)
        return save(fig, *args, **kw)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    monkeypatch.chdir(cwd)
    plot_mixture.main(argv)
    fig, = figures
    assert fig.get_figwidth() == 10 and fig.dpi == 110
    return fig


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def text_of(ax):
    """(legend, all other text) of axes, each [(text, extent)]."""
    legend = ax.get_legend()
    entries = [*legend.get_texts(), legend.get_title()] if legend else []
    others = [ax.xaxis.label, ax.yaxis.label, *ax.texts, *ax.get_children()[-5:]]
    for axis, place in ((ax.xaxis, 0), (ax.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())
        others += [t for t in axis.get_ticklabels() if low <= t.get_position()[place] <= high]
    found = []
    for texts in (entries, others):
        texts = [t for t in texts if getattr(t, "get_text", str)()]
        found.append([(t.get_text(), t.get_window_extent()) for t in texts])
    return found


def check_text(fig, labels):
    """
    All text is within the figure and large enough to read, and no two pieces of it overlap.
    labels: how many entries all legends have.
    """
    texts = [text_of(ax) for ax in fig.axes]
    legends = [ax.get_legend() for ax in fig.axes if ax.get_legend()]
    assert sum(len(legend.get_texts()) for legend in legends) == labels
    everything = [text for legend, others in texts for text in legend + others]
    for text, box in everything:
        inside = 0 <= box.x0 and box.x1 <= fig.bbox.x1 and 0 <= box.y0 and box.y1 <= fig.bbox.y1
        assert inside, (text, box, fig.bbox)
    for (a, box_a), (b, box_b) in itertools.combinations(everything, 2):
        assert not box_a.overlaps(box_b), (a, b)
    for legend in legends:  # outside of all curves
        box = legend.get_window_extent()
        assert not any(box.overlaps(ax.get_window_extent()) for ax in fig.axes)
        assert min(t.get_fontsize() for t in legend.get_texts()) >= 8
    narrowest = min(ax.get_window_extent().width for ax in fig.axes)
    assert narrowest > 150, "hardly any room is left for the curves"


LENGTHS_AND_K = [(1, 12), (13, 7), (30, 2), (30, 12), (30, 64), (35, 7), (9, 1), (9, 3)]


def names_of(length, K):
    return [(chr(192 + k) + "mplementation_stackexchange_and_more")[:length] for k in range(K)]


@pytest.mark.parametrize("length, K", LENGTHS_AND_K)
def test_names_are_whole_in_the_picture_of_a_run(tmp_path, monkeypatch, length, K):
    """With many targets, and bounds, which make the labels longer."""
    names = names_of(length, K)
    targets = names_of(length, min(K // 3, 6))
    write_log(tmp_path / "out", names=names, targets=targets)
    mixture = read_log(tmp_path / "out")["alpha"]
    mixture = {name: float(alpha[-1]) for name, alpha in mixture.items()}
    write_result(tmp_path / "out", mixture, sources=dict.fromkeys(names, {"bound": "floor"}))
    fig = drawn(monkeypatch, tmp_path, "out")
    shown = 6 if K > 7 else K  # the rest is one band more
    lines = shown + 1 + (len(targets) if len(targets) > 1 else 0)
    check_text(fig, shown + (K > 7) + lines)
    found = {label.split("  ")[0] for label in legend_of(fig.axes[0])}
    found -= {f"{K - 6} others"}
    assert len(found) == shown
    if length <= 30:
        assert found <= set(names)
    else:
        assert all("…" in name and len(name) == 30 for name in found)


@pytest.mark.parametrize("length, K", LENGTHS_AND_K)
def test_names_are_whole_in_a_comparison(tmp_path, monkeypatch, length, K):
    sources = names_of(length, K)
    outs = names_of(length, min(max(K, 2), 12))
    for out in outs:
        write_log(tmp_path / out, names=sources)
    fig = drawn(monkeypatch, tmp_path, *outs)
    check_text(fig, len(outs))
    bars, losses = fig.axes
    names = [t.get_text() for t in bars.get_yticklabels()]
    labels = legend_of(losses)
    if length <= 30:
        assert names == sources and labels == [f"{out}  4.333" for out in outs]
    else:
        assert "…" in names[0] and max(map(len, names)) == 30 and "…" in labels[0]


def test_a_legend_of_many_runs(tmp_path, monkeypatch):
    """Each run has a line and bars of its own kind, by colour, dash and hatch."""
    outs = [f"out-{i}" for i in range(21)]
    for out in outs:
        write_log(tmp_path / out, K=32)
    fig = drawn(monkeypatch, tmp_path, *outs)
    check_text(fig, 21)
    bars, losses = fig.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in losses.lines}) == 21
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars.patches}) == 21


def test_names_that_are_no_formula(tmp_path, monkeypatch):
    """matplotlib would take what is between two $ for one, and with usetex also what has a _."""
    names = ["a$\\frac$", "b_1"]
    for name in names:
        write_log(tmp_path / name, names=names)
    with matplotlib.rc_context({"text.usetex": True}):
        fig = drawn(monkeypatch, tmp_path, *names)
        assert {label.split()[0] for label in legend_of(fig.axes[1])} == set(names)
        assert not any(text.get_usetex() for text in fig.axes[1].get_legend().get_texts())
        assert matplotlib.rcParams["text.usetex"]  # elsewhere it stays as it was


def font_with(path, name, letters):
    """A font file in which each of the letters is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    pen = TTGlyphPen(None)
    for i, point in enumerate(((0, 0), (0, 900), (900, 900), (900, 0))):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    glyphs = dict.fromkeys([".notdef", *(f"u{ord(c)}" for c in letters)], pen.glyph())
    font = FontBuilder(1000)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord(c): f"u{ord(c)}" for c in letters})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def test_names_in_letters_of_another_font(tmp_path, monkeypatch, recwarn):
    """
    A font that has them is used beside matplotlib's own; without one they are boxes. Neither prints
    a warning.
    """
    from matplotlib.font_manager import fontManager
    write_result(tmp_path / "out", {"中文": 0.5, "b": 0.5})
    known = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu", "Last"))]
    monkeypatch.setattr(fontManager, "ttflist", known)
    assert plot_mixture.fonts_for("中文 b") == ["DejaVu Sans"]
    plot_mixture.draw_run(tmp_path / "out")
    for name, letters in (("Other", "ABC"), ("First", "文字"), ("Second", "中")):
        font_with(tmp_path / f"{name}.ttf", name, letters)
        fontManager.addfont(tmp_path / f"{name}.ttf")
    (tmp_path / "Second.ttf").rename(tmp_path / "gone.ttf")
    assert plot_mixture.fonts_for("中文 b") == ["DejaVu Sans", "First"]
    (tmp_path / "gone.ttf").rename(tmp_path / "Second.ttf")
    assert plot_mixture.fonts_for("中文 b") == ["DejaVu Sans", "First", "Second"]
    assert plot_mixture.fonts_for("plain") == ["DejaVu Sans"]
    boxes = (tmp_path / "out" / "mixture.png").read_bytes()
    plot_mixture.draw_run(tmp_path / "out")
    assert (tmp_path / "out" / "mixture.png").read_bytes() != boxes
    assert not recwarn.list


def test_every_panel_says_what_it_shows(tmp_path, monkeypatch):
    write_log(tmp_path / "out")
    write_log(tmp_path / "fixed", searched=False)
    for argv, panels in ((["out"], 3), (["fixed"], 2), (["out", "fixed"], 2)):
        axes = drawn(monkeypatch, tmp_path, *argv).axes
        assert len(axes) == panels  # a fixed mixture has no alignments
        for ax in axes:
            assert ax.get_title(loc="left") and ax.get_xlabel()
        assert any(ax.get_ylabel() == "loss per token (nats)" for ax in axes)
        monkeypatch.undo()


def test_shares_in_the_legend(tmp_path, monkeypatch):
    """Those of mixture.json once it is there; until then, those of the last report."""
    write_log(tmp_path / "out", K=2)
    alpha = read_log(tmp_path / "out")["alpha"]
    expected = [f"source{k}  {alpha[f'source{k}'][-1]:.2f}" for k in (1, 0)]
    assert legend_of(drawn(monkeypatch, tmp_path, "out").axes[0]) == expected
    monkeypatch.undo()
    write_result(tmp_path / "out", {"source0": 0.123, "source1": 0.877})
    labels = legend_of(drawn(monkeypatch, tmp_path, "out").axes[0])
    assert labels == ["source1  0.88", "source0  0.12"]


def test_each_target_is_drawn(tmp_path, monkeypatch):
    """Thin and dashed, with its name, beside the mean; with very many, or one, only the mean is."""
    two = ["first", "second"]
    seven = [f"t{i}" for i in range(7)]
    for targets, drawn_too in ((["one"], []), (two, two), (seven, [])):
        write_log(tmp_path / "out", K=2, targets=targets)
        _, losses, alignments = drawn(monkeypatch, tmp_path, "out").axes
        mean = "target" if len(targets) == 1 else "mean of targets"
        assert legend_of(alignments) == ["source0", "source1", *drawn_too, mean]
        lines = {line.get_label(): line for line in losses.lines}
        for name in ("source0", "source1"):  # the legend is one for both panels
            color = lines[name].get_color()
            assert any(line.get_color() == color for line in alignments.lines)
        dashes = [line.get_linestyle() for line in losses.lines if line.get_linewidth() == 0.9]
        assert len(dashes) == len(drawn_too) == len(set(dashes)) and "-" not in dashes
        monkeypatch.undo()


def test_bounds_in_the_picture(tmp_path, monkeypatch):
    write_log(tmp_path / "out", K=3)
    bounds = {"source0": {"bound": "floor"}, "source2": {"bound": "cap"}}
    write_result(tmp_path / "out", {"source0": 0.1, "source1": 0.3, "source2": 0.6},
                 sources=bounds)
    labels = legend_of(drawn(monkeypatch, tmp_path, "out").axes[0])
    assert labels == ["source2  0.60 cap", "source1  0.30", "source0  0.10 floor"]


def test_comparison(runs):
    stdout = run("plot_mixture.py", "out/", "fixed", "many", cwd=runs)
    assert "out/comparison.png" in stdout
    assert matplotlib.image.imread(runs / "out" / "comparison.png").std() > 0.05


def test_picture_of_seeds(tmp_path, monkeypatch):
    for i, a in enumerate((0.6, 0.7)):
        write_result(tmp_path / f"out-{i}", {"a": a, "b": 1 - a}, seed=i)
    bars, losses = drawn(monkeypatch, tmp_path, "out-0", "out-1").axes
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [0.65, 0.35])
    ranges, = [c.get_segments() for c in bars.collections]
    ends = [[point[0] for point in segment] for segment in ranges]
    np.testing.assert_allclose(ends, [[0.6, 0.7], [0.3, 0.4]])
    assert len(legend_of(losses)) == 2


LOADS_MATPLOTLIB = """
import sys, plot_mixture
plot_mixture.main(sys.argv[1:])
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""


def test_matplotlib_is_loaded_for_pictures_alone(tmp_path):
    """Without pyplot and a display, whatever MPLBACKEND says."""
    write_result(tmp_path / "out", {"a": 0.5, "b": 0.5})
    for backend in ("", "TkAgg", "nonsense"):
        env = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
        env.pop("DISPLAY", None)
        for more, loaded in ((["--export", "hf"], "False False"), ([], "True False")):
            argv = [sys.executable, "-c", LOADS_MATPLOTLIB, "out", *more]
            done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == loaded


IN_A_THREAD = """
import os, sys, threading, plot_mixture
thread = threading.Thread(target=plot_mixture.main, args=(["out"],))
thread.start()
thread.join()
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.rcParams["backend"])
"""


def test_in_a_notebook_with_tex(tmp_path):
    """From a thread, with a matplotlibrc that asks for TeX; the backend stays the notebook's."""
    write_result(tmp_path / "out", {"a_$b": 0.5, "b": 0.5})
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    env = os.environ | {"MPLBACKEND": "module://sys", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == ["wrote out/mixture.png", "module://sys module://sys"]


# ---- bad input ---------------------------------------------------------------------------------

def test_bad_logs(runs):
    short = '{"step": 0, "target_val_loss": 5, "alpha": {"a": 1}}\n'
    logs = {"empty": "", "broken": "{}\n", "words": "words\n", "list": "[1]\n",
            "null": '{"step": null}\n', "short": short}
    for name, text in logs.items():
        (runs / name).mkdir()
        (runs / name / "log.jsonl").write_text(text)
    (runs / "bytes").mkdir()
    (runs / "bytes" / "log.jsonl").write_bytes(b"\xff\xfe\n")
    line = refused("plot_mixture.py", "gone run", cwd=runs)
    assert "No such file" in line
    assert line.endswith("a run of fastmix.py --out_dir 'gone run' writes it")
    assert "still empty" in refused("plot_mixture.py", "empty", cwd=runs)
    for name in ("broken", "words", "list", "null", "short", "bytes"):
        line = refused("plot_mixture.py", name, cwd=runs)
        assert f"{name}/log.jsonl: not what this fastmix.py writes" in line


def refused_here(monkeypatch, capsys, cwd, *argv):
    """refused(), in this process: these are many, and none gets far."""
    monkeypatch.chdir(cwd)
    with pytest.raises(SystemExit) as ended:
        plot_mixture.main(argv)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: "), line
    assert len(line.splitlines()) == 1, line
    return line


NO_RESULTS = ["", "words", "[1]", "null", "3", '{"mixture": {"a": 1}}', '{"mixture": [1]}']


@pytest.mark.parametrize("text", NO_RESULTS)
def test_results_that_are_none(tmp_path, monkeypatch, capsys, text):
    write_result(tmp_path / "whole", {"a": 0.5, "b": 0.5})
    write_log(tmp_path / "out")
    (tmp_path / "out" / "mixture.json").write_text(text)
    commands = [["out"], ["whole", "out"], ["out", "--export", "hf"],
                ["whole", "out", "--export", "mosaic"]]
    for argv in commands:
        line = refused_here(monkeypatch, capsys, tmp_path, *argv)
        assert "out/mixture.json: not what this fastmix.py writes" in line


KEYS = ["mixture", "mixtures", "sources", "targets", "before", "tokens", "settings", "searched",
        "seed"]


@pytest.mark.parametrize("key", KEYS)
def test_results_that_lack_something(tmp_path, monkeypatch, capsys, key):
    result = write_result(tmp_path / "out", {"a": 0.5, "b": 0.5})
    result.pop(key)
    (tmp_path / "out" / "mixture.json").write_text(json.dumps(result))
    line = refused_here(monkeypatch, capsys, tmp_path, "out")
    assert f"out/mixture.json: not what this fastmix.py writes (KeyError: '{key}')" in line


def test_a_result_of_another_run(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "out", names=["a", "b"])
    write_result(tmp_path / "out", {"a": 0.5, "c": 0.5})
    line = refused_here(monkeypatch, capsys, tmp_path, "out")
    assert "log.jsonl and mixture.json have different sources" in line


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch, capsys):
    """The table is printed, then one line; by a stand-in, since root may write everywhere."""
    write_result(tmp_path / "out", {"a": 0.5, "b": 0.5})

    def read_only(path, *args, **kw):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("prepare_data.open", read_only, raising=False)
    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        plot_mixture.main(["out"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert "target t: test loss 1.5000" in out
    line, = err.splitlines()
    assert line.startswith("error: cannot write out/mixture.png ([Errno 30] Read-only file system")


def test_a_picture_that_cannot_be_written(tmp_path):
    write_log(tmp_path / "out")
    (tmp_path / "out" / "mixture.png").mkdir()
    assert "cannot write out/mixture.png" in refused("plot_mixture.py", "out", cwd=tmp_path)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.jsonl", "mixture.png"]


def test_runs_on_other_data_are_not_pooled(tmp_path, capsys):
    """The second seed ran after a set was prepared anew: they are no seeds of one search."""
    for seed, tokens in ((1, 100), (2, 900)):
        write_result(tmp_path / f"out-{seed}", {"a": 0.5, "b": 0.5}, seed=seed,
                     sources={"a": {"tokens_available": tokens}})
    folders = [str(tmp_path / "out-1"), str(tmp_path / "out-2")]
    plot_mixture.main(folders)
    assert "mean share" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plot_mixture.main([*folders, "--export", "hf"])
    assert "the sets were prepared anew between" in capsys.readouterr().err
