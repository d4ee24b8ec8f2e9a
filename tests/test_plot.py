"""plot_mixture.py: tables, pictures, exports by which a trainer draws, and what it refuses."""
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.colors import to_hex

import plot_mixture
from conftest import ROOT, TINY, refused, run
from plot_mixture import COLOURS, progress, read_log, result_table
from test_prepare import here  # noqa: F401  a fixture

MIXTURE = {"a": 0.6, "b": 0.3, "c": 0.1}
SETTINGS = {"data_dir": "data", "mixture": None, "train_tokens": None, "max_steps": 40,
            "block_size": 16, "eval_tokens": 256}


# ---- the files of a run, by hand -----------------------------------------------------------------

def write_run(folder, shares=MIXTURE, seed=1, targets={"t": 1.0}, lengths={}, digests={},
              tokenizer="bytes", **settings):
    """
    A run of 5 reports as fastmix.py writes it. lengths: tokens per document, 40 if not given;
    targets {name: weight}; settings: those that are not SETTINGS.
    """
    folder.mkdir()
    target = ",".join(f"{name}={weight}" for name, weight in targets.items())
    settings = SETTINGS | {"seed": seed, "out_dir": str(folder), "target": target} | settings
    K = len(shares)
    lines = []
    for i in range(5):
        alpha = {name: 1 / K + i / 4 * (share - 1 / K) for name, share in shares.items()}
        row = {"step": 10 * i, "max_steps": 40, "alpha": alpha,
               "source_loss": {name: 5.0 - i / 4 if i > 0 else None for name in shares},
               "target_val_loss": 4.0 - i / 4,
               "target_losses": dict.fromkeys(targets, 4.0 - i / 4)}
        lines.append(json.dumps(row) + "\n")
    (folder / "log.jsonl").write_text("".join(lines))
    result = {"mixture": shares, "tokens_available": dict.fromkeys(shares, 12345),
              "real_run_tokens": settings["train_tokens"] or 5120,
              "epochs": {name: 10 * share for name, share in shares.items()},
              "tokens_per_document": dict.fromkeys(shares, 40.0) | lengths,
              "target_weights": targets,
              "test_loss": {name: 1.5 + i for i, name in enumerate(targets)},
              "tokenizer": tokenizer,
              "digests": dict.fromkeys((*shares, *targets), "0") | digests, "settings": settings}
    (folder / "mixture.json").write_text(json.dumps(result))


def plot(capsys, *argv):
    """What `plot_mixture.py argv` prints."""
    plot_mixture.main(list(argv))
    return capsys.readouterr().out


# ---- tables --------------------------------------------------------------------------------------

def table_of(folder, *args, **settings):
    write_run(folder, *args, **settings)
    return result_table(folder)


def test_table_of_a_run(here):
    table = table_of(here / "out", targets={"t": 0.75, "u": 0.25})
    assert table.splitlines() == [
        "source               tokens   start   final  epochs",
        "a                    12,345   0.333   0.600    6.00",
        "b                    12,345   0.333   0.300    3.00",
        "c                    12,345   0.333   0.100    1.00",
        "final: the mixture to use, in shares of tokens",
        "epochs: how often 5,120 tokens at the final mixture read a source",
        "",
        "target        weight  test loss  first val   last val",
        "t              0.750     1.5000     4.0000     3.0000",
        "u              0.250     2.5000     4.0000     3.0000",
        "mean                     1.7500",
        "losses: in nats per learned token"]
    assert "25,000,000,000 tokens at" in table_of(here / "real", train_tokens=25e9)


def test_a_run_prints_its_table_and_draws(synthetic):
    """fastmix.py and plot_mixture.py agree on the files; nothing is wider than a terminal."""
    stdout = run("fastmix.py", *TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps",
                 10, "--out_dir", "table", cwd=synthetic, picture=True)
    before, _, table = stdout.partition("\n\n")
    again = run("plot_mixture.py", "table", cwd=synthetic)
    assert again == table.partition("wrote ")[0] + "wrote table/mixture.png\n"
    assert max(map(len, again.splitlines())) <= 80
    steps = [line for line in before.splitlines() if line.startswith("step ")]
    assert len(steps) == 3  # step 0, 5 and 10
    assert max(map(len, steps)) <= 80
    assert (synthetic / "table" / "mixture.png").read_bytes().startswith(b"\x89PNG")


def test_line_of_progress():
    """As many of the largest shares as fit; before the first step no time is known."""
    shares = {"cpp": 0.07, "python": 0.674, "math": 0.156, "prose": 0.1, "a_very_long_name": 0.0}
    row = {"step": 100, "max_steps": 400, "target_val_loss": 2.3456, "alpha": shares}
    assert progress(row, steps_per_second=10) == (
        "step  100  val 2.346  30 s left  python 67% math 16% prose 10% cpp 7%")
    assert progress(row | {"step": 0}, 10) == (
        "step    0  val 2.346  python 67% math 16% prose 10% cpp 7% a_very_long_name 0%")


