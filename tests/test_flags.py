"""Flags of fastmix.py: lists of names, mixtures, bounds, numbers; what a wrong one is answered."""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastmix
from conftest import TINY, chain_set, log_rows, markov, refused, result_json, run, write_set

SHORT = [*TINY, "--max_steps", 2]
SEARCH = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", 60]


def one_line(capsys, call, *args):
    """Calls a function that ends the program; returns the line that it prints."""
    with pytest.raises(SystemExit) as ended:
        call(*args)
    line = capsys.readouterr().err
    assert ended.value.code == 2, line
    assert line.startswith("error: "), line
    assert len(line.splitlines()) == 1, line
    return line


def parse(*flags):
    return fastmix.parse_args([str(flag) for flag in flags])


# ---- lists of names ------------------------------------------------------------------------------

def test_pairs():
    assert fastmix.parse_pairs("--x", "a") == {"a": ""}
    assert fastmix.parse_pairs("--x", "b, a = 1 ,c=0.1:=") == {"b": "", "a": "1", "c": "0.1:="}
    assert list(fastmix.parse_pairs("--x", "b,a")) == ["b", "a"]


@pytest.mark.parametrize("text, part", [
    ("", "empty name"), (" ", "empty name"), ("a,", "empty name"), (",a", "empty name"),
    ("a,,b", "empty name"), ("a, ", "empty name"), ("=2", "empty name"),
    ("a,b,a", "names a twice"), ("a=1,a=2", "names a twice"), ("a, a", "names a twice")])
def test_pairs_that_are_none(capsys, text, part):
    line = one_line(capsys, fastmix.parse_pairs, "--some_flag", text)
    assert f"--some_flag '{text}'" in line
    assert part in line


def test_weights():
    weights = fastmix.parse_weights("--target", "a, b=3 ,c=0.5,d=0")
    assert weights == {"a": 1.0, "b": 3.0, "c": 0.5, "d": 0.0}


@pytest.mark.parametrize("text, part", [
    ("a=x", "the weight of a, 'x', is no number"), ("a=1:2", "the weight of a, '1:2'"),
    ("a=1,b=-1", "the weight of b, '-1'"), ("a=nan", "the weight of a, 'nan'"),
    ("a=inf,b", "the weight of a, 'inf'"), ("a=0", "sum to 0"), ("a=0,b=0", "sum to 0"),
    ("a=1e308,b=1e308", "sum to inf")])
def test_weights_that_are_none(capsys, text, part):
    line = one_line(capsys, fastmix.parse_weights, "--target", text)
    assert f"--target '{text}'" in line
    assert part in line


def test_mixtures(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"mixture": {"a": 3, "b": 1}, "mixtures": {}}')
    small = tmp_path / "small.json"
    small.write_text('{"mixture": {"b": 1e-08, "a": 0.99999999}}')
    for text, expected in (("uniform", [0.5, 0.5]), ("proportional", [0.2, 0.8]),
                           ("a=0.8,b=0.2", [0.8, 0.2]), ("a=3, b=1", [0.75, 0.25]),
                           ("b=7", [0, 1]), ("b", [0, 1]), (str(path), [0.75, 0.25]),
                           (str(small), [0.99999999, 1e-8])):
        alpha = fastmix.read_mixture(text, ["a", "b"], torch.tensor([10, 40]))
        assert alpha.dtype == torch.float64
        np.testing.assert_allclose(alpha, expected, rtol=1e-12)


@pytest.mark.parametrize("text", [
    "", "words", "[1, 2]", "null", '{"mixture": null}', '{"mixture": [0.5, 0.5]}',
    '{"mixture": "uniform"}', '{"other": {"a": 1}}', '{"mixture": {"a": "much", "b": 1}}',
    '{"mixture": {"a": null}}', '{"mixture": {"a": NaN, "b": 1}}', '{"mixture": {}}',
    '{"mixture": {"a": 0}}', '{"mixture": {"a": -1, "b": 2}}', '{"mixture": {"a": Infinity}}'])
