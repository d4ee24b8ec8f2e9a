"""plot_mixture.py --export: do trainers that follow its lines draw the mixture's shares of tokens?"""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import refused, run
from test_plot import result_of

TRAINERS = ["hf", "megatron", "mosaic", "llamafactory"]
MIXTURE = {"tweets": 0.5, "news": 0.3, "books": 0.19998, "noise": 0.00002}
LENGTHS = {"tweets": 20, "news": 500, "books": 3000, "noise": 100}


@pytest.fixture
def out(tmp_path):
    lengths = torch.tensor(list(LENGTHS.values()), dtype=torch.float64)
    result_of(tmp_path / "out", MIXTURE, sources={"tokens_per_document": lengths})
    return tmp_path


def exported(out, trainer, *runs):
    """The lines for a trainer, but the first, which is a comment with the unit; nothing else is printed or written."""
    before = {f for f in out.glob("**/*")}
    comment, *lines = run("plot_mixture.py", *(runs or ["out"]), "--export", trainer, cwd=out).splitlines()
    unit = "examples" if trainer in ("hf", "llamafactory") else "fixed-length samples"
    assert comment.startswith(f"# shares of {unit} = shares of tokens") and before == {f for f in out.glob("**/*")}
    assert not any("#" in line.split("  # ")[0] for line in lines)
    return comment, lines


def shares_of(out, trainer, *runs):
    """{source: number} as the trainer would read them."""
    text = "\n".join(exported(out, trainer, *runs)[1])
    if trainer == "megatron":
        flag, *words = text.split()
        assert flag == "--data-path" and all(name.endswith("_text_document") for name in words[1::2])
        return {name.removesuffix("_text_document"): float(w) for w, name in zip(words[::2], words[1::2])}
    if trainer == "mosaic":
        assert text.startswith("streams:\n")
        entries = re.findall(r'^  "(\w+)":\n    local: "(\w+)"\n    proportion: (\S+)$', text, re.MULTILINE)
        assert all(name == local for name, local, _ in entries) and len(entries) * 3 + 1 == len(text.splitlines())
        return {name: float(p) for name, _, p in entries}
    if trainer == "llamafactory":
        yaml = dict(line.split(": ") for line in text.splitlines())
        assert len(yaml) == 3 and yaml["mix_strategy"] == "interleave_over"
        names, p = (json.loads(yaml[key]).split(",") for key in ("dataset", "interleave_probs"))
        return dict(zip(names, map(float, p), strict=True))
    return dict(zip(*called(text)[:2], strict=True))


def called(text):
    """(sources, probabilities, other arguments) of the call of interleave_datasets in a piece of Python."""
    calls, yours, before = [], {n: n for n in LENGTHS}, sys.modules.get("datasets")
    stand_in = SimpleNamespace(interleave_datasets=lambda sets, probabilities, **kw: calls.append(
        (sets, probabilities, kw)))
    sys.modules["datasets"] = stand_in
    try:
        exec(text, {"yours": yours})
    finally:
        sys.modules.pop("datasets") if before is None else sys.modules.update(datasets=before)
    call, = calls
    return call


@pytest.mark.parametrize("trainer", TRAINERS)
def test_tokens_drawn(out, trainer):
    """Draws by the numbers, each an example of its source's length or a sample of 1024: the mixture, in tokens."""
    p = shares_of(out, trainer)
    lengths = LENGTHS if trainer in ("hf", "llamafactory") else dict.fromkeys(LENGTHS, 1024)
    assert list(p) == ["tweets", "news", "books"] and abs(sum(p.values()) - 1) < 1e-8
    drawn = np.bincount(np.random.default_rng(0).choice(len(p), 2_000_000, p=list(p.values())), minlength=len(p))
    tokens = {n: count * lengths[n] for n, count in zip(p, drawn)}
    for n, count in tokens.items():
        assert abs(count / sum(tokens.values()) - MIXTURE[n]) < 0.01, (n, tokens)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_sources_without_a_share_are_left_out(out, trainer):
    """Megatron-LM and interleave_datasets refuse 0, and what is drawn one time in 50,000 is not read to its end."""
    comment, _ = exported(out, trainer)
    assert comment.endswith("; left out, under 0.0001: noise")


