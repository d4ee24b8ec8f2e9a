"""plot_mixture.py: logs and mixtures; tables; pictures, whose text is measured; bad inputs."""
import itertools
import json
import math
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

import plot_mixture
from conftest import TINY, refused, run
from plot_mixture import append_row, mixture_at, open_log, progress, read_log, read_mixture, result_table, save_result


def write_log(folder, K=3, steps=30, searched=True, tail="", names=None, targets=(), **more):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = names or [f"source{k}" for k in range(K)]
    with open(folder / "log.jsonl", "w") as f:
        for step in range(steps):
            alpha = rng.dirichlet(np.ones(len(names)))
            f.write(json.dumps({
                "step": step, "max_steps": 30, "alpha": dict(zip(names, alpha)),
                "alignment": {n: float(rng.normal()) if searched and step else None for n in names},
                "source_loss": {n: 5.0 - step / 30 if step else None for n in names}, "train_loss": 1.0,
                "target_val_loss": 5.0 - step / 30 if step % 10 == 0 else None, "tokens": step, "seconds": 0.1,
                "target_losses": {t: 4.9 - step / 30 + i / 5 for i, t in enumerate(targets)}, **more}) + "\n")
        f.write(tail)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    write_log(folder / "out")
    write_log(folder / "running", steps=2, tail='{"step": 2, "al')
    write_log(folder / "first", steps=1)
    write_log(folder / "fixed", searched=False)
    write_log(folder / "many", K=64)
    return folder


@pytest.mark.parametrize("name", ["out", "running", "first", "fixed", "many"])
def test_picture_of_one_run(runs, name):
    run("plot_mixture.py", name, cwd=runs)
    picture = matplotlib.image.imread(runs / name / "mixture.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 900 and np.unique(picture.reshape(-1, 4), axis=0).shape[0] > 20


def drawn(monkeypatch, cwd, *argv):
    """The figure that plot_mixture.py saves, which is the README's 10 inches wide."""
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig",
                        lambda fig, *args, **kw: figures.append(fig) or save(fig, *args, **kw))
    monkeypatch.setattr(sys, "argv", ["plot_mixture.py", *argv])
    monkeypatch.chdir(cwd)
    plot_mixture.main()
    fig, = figures
    assert fig.get_figwidth() == 10 and fig.dpi == 110
    return fig