def test_files_that_are_no_mixture(tmp_path, capsys, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    tokens = torch.tensor([10, 40])
    line = one_line(capsys, fastmix.read_mixture, str(path), ["a", "b"], tokens)
    assert "--mixture" in line


def test_a_mixture_of_other_sources(tmp_path, capsys):
    (tmp_path / "m.json").write_text('{"mixture": {"a": 0.5, "x": 0.5}}')
    tokens = torch.tensor([10, 40])
    for text in ("x=1", str(tmp_path / "m.json"), "x,a"):
        line = one_line(capsys, fastmix.read_mixture, text, ["a", "b"], tokens)
        assert f"--mixture {text} names x, but --sources are a, b" in line


# ---- bounds --------------------------------------------------------------------------------------

def bounds_of(sizes, *flags):
    """search_bounds() for sources s0, s1, ... of these many tokens."""
    names = [f"s{k}" for k in range(len(sizes))]
    return fastmix.search_bounds(parse(*flags), names, torch.tensor(sizes, dtype=torch.int64))


def test_bounds_of_sources_by_name():
    lower, upper = bounds_of([5, 5, 5], "--bounds", " s1 = 0.2:0.5, s0=:0.9")
    assert lower.tolist() == [0, 0.2, 0]
    assert upper.tolist() == [0.9, 0.5, 1]
    lower, upper = bounds_of([5, 5])
    assert lower.tolist() == [0, 0]
    assert upper.tolist() == [1, 1]
    lower, upper = bounds_of([5, 5], "--bounds", "s0=0.3:0.3,s1=0.7:")  # these leave one mixture
    assert lower.tolist() == [0.3, 0.7]


def test_caps_are_epochs_of_the_real_run():
    """No source gets more than E N_k / R, whatever --bounds says; without --max_epochs it may."""
    sizes = [2 * 10**9, 10 * 10**9, 80 * 10**9]
    lower, upper = bounds_of(sizes, "--train_tokens", 25e9, "--max_epochs", 4)
    np.testing.assert_allclose(lower, [0, 0, 0])
    np.testing.assert_allclose(upper, [4 * 2 / 25, 1, 1])
    lower, upper = bounds_of(sizes, "--train_tokens", 25e9, "--max_epochs", 1,
                             "--bounds", "s1=0.1:0.2,s2=:0.9,s0=0.01:")
    np.testing.assert_allclose(lower, [0.01, 0.1, 0])
    np.testing.assert_allclose(upper, [0.08, 0.2, 0.9])
    lower, upper = bounds_of(sizes, "--train_tokens", 25e12)
    np.testing.assert_allclose(upper, [1, 1, 1])


@pytest.mark.parametrize("text, part", [
    ("x=0:1", "'x=0:1' is not NAME=LEAST:LARGEST with one of s0, s1"),
    ("s0=x:", "'s0=x:' is not NAME=LEAST:LARGEST"), ("s0=:y", "'s0=:y' is not"),
    ("s0=0.1:,s0=:0.9", "names s0 twice"), ("s0=0:1,", "empty name"),
    ("s0", "'s0=' is no range"), ("s0=0.3", "'s0=0.3' is no range"),
    ("s0=:nan", "is no range"), ("s0=nan:", "is no range"), ("s0=0.5:0.4", "is no range"),
    ("s0=-1:", "is no range"), ("s0=:2", "is no range"),
    ("s0=:0", "to leave a source out, do not name it"),
    ("s0=0.6:,s1=0.6:", "the least shares sum to 1.2"),
    ("s0=:0.3,s1=:0.3", "the largest to 0.6")])
def test_bounds_that_cannot_be(capsys, text, part):
    line = one_line(capsys, bounds_of, [5, 5], "--bounds", text)
    assert "--bounds" in line
    assert part in line


@pytest.mark.parametrize("flags", [
    ["--train_tokens", 13e9, "--max_epochs", 4],  # of 3e9 tokens
    ["--train_tokens", 3.1e9, "--max_epochs", 1],
    ["--train_tokens", 11e9, "--max_epochs", 4, "--bounds", "s1=:0.5"],  # 4e9 of s0, half of 11e9
    ["--train_tokens", 10e9, "--max_epochs", 4, "--bounds", "s0=0.5:"]])  # of which 0.4 can be had
def test_a_real_run_longer_than_its_text(capsys, flags):
    line = one_line(capsys, bounds_of, [10**9, 2 * 10**9], *flags)
    assert "no mixture is within these bounds" in line
    for flag, value in zip(flags[::2], flags[1::2]):
        assert f"{flag} {value}" in line


def test_bounds_hold_from_the_first_step_on(synthetic):
    """Without them b gets most of the mixture and noise nothing; with them both lie at a bound."""
    search = [*SEARCH, "--learning_rate_mixture", 0.5]
    run("fastmix.py", *search, "--out_dir", "free", cwd=synthetic)
    assert log_rows(synthetic / "free")[-1]["alpha"]["b"] > 0.5
    assert log_rows(synthetic / "free")[-1]["alpha"]["noise"] < 0.3
    run("fastmix.py", *search, "--bounds", "b=:0.4,noise=0.3:", "--out_dir", "bounded",
        cwd=synthetic)
    rows = log_rows(synthetic / "bounded")
    corner = {"a": 0.3, "b": 0.4, "noise": 0.3}
    in_corner = 0
    for row in rows:
        assert row["alpha"]["b"] < 0.4 + 1e-9, row
        assert row["alpha"]["noise"] > 0.3 - 1e-9, row
        in_corner += row["alpha"] == pytest.approx(corner, abs=1e-6)
    assert in_corner > len(rows) / 2  # exactly; a noisy step may lift noise again
    assert rows[-1]["alpha"] == pytest.approx(corner, abs=0.01)
    result = result_json(synthetic / "bounded")
    assert result["mixture"]["b"] == pytest.approx(0.4, abs=0.02)
    sources = result["sources"]
    assert [sources[name]["bound"] for name in ("a", "b", "noise")] == ["", "cap", "floor"]
    assert [sources[name]["lower"] for name in ("a", "b", "noise")] == [0, 0, 0.3]
    assert [sources[name]["upper"] for name in ("a", "b", "noise")] == [1, 0.4, 1]


@pytest.mark.parametrize("share, lower, upper, expected", [
    (0.4, 0.0, 0.4, "cap"), (0.3985, 0.0, 0.4, "cap"), (0.395, 0.0, 0.4, ""),
    (0.3, 0.3, 1.0, "floor"), (0.3014, 0.3, 1.0, "floor"), (0.31, 0.3, 1.0, ""),
    (0.0, 0.0, 1.0, ""), (1.0, 0.0, 1.0, ""), (1e-5, 0.0, 1.0, ""),
    (5e-5, 1e-5, 1.0, "floor"), (2e-4, 1e-5, 1.0, ""), (0.3, 0.3, 0.3, "cap")])
def test_which_bound_is_reached(share, lower, upper, expected):
    """Within half a percent of it, or 0.0001; 0 and 1 are no bounds."""
    assert fastmix.bound_reached(share, lower, upper) == expected


# ---- the run that the mixture is for -------------------------------------------------------------

def test_a_search_for_a_longer_run(synthetic):
    """b, the best source, may have 0.4 of it, and so gets no more; a higher cap changes nothing."""
    tokens = 60 * 8 * 16
    real = ["--train_tokens", 10 * tokens, "--learning_rate_mixture", 0.1]
    run("fastmix.py", *SEARCH, *real, "--max_epochs", 0.4 * 10 * tokens / 10_000,
        "--out_dir", "capped", cwd=synthetic)
    result = result_json(synthetic / "capped")
    assert result["mixture"]["b"] == pytest.approx(0.4, abs=0.01)
    assert result["sources"]["b"]["upper"] == pytest.approx(0.4)
    for row in log_rows(synthetic / "capped"):
        assert row["alpha"]["b"] < 0.4 + 1e-9

    run("fastmix.py", *SEARCH, *real, "--out_dir", "shown", cwd=synthetic)
    run("fastmix.py", *SEARCH, *real, "--max_epochs", 1e9, "--out_dir", "loose", cwd=synthetic)
    shown = result_json(synthetic / "shown")
    assert shown["mixture"]["b"] > 0.5
    assert result_json(synthetic / "loose")["mixture"] == shown["mixture"]


def test_a_shorter_run_sees_as_much_less_text(tmp_path):
    """Of 1,000 tokens a tenth is shown: a run can learn those 100 by heart, and not the rest."""
    ids = np.random.default_rng(0).integers(0, 63, 1000).astype(np.uint8)
    write_set(tmp_path / "data" / "one", {"train": ids, "val": ids, "test": ids})
    flags = [*TINY, "--sources", "one", "--mixture", "uniform", "--max_steps", 200,
             "--learning_rate", 1e-2, "--log_every", 100]
    tokens = 200 * 8 * 16
    last = {}
    for out, real in (("all", tokens), ("tenth", 10 * tokens)):
        run("fastmix.py", *flags, "--train_tokens", real, "--out_dir", out, cwd=tmp_path)
        last[out] = log_rows(tmp_path / out)[-1]
    assert last["tenth"]["train_loss"] < last["all"]["train_loss"] - 0.5
    assert last["tenth"]["target_val_loss"] > last["all"]["target_val_loss"] + 0.5
    run("fastmix.py", *flags, "--out_dir", "plain", cwd=tmp_path)
    assert log_rows(tmp_path / "plain")[-1]["train_loss"] == last["all"]["train_loss"]


def test_a_text_that_is_too_short_is_refused_before_anything_is_written(synthetic):
    line = refused("fastmix.py", *SEARCH, "--train_tokens", 1e9, "--max_epochs", 4,
                   "--out_dir", "no", cwd=synthetic)
    assert "no mixture is within these bounds" in line
    assert not (synthetic / "no").exists()
    line = refused("fastmix.py", *SEARCH, "--max_epochs", 4, "--out_dir", "no", cwd=synthetic)
    assert "--train_tokens" in line
    for flags in (["--bounds", "a=0.1:"], ["--max_epochs", 4, "--train_tokens", 1e5]):
        line = refused("fastmix.py", *SEARCH, *flags, "--mixture", "uniform", "--out_dir", "no",
                       cwd=synthetic)
        assert "--bounds and --max_epochs are for a search" in line
    assert not (synthetic / "no").exists()


def test_resume_keeps_the_plan(synthetic):
    flags = [*SEARCH, "--train_tokens", 50_000, "--max_epochs", 2, "--bounds", "a=0.2:",
             "--out_dir", "plan"]
    run("fastmix.py", *flags, cwd=synthetic)
    run("fastmix.py", *flags, "--resume", cwd=synthetic)
    for flag, stored, other in (("--bounds", "a=0.2:", "a=0.1:"), ("--max_epochs", "2.0", "3.0"),
                                ("--train_tokens", "50000.0", "60000.0")):
        line = refused("fastmix.py", *flags, "--resume", flag, other, cwd=synthetic)
        assert f"was made with {flag} {stored}, not {other}" in line


def test_weighted_targets(tmp_path):
    """The loss that is reported is the weighted one, and the mixture goes where the weight is."""
    for name, seed in (("b", 2), ("c", 3)):
        chain_set(tmp_path / "data" / name, seed)
        chain_set(tmp_path / "data" / f"like_{name}", seed, draw_seed=7)
    shares = []
    for out, target, weights in (("9-1", "like_b=9,like_c=1", [0.9, 0.1]),
                                 ("1-9", "like_b,like_c=9", [0.1, 0.9])):
        run("fastmix.py", *TINY, "--sources", "b,c", "--target", target, "--max_steps", 150,
            "--learning_rate", 1e-2, "--learning_rate_mixture", 0.1, "--out_dir", out,
            cwd=tmp_path)
        result = result_json(tmp_path / out)
        rows = log_rows(tmp_path / out)
        for row in rows:
            losses = list(row["target_losses"].values())
            assert row["target_val_loss"] == pytest.approx(np.dot(weights, losses))
        targets = list(result["targets"].values())
        assert [t["weight"] for t in targets] == pytest.approx(weights)
        assert [t["val_loss"] for t in targets] == list(rows[-1]["target_losses"].values())
        assert result["before"] == rows[0]["target_losses"]
        for key in ("test_loss", "test_bits_per_byte"):
            assert result[key] == pytest.approx(np.dot(weights, [t[key] for t in targets]))
        shares.append(result["mixture"]["b"])
    assert shares[0] > 0.7, shares
    assert shares[1] < 0.3, shares


# ---- numbers -------------------------------------------------------------------------------------

COUNTS = {"outer_every", "target_batch_size", "n_layer", "n_head", "n_embd", "block_size",
          "batch_size", "grad_accum", "max_steps", "log_every", "eval_tokens"}
MAY_BE_ZERO = {"warmup_steps", "seed"}
FLOATS = {"uniform_share", "learning_rate_mixture", "learning_rate", "weight_decay", "grad_clip"}


def test_every_number_has_a_range(capsys):
    """Of all flags that take a number, those out of range are refused in one line."""
    defaults = vars(parse())
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert numbers == COUNTS | MAY_BE_ZERO | FLOATS
    for name in [*numbers, "train_tokens"]:
        least = 1 if name in COUNTS else 0
        good = [least, 1]
        bad = [-5, -10**9, least - 1, 2**63, 10**30]
        if name in FLOATS or name == "train_tokens":
            good += [0.5]
            bad += [-1e-6, "nan", "inf", "-inf"]
        else:
            good += [10**6]
        if name == "uniform_share":
            bad += [1.000001, 10]
        if name == "learning_rate_mixture":
            good += [1e6]
            bad += [1.1e6, 1e18]
        if name == "train_tokens":
            good = [0.5, 1]
            bad += [0]
        for value in good:
            found = getattr(parse(f"--{name}", value), name)
            assert found == value
            assert type(found) is (int if name in COUNTS | MAY_BE_ZERO else float)
        for value in bad:
            line = one_line(capsys, parse, f"--{name}={value}")
            assert line.startswith(f"error: --{name} "), line
            assert "is out of range" in line, line
    for value in (-1, "nan", "inf"):
        line = one_line(capsys, parse, "--train_tokens", 100, f"--max_epochs={value}")
        assert "--max_epochs" in line
        assert "is out of range" in line


def test_defaults_are_replaced_by_a_checkpoints_flags():
    args = fastmix.parse_args(["--n_layer", "5"], {"n_layer": 3, "n_head": 8})
    assert args.n_layer == 5
    assert args.n_head == 8
    assert args.n_embd == parse().n_embd


def test_max_epochs_has_no_default():
    assert parse().max_epochs is None
    assert parse("--train_tokens", 1e9).max_epochs is None


def test_one_sequence_per_step_is_enough_for_a_fixed_mixture(synthetic):
    """A search is refused: it has nothing to compare. Two micro-batches of one will do."""
    flags = [*SHORT, "--sources", "a,b", "--batch_size", 1, "--target_batch_size", 1]
    line = refused("fastmix.py", *flags, "--out_dir", "single", cwd=synthetic)
    assert "--batch_size times --grad_accum must be at least 2" in line
    run("fastmix.py", *flags, "--mixture", "uniform", "--out_dir", "single", cwd=synthetic)
    run("fastmix.py", *flags, "--grad_accum", 2, "--out_dir", "pair", cwd=synthetic)
    # to repeat a flag does no harm
    run("fastmix.py", "--resume", "--batch_size", 1, "--out_dir", "single", cwd=synthetic)


def test_fewer_sequences_than_sources_are_warned_of(synthetic):
    flags = [*SHORT, "--sources", "a,b,c", "--batch_size", 2]
    stdout = run("fastmix.py", *flags, "--out_dir", "few", cwd=synthetic)
    assert "warning: with 2 sequences per step for 3 sources" in stdout
    stdout = run("fastmix.py", *flags, "--grad_accum", 2, "--out_dir", "enough", cwd=synthetic)
    assert "warning" not in stdout


# ---- one clear line ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    """The synthetic sets, some that do not go with them, and a run in done/."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(synthetic / "data", folder / "data")
    ids = markov(1, 3000)
    good = {"train": ids[:1000], "val": ids[1000:2000], "test": ids[2000:]}
    write_set(folder / "data" / "short", good | {"val": ids[:16]})  # windows take 17
    write_set(folder / "data" / "gpt", good, tokenizer="gpt2")
    outside = np.full(2000, 63)
    outside[0] = 64
    write_set(folder / "data" / "outside", good | {"train": outside})
    run("fastmix.py", *SHORT, "--sources", "a,b", "--out_dir", "done", cwd=folder)
    (folder / "other.json").write_text(json.dumps({"mixture": {"x": 1.0}}))
    (folder / "wrong.json").write_text("[1, 2]")
    (folder / "text.pt").write_text("not a checkpoint\n")
    (folder / "nowhere").symlink_to(folder / "not there")
    return folder


AB = ["--sources", "a,b"]
CASES = {
    "unknown source": (["--sources", "a,nowhere"], "no set 'nowhere'", "there: a, b, b2",
                       "prepare_data.py nowhere=PATH"),
    "unknown target": ([*AB, "--target", "nowhere"], "no set 'nowhere'"),
    "no data at all": (["--data_dir", "nothing", "--sources", "a"], "there: none"),
    "a set of the sample": (["--sources", "a,numpy_tasks"], "with: python prepare_data.py"),
    "spaces in names": (["--data_dir", "my data", "--sources", "my set"],
                        "prepare_data.py 'my set'=PATH --data_dir 'my data'"),
    "name given twice": (["--sources", "a,b,a"], "--sources 'a,b,a' names a twice"),
    "target given twice": ([*AB, "--target", "a,a=2"], "--target 'a,a=2' names a twice"),
    "no source": (["--sources", ""], "--sources", "empty name"),
    "no target": ([*AB, "--target", ""], "--target", "empty name"),
    "weights of sources": (["--sources", "a=2,b=1"], "--sources"),
    "targets without weight": ([*AB, "--target", "a=0"], "--target 'a=0'", "sum to 0"),
    "a target without weight": ([*AB, "--target", "a=0,b"], "--target 'a=0,b'", "weighs nothing"),
    "targets of endless weight": ([*AB, "--target", "a=1e308,b=1e308"], "--target", "sum to inf"),
    "too short": (["--sources", "a,short"], "short/val.bin: 16 tokens", "needs 17"),
    "two tokenizers": (["--sources", "a,gpt"], "'gpt' was made with the tokenizer gpt2"),
    "target's tokenizer": ([*AB, "--target", "gpt"], "'gpt' was made with the tokenizer gpt2"),
    "id outside": (["--sources", "outside", "--max_steps", "200", "--out_dir", "found-late"],
                   "token id 64, outside the vocabulary of 64"),
    "mixture of others": ([*AB, "--mixture", "x=1"], "names x, but --sources are a, b"),
    "file of others": ([*AB, "--mixture", "other.json"], "names x, but --sources are a, b"),
    "negative weight": ([*AB, "--mixture", "a=-1,b=2"], "the weight of a, '-1'"),
    "all zero": ([*AB, "--mixture", "a=0,b=0"], "sum to 0"),
    "weight twice": ([*AB, "--mixture", "a=1,a=2"], "names a twice"),
    "not a mixture": ([*AB, "--mixture", "best"], "names best, but --sources are a, b"),
    "no such file": ([*AB, "--mixture", "gone.json"], "gone.json"),
    "not fastmix's": ([*AB, "--mixture", "wrong.json"], "not what a search writes"),
    "another run there": ([*AB, "--out_dir", "done"], "done/ holds another run",
                          "(log.jsonl, ckpt.pt, mixture.json)", "--resume", "delete those files"),
    "a file": ([*AB, "--out_dir", "wrong.json"], "wrong.json"),
    "a link to nothing": ([*AB, "--out_dir", "nowhere"], "nowhere"),
    "nothing to resume": ([*AB, "--resume"], "no checkpoint there; leave --resume out"),
    "data to resume": (["--resume", "--out_dir", "data"], "data/ckpt.pt: no checkpoint there"),
    "other sources": (["--resume", "--out_dir", "done", "--sources", "a,c"],
                      "--sources a,b, not a,c"),
    "other model": (["--resume", "--out_dir", "done", "--n_layer", "2"], "--n_layer 1, not 2"),
    "no checkpoint": ([*AB, "--init_from", "gone.pt"], "gone.pt: no checkpoint there"),
    "a link to no checkpoint": ([*AB, "--init_from", "nowhere"], "nowhere: no checkpoint there"),
    "text as checkpoint": ([*AB, "--init_from", "text.pt"], "text.pt cannot be read"),
    "another model": ([*AB, "--init_from", "done/ckpt.pt", "--n_embd", "64"],
                      "done/ckpt.pt has --n_embd 32, not 64; leave the flag out"),
    "heads": ([*AB, "--n_head", "3"], "--n_embd 32 must be an even multiple of --n_head 3"),
    "a range of no number": ([*AB, "--bounds", "a=0.1:much"], "'a=0.1:much' is not NAME="),
    "no number": ([*AB, "--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
    "no whole number": ([*AB, "--max_steps", "2.5"], "--max_steps: invalid int value: '2.5'"),
    "no such device": ([*AB, "--device", "tpu"], "invalid choice"),
    "no such flag": ([*AB, "--alignment", "head"], "unrecognized arguments: --alignment head"),
    "out of range": ([*AB, "--warmup_steps", "-5"], "error: --warmup_steps -5 is out of range"),
    "NaN": ([*AB, "--learning_rate", "nan"], "error: --learning_rate nan is out of range"),
}


def test_one_clear_line(folder):
    """Each wrong command gets one, exits with 2, and costs nothing that was there."""
    def once(case):
        flags, *parts = CASES[case]
        try:
            return case, refused("fastmix.py", *SHORT, *flags, cwd=folder), parts
        except AssertionError as error:
            raise AssertionError(case) from error

    before = {path: path.read_bytes() for path in (folder / "done").iterdir()}
    with ThreadPoolExecutor(2) as pool:
        for case, line, parts in pool.map(once, CASES):
            for part in parts:
                assert part in line, f"{case}: {line}"
    assert {path: path.read_bytes() for path in (folder / "done").iterdir()} == before
    assert not (folder / "out").exists()
    assert not (folder / "not there").exists()


def test_another_run_is_deleted_as_the_message_says(folder):
    flags = [*SHORT, *AB, "--out_dir", "again"]
    run("fastmix.py", *flags, cwd=folder)
    line = refused("fastmix.py", *flags, "--seed", 2, cwd=folder)
    for name in line.split("(")[1].split(")")[0].split(", "):
        (folder / "again" / name).unlink()
    run("fastmix.py", *flags, "--seed", 2, cwd=folder)
    assert result_json(folder / "again")["seed"] == 2


def test_resuming_from_another_folder(folder, tmp_path):
    """data_dir is relative to where the run was started; the message names the flag."""
    line = refused("fastmix.py", "--resume", "--out_dir", folder / "done", cwd=tmp_path)
    assert "no set 'a' in data/ (there: none); name another folder with --data_dir" in line
    shutil.copytree(folder / "done", tmp_path / "moved")
    run("fastmix.py", "--resume", "--out_dir", "moved", "--data_dir", folder / "data", cwd=tmp_path)


def test_parts_of_a_run_are_no_free_folder(folder):
    """One that was killed while it wrote its first checkpoint, or lost one of its files."""
    for name in ("log.jsonl", "ckpt.pt", "mixture.json"):
        out = folder / f"only-{name}"
        out.mkdir()
        (out / name).write_text("")
        line = refused("fastmix.py", *SHORT, *AB, "--out_dir", out.name, cwd=folder)
        assert f"only-{name}/ holds another run ({name})" in line
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == ""


@pytest.mark.parametrize("flag", ["--out_dir", "--data_dir"])
def test_an_empty_folder_does_not_litter(folder, flag):
    """It is refused: the working folder is hardly meant."""
    assert f"{flag} is empty" in refused("fastmix.py", *SHORT, *AB, flag, "", cwd=folder)