def test_warnings(here):
    """A search that ends at one source, but not a run at one."""
    one = {"a": 0.995, "b": 0.005}
    assert "the search ended with a alone" in table_of(here / "search", one)
    assert "warning" not in table_of(here / "fixed", one, mixture="a=0.995,b=0.005")


# ---- runs with other seeds -----------------------------------------------------------------------

def test_seeds(here, capsys):
    """b and c change places between the seeds, a leads in all."""
    for seed, shares in enumerate([(0.6, 0.1, 0.3), (0.5, 0.3, 0.2), (0.55, 0.25, 0.2)]):
        write_run(here / f"out-{seed}", dict(zip("abc", shares)), seed, data_dir=f"{seed}")
    text = plot(capsys, "out-0", "out-1", "out-2")
    assert text.splitlines() == [
        "out-0: target's test loss 1.5000",
        "out-1: target's test loss 1.5000",
        "out-2: target's test loss 1.5000",
        "source       mean share   lowest  highest",
        "a                 0.550    0.500    0.600",
        "b                 0.217    0.100    0.300",
        "c                 0.233    0.200    0.300",
        "wrote out-0/comparison.png"]


# what of a second run makes it another run than one of seed 1, and whether its loss is comparable
OTHERS = {
    "the same seed": ({"seed": 1}, True),
    "a setting": ({"max_steps": 80}, True),
    "a source's text": ({"digests": {"a": "1"}}, True),
    "the target's text": ({"digests": {"t": "1"}}, False),
    "the target": ({"targets": {"u": 1.0}}, False),
    "tokens of the evaluation": ({"eval_tokens": 512}, False),
    "the tokenizer": ({"tokenizer": "gpt2"}, False),
}


@pytest.mark.parametrize("other", OTHERS)
def test_runs_that_differ_in_more_than_the_seed(here, capsys, other):
    """Their mixtures are never averaged; their losses are compared if they are of one text."""
    change, comparable = OTHERS[other]
    write_run(here / "out")
    write_run(here / "other", **{"seed": 2} | change)
    with pytest.raises(SystemExit):
        plot_mixture.main(["out", "other", "--export", "hf"])
    assert "runs that differ in --seed alone" in capsys.readouterr().err
    if comparable:
        assert plot(capsys, "out", "other").endswith("wrote out/comparison.png\n")
    else:
        with pytest.raises(SystemExit):
            plot_mixture.main(["out", "other"])
        assert "error: the losses of other and out cannot be compared" in capsys.readouterr().err


# ---- pictures ------------------------------------------------------------------------------------

@pytest.fixture
def figures(monkeypatch):
    """A list of all figures that would be saved."""
    saved = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda fig, path: saved.append(fig))
    return saved


def labels(fig):
    legend, = fig.legends
    return [text.get_text() for text in legend.get_texts()]


def test_picture_of_a_run(here, figures):
    """Curves and bands are the columns of the log."""
    write_run(here / "out")
    assert plot_mixture.draw_run("out") == Path("out", "mixture.png")
    fig, = figures
    assert labels(fig) == ["c  0.10", "b  0.30", "a  0.60"]  # as the bands lie
    log = read_log("out")
    shares, losses = fig.axes
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in shares.collections]
    assert tops == pytest.approx([0.6, 0.9, 1.0])
    drawn = {line.get_color(): line.get_ydata() for line in losses.get_lines()}
    for name, colour in zip("abc", COLOURS):
        np.testing.assert_array_equal(drawn[colour], log["source_loss"][name][1:])
    np.testing.assert_array_equal(drawn[plot_mixture.BLACK], log["target_val_loss"])


def test_more_sources_than_colours(here, figures):
    """The six largest are shown by themselves, also if names begin alike; the rest is grey."""
    shares = np.arange(1, 10) / 45
    names = [f"a_very_long_name_of_a_source_{k}" for k in range(9)]
    write_run(here / "out", dict(zip(names, shares)), mixture="uniform")
    plot_mixture.draw_run("out")
    fig, = figures
    assert labels(fig) == ["3 others  0.13", *[f"a_very_long_name_of_a_so  {share:.2f}"
                                               for share in shares[3:]]]
    assert len(fig.axes[0].collections) == 7


def test_a_run_that_has_just_begun(here, capsys):
    """One report, and half of the next, as a run that is being watched may have written them."""
    write_run(here / "out")
    (here / "out" / "mixture.json").unlink()
    lines = (here / "out" / "log.jsonl").read_text().splitlines(keepends=True)
    (here / "out" / "log.jsonl").write_text(lines[0] + lines[1][:30])
    assert plot(capsys, "out") == "wrote out/mixture.png\n"


