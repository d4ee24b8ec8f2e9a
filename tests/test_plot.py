"""plot_mixture.py: pictures of whole, running, fixed and many-source runs; its bad inputs."""
import json

import matplotlib.image
import numpy as np
import pytest

from conftest import refused, run


def write_log(folder, K=3, steps=30, searched=True, tail=""):
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as f:
        for step in range(steps):
            alpha = rng.dirichlet(np.ones(K))
            names = [f"source{k}" for k in range(K)]
            f.write(json.dumps({
                "step": step, "alpha": dict(zip(names, alpha)),
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


def test_bad_input(runs):
    (runs / "empty").mkdir()
    (runs / "empty" / "log.jsonl").write_text("")
    (runs / "broken").mkdir()
    (runs / "broken" / "log.jsonl").write_text("{}\n")
    assert "No such file" in refused("plot_mixture.py", "gone", cwd=runs)
    assert "still empty" in refused("plot_mixture.py", "empty", cwd=runs)
    assert "not a log" in refused("plot_mixture.py", "broken", cwd=runs)
