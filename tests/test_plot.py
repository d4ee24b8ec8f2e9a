"""plot_mixture.py: logs and mixtures; pictures of whole, running, fixed and many-source runs; its bad inputs."""
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch

from conftest import TINY, refused, run
from plot_mixture import append_row, mixture_at, open_log, progress, read_mixture


def write_log(folder, K=3, steps=30, searched=True, tail=""):
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as f:
        for step in range(steps):
            alpha = rng.dirichlet(np.ones(K))
            names = [f"source{k}" for k in range(K)]
            f.write(json.dumps({
                "step": step, "max_steps": 30, "alpha": dict(zip(names, alpha)),
                "alignment": {n: float(rng.normal()) if searched and step else None for n in names},
                "source_loss": {n: 5.0 - step / 30 if step else None for n in names}, "train_loss": 1.0,
                "target_val_loss": 5.0 - step / 30 if step % 10 == 0 else None, "tokens": step, "seconds": 0.1}) + "\n")
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
    (runs / "empty").mkdir()
    (runs / "empty" / "log.jsonl").write_text("")
    (runs / "broken").mkdir()
    (runs / "broken" / "log.jsonl").write_text("{}\n")
    assert "No such file" in refused("plot_mixture.py", "gone", cwd=runs)
    assert "still empty" in refused("plot_mixture.py", "empty", cwd=runs)
    assert "not a log" in refused("plot_mixture.py", "broken", cwd=runs)