def test_picture_of_several_runs(here, figures):
    """Bars of all sources of all runs, each with its share."""
    write_run(here / "one")
    write_run(here / "two", {"a": 0.2, "d": 0.8}, max_steps=80)
    plot_mixture.main(["one", "two"])
    fig, = figures
    bars, losses = fig.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["a", "b", "c", "d"]
    assert [bar.get_width() for bar in bars.patches] == [0.6, 0.3, 0.1, 0, 0.2, 0, 0, 0.8]
    one, two = losses.get_lines()
    np.testing.assert_array_equal(one.get_ydata(), read_log("one")["target_val_loss"])
    np.testing.assert_array_equal(two.get_ydata(), read_log("two")["target_val_loss"])
    assert one.get_color() == to_hex(bars.patches[0].get_facecolor()).upper() == COLOURS[0]
    assert labels(fig) == ["one  3.000", "two  3.000"]


# ---- export: does a trainer that draws by these lines read the mixture's shares of tokens? -------

SHARES = {"tweets": 0.5, "news": 0.3, "books": 0.19998, "noise": 0.00002}
LENGTHS = {"tweets": 20, "news": 500, "books": 3000, "noise": 100}  # tokens per document


def exported_probabilities(text, trainer):
    """{source: probability} as the trainer would read them."""
    if trainer == "megatron":
        words = text.splitlines()[-1].removeprefix("--data-path ").split()
        names = [name.removesuffix("_text_document") for name in words[1::2]]
        return dict(zip(names, map(float, words[::2]), strict=True))
    return eval(re.search(r"^p = (.*)$", text, re.MULTILINE)[1])


@pytest.mark.parametrize("trainer", ["hf", "megatron"])
def test_tokens_drawn(here, capsys, trainer):
    """Two seeds' mean, by examples of their source's length or by samples of 1,024 tokens."""
    other = SHARES | {"tweets": 0.3, "news": 0.5}
    write_run(here / "out-1", SHARES, seed=1, lengths=LENGTHS)
    write_run(here / "out-2", other, seed=2, lengths=LENGTHS)
    p = exported_probabilities(plot(capsys, "out-1", "out-2", "--export", trainer), trainer)
    assert sum(p.values()) == pytest.approx(1, abs=1e-9)
    lengths = LENGTHS
    if trainer == "megatron":
        lengths = dict.fromkeys(LENGTHS, 1024)
    tokens = {name: share * lengths[name] for name, share in p.items()}
    total = sum(tokens.values())
    shares = {name: n / total for name, n in tokens.items()}  # noise is too rare
    assert shares == pytest.approx({"tweets": 0.4, "news": 0.4, "books": 0.2}, abs=1e-4)


def test_interleave_datasets_itself(here, capsys):
    """Hugging Face's package, where it is installed, reads each source several times."""
    datasets = pytest.importorskip("datasets")
    lengths = {"tweets": 10, "news": 30, "books": 60, "noise": 10}
    write_run(here / "out", SHARES, lengths=lengths, train_tokens=60_000)
    text = plot(capsys, "out", "--export", "hf")
    yours = {}
    for name, n in lengths.items():
        # a long and a short example, of n tokens on average
        yours[name] = datasets.Dataset.from_dict({"source": [name] * 2, "n": [n // 2, n + n // 2]})
    scope = {"yours": yours}
    exec(text, scope)
    examples = list(scope["mixed"])
    assert f"a run of 60,000 tokens draws about {len(examples):,};" in text
    tokens = dict.fromkeys(SHARES, 0)
    for example in examples:
        tokens[example["source"]] += example["n"]
    assert sum(tokens.values()) == pytest.approx(60_000, rel=0.05)
    shares = np.array(list(tokens.values())) / sum(tokens.values())
    assert shares == pytest.approx([0.5, 0.3, 0.2, 0], abs=0.03)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("folder, words", [
    ("gone", "No such file or directory: 'gone/log.jsonl'"),
    ("begun", "begun/log.jsonl has no report yet"),
    ("damaged", "Expecting ',' delimiter"),
    ("older", "KeyError: 'tokens_available'")])
def test_bad_input(tmp_path, folder, words):
    write_run(tmp_path / "begun")
    (tmp_path / "begun" / "mixture.json").unlink()
    (tmp_path / "begun" / "log.jsonl").write_text('{"step": 0, "max')
    write_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "mixture.json").write_text('{"mixture": {"a": 1.0}')
    write_run(tmp_path / "older")
    (tmp_path / "older" / "mixture.json").write_text('{"mixture": {"a": 1.0}, "test_loss": {}}')
    assert words in refused("plot_mixture.py", folder, cwd=tmp_path)


def test_full_disk(tmp_path):
    """An export that is not written is no success."""
    write_run(tmp_path / "out")
    argv = [sys.executable, ROOT / "plot_mixture.py", "out", "--export", "hf"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(argv, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: OSError: [Errno 28] No space left on device")
    assert process.stderr.count("\n") == 1