def test_arguments_of_interleave_datasets(out):
    text = "\n".join(exported(out, "hf")[1])
    assert called(text)[2] == {"seed": 1, "stopping_strategy": "all_exhausted"}


@pytest.mark.parametrize("trainer", ["megatron", "hf"])
def test_mean_of_several_runs(out, trainer):
    """Whether or not they differ in the seed alone, if they have the same sources."""
    lengths = {"tokens_per_document": torch.tensor([10.0, 40.0])}
    for name, a in (("one", 0.6), ("two", 0.2)):
        result_of(out / name, {"tweets": a, "news": 1 - a}, sources=lengths, max_steps=int(10 * a))
    expected = {"tweets": 0.4, "news": 0.6} if trainer == "megatron" else {"tweets": 8 / 11, "news": 3 / 11}
    assert shares_of(out, trainer, "one", "two") == pytest.approx(expected, abs=1e-8)
    line = refused("plot_mixture.py", "one", "out", "--export", trainer, cwd=out)
    assert "runs of the same sources, not tweets, news and tweets, news, books, noise" in line


def test_one_source(out):
    result_of(out / "alone", {"news": 1.0}, sources={"tokens_per_document": torch.tensor([40.0])})
    for trainer in TRAINERS:
        assert shares_of(out, trainer, "alone") == {"news": 1.0}


def test_hundreds_of_sources_sum_to_one(out):
    """numpy, which draws for interleave_datasets, wants it to within 1.5e-8."""
    names, rng = [f"s{k}" for k in range(300)], np.random.default_rng(0)
    result_of(out / "many", dict(zip(names, rng.dirichlet(np.ones(300)))),
              sources={"tokens_per_document": torch.from_numpy(rng.uniform(5, 1e5, 300))})
    for trainer in ("llamafactory", "megatron"):
        p = [float(x) for x in re.findall(r"\d\.\d{8}", "\n".join(exported(out, trainer, "many")[1]))]
        assert len(p) > 250 and abs(sum(p) - 1) < 1e-9 and min(p) > 0
        rng.choice(len(p), p=p)


def test_what_cannot_be_exported(out):
    """A run that has not ended; one of an older fastmix.py, whose mixture in tokens still can; an unknown trainer."""
    line = refused("plot_mixture.py", "gone", "--export", "hf", cwd=out)
    assert "gone/mixture.json: No such file or directory; finish the run" in line
    result_of(out / "older", {"a": 0.5, "b": 0.5})
    for trainer in ("hf", "llamafactory"):
        line = refused("plot_mixture.py", "older", "--export", trainer, cwd=out)
        assert "older/mixture.json" in line and "tokens_per_document" in line and "search again" in line
    assert shares_of(out, "megatron", "older") == {"a": 0.5, "b": 0.5}
    line = run("plot_mixture.py", "out", "--export", "torchtitan", cwd=out, status=2)
    assert "invalid choice: 'torchtitan'" in line


def test_interleave_datasets_itself(out):
    """Hugging Face's package, where it is installed: examples of very different lengths, drawn until all were read."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    yours = {}
    for n, documents in (("tweets", 1000), ("news", 1000), ("books", 2000)):
        tokens = rng.integers(1, 2 * LENGTHS[n], documents)
        yours[n] = datasets.Dataset.from_dict({"source": [n] * documents, "tokens": tokens})
    result = json.loads((out / "out" / "mixture.json").read_text())
    for n, d in yours.items():
        result["sources"][n]["tokens_per_document"] = float(np.mean(d["tokens"]))
    (out / "out" / "mixture.json").write_text(json.dumps(result))
    scope = {"yours": yours}
    exec("\n".join(exported(out, "hf")[1]), scope)
    mixed = scope["mixed"].with_format("numpy")[:]
    tokens = {n: mixed["tokens"][mixed["source"] == n].sum() for n in yours}
    for n, count in tokens.items():
        assert abs(count / sum(tokens.values()) - MIXTURE[n]) < 0.01, (n, tokens)