def text_of(ax):
    """(annotations, all other text) of axes, each [(text, extent)]."""
    others = [ax.xaxis.label, ax.yaxis.label, *ax.get_children()[-4:-1]]
    for axis, place in ((ax.xaxis, 0), (ax.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())
        others += [t for t in axis.get_ticklabels() if low <= t.get_position()[place] <= high]
    return [[(t.get_text(), t.get_window_extent()) for t in texts if getattr(t, "get_text", str)()]
            for texts in (ax.texts, others)]


def check_text(fig, labels):
    """All text is within the figure, and no label on another text; labels, how many there are."""
    texts = [text_of(ax) for ax in fig.axes]
    annotations = [t for ends, _ in texts for t in ends]
    assert len(annotations) == labels
    for text, box in [*annotations, *(t for _, others in texts for t in others)]:
        assert 0 <= box.x0 and box.x1 <= fig.bbox.x1 and 0 <= box.y0 and box.y1 <= fig.bbox.y1, (text, box, fig.bbox)
    for (a, box_a), (b, box_b) in itertools.combinations(annotations, 2):
        assert not box_a.overlaps(box_b), (a, b)
    for (a, box_a), (_, others) in itertools.product(annotations, texts):
        assert not any(box_a.overlaps(box) for _, box in others), (a, [b for b, box in others if box_a.overlaps(box)])
    for (_, these), (_, those) in itertools.combinations(texts, 2):
        assert not [(a, b) for (a, box_a), (b, box_b) in itertools.product(these, those) if box_a.overlaps(box_b)]
    assert min(ax.get_window_extent().width for ax in fig.axes) > 150, "hardly any room is left for the curves"


LENGTHS = [(1, 12), (13, 7), (30, 2), (30, 12), (35, 7)]


def names_of(length, K):
    return [(chr(97 + k) + "mplementation_stackexchange_and_more")[:length] for k in range(K)]


@pytest.mark.parametrize("length, K", LENGTHS)
def test_names_are_whole_in_the_picture_of_a_run(tmp_path, monkeypatch, length, K):
    names = names_of(length, K)
    write_log(tmp_path / "out", names=names, targets=names_of(length, K // 3), upper=dict.fromkeys(names, 0.9999999))
    fig = drawn(monkeypatch, tmp_path, "out")
    shown, targets = (6 if K == 12 else K), K // 3  # of 12 sources the rest are one band more
    check_text(fig, 3 * shown + (K == 12) + (targets if targets > 1 else 0) + 1)
    found = {t.get_text().split("  ")[0] for t in fig.axes[0].texts} - {"6 others"}
    assert len(found) == shown and all(n in names if length <= 30 else "…" in n and len(n) == 30 for n in found)


@pytest.mark.parametrize("length, K", LENGTHS)
def test_names_are_whole_in_a_comparison(tmp_path, monkeypatch, length, K):
    sources, outs = names_of(length, K), names_of(length, K)
    for out in outs:
        write_log(tmp_path / out, names=sources)
    fig = drawn(monkeypatch, tmp_path, *outs)
    check_text(fig, len(outs))
    bars, losses = fig.axes
    shown = [t.get_text() for t in bars.get_yticklabels()], sorted(t.get_text() for t in losses.texts)
    if length <= 30:
        assert shown == (sources, sorted(f"{out}  4.333" for out in outs))
    else:
        assert "…" in shown[0][0] and max(map(len, shown[0])) == 30 and "…" in shown[1][0]


def test_many_labels_shrink(tmp_path, monkeypatch):
    outs = [f"out-{i}" for i in range(24)]
    for out in outs:
        write_log(tmp_path / out, K=32)
    check_text(drawn(monkeypatch, tmp_path, *outs), 24)


def test_names_that_are_no_formula(tmp_path, monkeypatch):
    """matplotlib would take what is between two $ for one."""
    names = ["a$\\frac$", "b"]
    for name in names:
        write_log(tmp_path / name)
    assert {t.get_text().split()[0] for t in drawn(monkeypatch, tmp_path, *names).axes[1].texts} == set(names)


def test_each_target_is_drawn(tmp_path, monkeypatch):
    """Thin and dashed, with its name, beside the mean; with very many, or one, only the mean is."""
    two, seven = ["first", "second"], [f"t{i}" for i in range(7)]
    for targets, drawn_too in ((["one"], []), (two, two), (seven, [])):
        write_log(tmp_path / "out", K=2, targets=targets)
        losses = drawn(monkeypatch, tmp_path, "out").axes[1]
        labels = {t.get_text() for t in losses.texts}
        assert labels == {"source0", "source1", *drawn_too, "target" if len(targets) == 1 else "mean of targets"}
        dashes = [line.get_linestyle() for line in losses.lines if line.get_linewidth() == 0.9]
        assert len(dashes) == len(drawn_too) == len(set(dashes)) and "-" not in dashes
        monkeypatch.undo()


def test_bounds_in_the_picture(tmp_path, monkeypatch):
    write_log(tmp_path / "out", K=3)
    last = {n: a[-1] for n, a in read_log(tmp_path / "out")["alpha"].items()}
    low = {"source0": last["source0"] * 0.996, "source1": 0.0, "source2": 0.0}
    high = {"source0": 1.0, "source1": last["source1"] * 1.006 + 2e-3, "source2": last["source2"] * 1.004}
    write_log(tmp_path / "out", K=3, lower=low, upper=high)
    labels = {t.get_text().split()[0]: t.get_text() for t in drawn(monkeypatch, tmp_path, "out").axes[0].texts}
    assert labels["source0"].endswith("floor") and labels["source2"].endswith("cap")
    assert labels["source1"] == f"source1  {last['source1']:.2f}"


def test_comparison(runs):
    assert "out/comparison.png" in run("plot_mixture.py", "out/", "fixed", "many", cwd=runs)
    assert matplotlib.image.imread(runs / "out" / "comparison.png").std() > 0.05


def test_table_of_a_finished_run(synthetic):
    """The picture's command prints again what the run ended with; of a run without a result it prints nothing."""
    stdout = run("fastmix.py", *TINY, "--sources", "a,b", "--max_steps", 5, "--out_dir", "table", cwd=synthetic)
    again = run("plot_mixture.py", "table", cwd=synthetic)
    table = stdout.split("\n\n")[1].split("\nwrote ")[0]
    assert table in again and "mean of the targets" in table and "final: average of the last half" in table
    (synthetic / "table" / "mixture.json").write_text("[1]")
    assert "mixture.json: not what this fastmix.py writes" in refused("plot_mixture.py", "table", cwd=synthetic)
    (synthetic / "table" / "mixture.json").unlink()
    assert run("plot_mixture.py", "table", cwd=synthetic) == "wrote table/mixture.png\n"


def result_of(folder, mixture, last=None, seed=1, targets=("t",), losses=None, searched=True, sources=None, **settings):
    """A run's log.jsonl, and mixture.json by save_result(); what the latter returns. mixture {source: share}."""
    names, losses = list(mixture), losses or [1.5] * len(targets)
    first = json.dumps({"step": 0, "alpha": mixture, "target_losses": dict.fromkeys(targets, 4.0)})
    if not folder.exists():
        write_log(folder, names=names)
    rows = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(first + "\n")
    values = torch.tensor(list(mixture.values()), dtype=torch.float64)
    last = values if last is None else torch.tensor(last, dtype=torch.float64)
    one = torch.ones(len(names), dtype=torch.int64)
    result = save_result(
        folder, names, searched=searched,
        mixtures={"last": last, "last_half_average": 7 * values, "run_average": values},
        targets={t: {"val_loss": x + 0.1, "test_loss": x, "test_bits_per_byte": 2 * x, "learned_only": False,
                     **({"weight": settings["weights"][i]} if "weights" in settings else {})}
                 for i, (t, x) in enumerate(zip(targets, losses))},
        sources={"tokens_available": 100 * one, "tokens_seen": 50 * one, "val_loss": one.double(), **(sources or {})},
        seed=seed, steps=10, tokens=1000, settings={"seed": seed, "out_dir": str(folder), "max_steps": 10, **settings})
    (folder / "log.jsonl").write_text(rows)
    return result


def test_shares_of_bytes(tmp_path):
    """Shares of tokens times bytes a token; without the latter there are none."""
    result = result_of(tmp_path / "out", {"a": 0.5, "b": 0.5}, sources={"bytes_per_token": torch.tensor([1.0, 3.0])})
    assert result["bytes"] == pytest.approx({"a": 0.25, "b": 0.75})
    assert result["sources"]["b"]["bytes_per_token"] == 3 and result["sources"]["a"]["epochs"] == 0.5
    assert "bytes" not in result_of(tmp_path / "out", {"a": 0.5, "b": 0.5})


def test_several_targets_in_the_table(tmp_path):
    """What each gained or lost, and means by weight; equal weights where none are given."""
    mixture, two = {"a": 0.5, "b": 0.5}, {"targets": ("x", "y"), "losses": [1.0, 2.0]}
    result = result_of(tmp_path / "out", mixture, **two)
    assert result["test_loss"] == 1.5 and result["test_bits_per_byte"] == 3
    result = result_of(tmp_path / "out", mixture, **two, weights=[0.75, 0.25])
    assert result["test_loss"] == 1.25 and result["test_bits_per_byte"] == 2.5
    table = result_table(result)
    assert ("target y: test loss 2.0000 nats a token, 4.0000 bits a byte; val loss 4.0000 before, 2.1000 after; "
            "weight 0.250\nmean of the targets: test loss 1.2500") in table
    assert "weight" not in result_table(result_of(tmp_path / "out", mixture))


def test_bounds_in_the_table(tmp_path):
    bounds = {"lower": torch.tensor([0.0, 0.0499, 0, 0]), "upper": torch.tensor([0.501, 1.0, 1.0, 0.6])}
    mixture = {"capped": 0.5, "kept": 0.05, "none": 0.0, "free": 0.45}
    lines = result_table(result_of(tmp_path / "out", mixture, sources=bounds)).splitlines()
    assert lines[1].endswith("final at its cap") and lines[2].endswith("final at its floor")
    assert not any("final at" in line for line in (lines[3], lines[4]))
    assert len(lines[0]) == len(lines[3]) == len(lines[4])


@pytest.mark.parametrize("mixture, last, searched, parts", [
    ({"a": 0.95, "b": 0.05}, None, True, ["nearly all of the mixture is a"]),
    ({"a": 0.95, "b": 0.05}, None, False, []),
    ({"a": 1.0}, None, True, []),
    ({"a": 0.5, "b": 0.3, "c": 0.2}, [0.31, 0.3, 0.39], True, []),
    ({"a": 0.5, "b": 0.3, "c": 0.2}, [0.28, 0.3, 0.42], True, ["22% of the last mixture is not in that average"]),
    ({"a": 0.91, "b": 0.09}, [0.2, 0.8], True, ["nearly all", "71% of the last"])])
def test_warning_of_a_search_that_collapsed_or_moves(tmp_path, mixture, last, searched, parts):
    result = result_of(tmp_path / "out", mixture, last, searched=searched)
    stdout = run("plot_mixture.py", "out", cwd=tmp_path)
    warnings = [line for line in stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(parts) and all(part in line for part, line in zip(parts, warnings)), stdout
    assert "warning" not in result_table(result)


def test_seeds(tmp_path):
    """The table, what changes places, the spread of each target, and bars with the range."""
    shares = [(0.6, 0.1, 0.2, 0.1), (0.5, 0.3, 0.1, 0.1), (0.55, 0.2, 0.2, 0.05)]
    for i, (a, b, c, d) in enumerate(shares):
        result_of(tmp_path / f"out-{i}", {"a": a, "b": b, "c": c, "d": d}, seed=i, targets=("x", "y"), device="cpu" * i,
                  losses=[1 + i / 10, 2.0])
    lines = run("plot_mixture.py", "out-0", "out-1", "out-2", cwd=tmp_path).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["source", "mean", "share", "lowest", "highest"], ["a", "0.550", "0.500", "0.600"],
        ["b", "0.200", "0.100", "0.300"], ["c", "0.167", "0.100", "0.200"], ["d", "0.083", "0.050", "0.100"]]
    assert lines[5:] == ["cannot be told apart: b and c",
                         "target x: test loss 1.1000 nats a token, 1.0000 to 1.2000 over 3 seeds",
                         "target y: test loss 2.0000 nats a token, 2.0000 to 2.0000 over 3 seeds",
                         "mean of the targets: test loss 1.5500 nats a token, 1.5000 to 1.6000 over 3 seeds",
                         "wrote out-0/comparison.png"]


def test_picture_of_seeds(tmp_path, monkeypatch):
    for i, a in enumerate((0.6, 0.7)):
        result_of(tmp_path / f"out-{i}", {"a": a, "b": 1 - a}, seed=i)
    bars, losses = drawn(monkeypatch, tmp_path, "out-0", "out-1").axes
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [0.65, 0.35])
    ranges, = [c.get_segments() for c in bars.collections]
    np.testing.assert_allclose([[p[0] for p in segment] for segment in ranges], [[0.6, 0.7], [0.3, 0.4]])
    assert len(losses.texts) == 2


def test_runs_that_differ_in_more_are_compared(tmp_path):
    """In a setting, in the sources, or because one has not ended: no table."""
    for name, mixture, more in (("a", {"a": 0.5, "b": 0.5}, {}), ("b", {"a": 0.4, "b": 0.6}, {"max_steps": 20}),
                                ("c", {"a": 0.4, "c": 0.6}, {"sources": "a,c"})):
        sources = more.pop("sources", "a,b")
        result_of(tmp_path / name, mixture, seed=3, **more)
        path = tmp_path / name / "mixture.json"
        result = json.loads(path.read_text())
        result["settings"]["sources"] = sources
        path.write_text(json.dumps(result))
    write_log(tmp_path / "running")
    for runs in (("a", "b"), ("a", "c"), ("a", "running"), ("running", "a")):
        assert run("plot_mixture.py", *runs, cwd=tmp_path) == f"wrote {runs[0]}/comparison.png\n"


def log_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_schedule_of_a_log(tmp_path):
    """By fraction of the run that is logged, linear between its rows; older logs do not say how long that was to be."""
    rows = [{"step": s, "alpha": {"a": a, "b": 1 - a}} for s, a in ((0, 0.5), (10, 0.7), (40, 0.9))]
    for more in ({}, {"max_steps": 40}):
        schedule = read_mixture(log_of(tmp_path / "log.jsonl", [r | more for r in rows]), ["b", "c", "a"], [1, 1, 1])
        np.testing.assert_allclose(schedule, [[0, 0.5, 0, 0.5], [0.25, 0.3, 0, 0.7], [1, 0.1, 0, 0.9]])
    for fraction, a in ((0, 0.5), (0.125, 0.6), (0.25, 0.7), (0.625, 0.8), (1, 0.9)):
        alpha = mixture_at(torch.from_numpy(schedule), fraction)
        torch.testing.assert_close(alpha, torch.tensor([1 - a, 0, a], dtype=torch.float64))


def test_schedules_that_are_constant(tmp_path):
    (tmp_path / "m.json").write_text('{"mixture": {"a": 3, "b": 1}, "mixtures": {}}')
    for text, expected in (("uniform", [0.5, 0.5]), ("proportional", [0.2, 0.8]), ("a=3, b=1", [0.75, 0.25]),
                           ("b=7", [0, 1]), (str(tmp_path / "m.json"), [0.75, 0.25])):
        schedule = read_mixture(text, ["a", "b"], [10, 40])
        np.testing.assert_allclose(schedule, [[0, *expected]])
        np.testing.assert_allclose(mixture_at(torch.from_numpy(schedule), 0.7), expected)


@pytest.mark.parametrize("rows, part", [
    ([{"step": 0, "max_steps": 40}, {"step": 39, "max_steps": 40}], "its run is at step 39 of 40; finish it first"),
    ([{"step": 0, "max_steps": 40}], "its run is at step 0 of 40; finish it first"),
    ([{"max_steps": 40}], "not a mixture that fastmix wrote"),
    ([{"step": None}], "not a mixture that fastmix wrote"),
    ([{"step": 40, "max_steps": "many"}], "not a mixture that fastmix wrote"),
    ([], "empty")])
def test_logs_that_are_no_schedule(tmp_path, capsys, rows, part):
    path = log_of(tmp_path / "log.jsonl", [{"alpha": {"a": 1.0}} | row for row in rows])
    with pytest.raises(SystemExit) as ended:
        read_mixture(path, ["a"], [1])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: --mixture {path}") and part in line


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Without the rows after it and a line cut short; a new run begins with none."""
    names, path = ["a", "b"], tmp_path / "log.jsonl"
    for step, kept in ((-1, []), (5, [0, 5]), (5, [0, 5]), (0, [0])):
        with open_log(tmp_path, step, names) as log:
            assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == kept
            for new in [0, 5, 10][len(kept):]:
                row = append_row(log, names, step=new, alpha=torch.tensor([0.25, 0.75]),
                                 alignment=torch.tensor([math.nan, 1.0]))
                assert row == {"step": new, "alpha": {"a": 0.25, "b": 0.75}, "alignment": {"a": None, "b": 1.0}}
                assert path.read_text().endswith(json.dumps(row) + "\n")
            log.write('{"step": 1')
    with pytest.raises(SystemExit):  # another run has begun here meanwhile
        open_log(tmp_path, -1, names)


def test_progress_line():
    row = {"step": 0, "max_steps": 200, "alpha": {"a": 0.3, "b": 0.7}, "train_loss": None, "target_val_loss": 2.5,
           "tokens": 0}
    assert progress(row, 0.0) == "step     0   0% | target 2.500 | a ▃ 0.30  b ▆ 0.70"
    row |= {"step": 50, "train_loss": 2.25, "tokens": 50 * 64}
    assert progress(row, 25.0) == ("step    50  25% | target 2.500 | train 2.250 | 1,600 tok/s | 6 s left | "
                                   "a ▃ 0.30  b ▆ 0.70")


def test_bad_input(runs):
    for name, text in (("empty", ""), ("broken", "{}\n"), ("words", "words\n"), ("list", "[1]\n"),
                       ("null", '{"step": null}\n'),
                       ("short", '{"step": 0, "target_val_loss": 5, "alpha": {"a": 1}}\n')):
        (runs / name).mkdir()
        (runs / name / "log.jsonl").write_text(text)
    (runs / "bytes").mkdir()
    (runs / "bytes" / "log.jsonl").write_bytes(b"\xff\xfe\n")
    assert "No such file" in refused("plot_mixture.py", "gone", cwd=runs)
    assert "still empty" in refused("plot_mixture.py", "empty", cwd=runs)
    for name in ("broken", "words", "list", "null", "short", "bytes"):
        assert f"{name}/log.jsonl: not a log" in refused("plot_mixture.py", name, cwd=runs)


def refused_here(monkeypatch, capsys, cwd, *argv):
    """refused(), in this process: these are many, and none gets far."""
    monkeypatch.setattr(sys, "argv", ["plot_mixture.py", *argv])
    monkeypatch.chdir(cwd)
    with pytest.raises(SystemExit) as ended:
        plot_mixture.main()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and len(line.splitlines()) == 1, line
    return line


@pytest.mark.parametrize("text", ["", "words", "[1]", "null", "3", '{"mixture": {"a": 1}}', '{"mixture": [1]}'])
def test_results_that_are_none(tmp_path, monkeypatch, capsys, text):
    result_of(tmp_path / "whole", {"a": 0.5, "b": 0.5})
    write_log(tmp_path / "out")
    (tmp_path / "out" / "mixture.json").write_text(text)
    for argv in (["out"], ["whole", "out"], ["out", "--export", "hf"], ["whole", "out", "--export", "mosaic"]):
        line = refused_here(monkeypatch, capsys, tmp_path, *argv)
        assert "out/mixture.json: not what this fastmix.py writes" in line


@pytest.mark.parametrize("key", ["mixture", "mixtures", "sources", "targets", "before", "tokens"])
def test_results_that_lack_something(tmp_path, monkeypatch, capsys, key):
    result = result_of(tmp_path / "out", {"a": 0.5, "b": 0.5})
    result.pop(key)
    (tmp_path / "out" / "mixture.json").write_text(json.dumps(result))
    assert f"out/mixture.json: not what this fastmix.py writes (KeyError: '{key}')" in refused_here(
        monkeypatch, capsys, tmp_path, "out")


def test_a_picture_that_cannot_be_written(tmp_path):
    write_log(tmp_path / "out")
    (tmp_path / "out" / "mixture.png").mkdir()
    assert "cannot write out/mixture.png" in refused("plot_mixture.py", "out", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.jsonl", "mixture.png"]
