"""fastmix.py from the command line: what a run writes, how it is resumed, what may disturb it."""
import json
import resource
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import (TINY, assert_same, chain_set, example_set, log_rows, markov, refused,
                      result_json, run, split_set, start, wait_for_step, write_set)
from model import GPT, GPTConfig
from prepare_data import IGNORE, TokenSet

BASE = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", 60]
SHORT = [*TINY, "--max_steps", 2]


@pytest.fixture(scope="module")
def reference(synthetic):
    """The folder of a search that nobody disturbed."""
    run("fastmix.py", *BASE, "--out_dir", "reference", cwd=synthetic)
    return synthetic / "reference"


# ---- what a run writes ---------------------------------------------------------------------------

def test_the_log(reference):
    rows = log_rows(reference)
    assert [row["step"] for row in rows] == list(range(0, 61, 5))
    for row in rows:
        assert list(row) == ["step", "max_steps", "alpha", "alignment", "source_loss",
                             "target_val_loss", "target_losses"]
        assert list(row["alpha"]) == ["a", "b", "noise"]
        assert sum(row["alpha"].values()) == pytest.approx(1)
    assert list(rows[0]["alpha"].values()) == pytest.approx([1 / 3] * 3)
    for key in ("alignment", "source_loss"):  # nothing is measured yet
        assert rows[0][key] == {"a": None, "b": None, "noise": None}
    assert rows[-1]["target_val_loss"] < rows[0]["target_val_loss"] - 0.3
    assert result_json(reference)["real_run_tokens"] == 60 * 8 * 16


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A search over text and examples, toward two weighted targets, for a longer real run."""
    folder = tmp_path_factory.mktemp("masked")
    split_set(folder / "data" / "text", markov(1, 8000), vocab_size=65)
    example_set(folder / "data" / "tasks", 3, 2)
    example_set(folder / "data" / "like_tasks", 3, 2, n=400)
    run("fastmix.py", *TINY, "--sources", "text,tasks", "--target", "text,like_tasks=3",
        "--max_steps", 20, "--train_tokens", 5_000, cwd=folder)
    return folder


def test_the_result(masked):
    result = result_json(masked / "out")
    sets = {name: TokenSet(masked / "data", name, 16) for name in ("text", "tasks", "like_tasks")}
    n_tokens = {name: sets[name].n_tokens("train") for name in ("text", "tasks")}
    mixture = result["mixture"]
    assert mixture == log_rows(masked / "out")[-1]["alpha"]
    assert sum(mixture.values()) == pytest.approx(1)
    assert result["tokens_available"] == n_tokens
    for name, share in mixture.items():
        assert result["epochs"][name] == pytest.approx(share * 5_000 / n_tokens[name])
        assert result["tokens_per_document"][name] == sets[name].tokens_per_document()
    assert result["target_weights"] == {"text": 0.25, "like_tasks": 0.75}
    assert result["tokenizer"] == "synthetic"
    assert result["digests"] == {name: s.digest for name, s in sets.items()}
    assert result["real_run_tokens"] == 5_000
    assert {path.name for path in (masked / "out").iterdir()} == {"ckpt.pt", "log.jsonl",
                                                                  "mixture.json"}


def test_losses_are_those_of_the_model_that_is_left(masked):
    """By another way: all windows of a split at once. Of the examples only responses count."""
    result = result_json(masked / "out")
    ckpt = torch.load(masked / "out" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**ckpt["config"]))
    model.load_state_dict(ckpt["model"])

    def loss_of(name, split, max_tokens):
        chosen = TokenSet(masked / "data", name, 16)
        x, y = map(torch.from_numpy, chosen.windows(split, chosen.spread(split, max_tokens)))
        logits = model.lm_head(model(x)).detach()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE).item()

    last = log_rows(masked / "out")[-1]
    for name, loss in last["target_losses"].items():
        assert loss == pytest.approx(loss_of(name, "val", 256), rel=1e-5)
    weighted = np.average(list(last["target_losses"].values()), weights=[0.25, 0.75])
    assert last["target_val_loss"] == pytest.approx(weighted)
    for name, loss in result["test_loss"].items():
        assert loss == pytest.approx(loss_of(name, "test", 2**18), rel=1e-5)


def test_without_sources_a_run_takes_the_sample(tmp_path):
    """Those of its sets that are there, toward numpy."""
    for seed, name in enumerate(("noise", "python", "numpy", "other")):
        chain_set(tmp_path / "data" / name, seed, n=4000)
    run("fastmix.py", *SHORT, cwd=tmp_path)
    result = result_json(tmp_path / "out")
    assert list(result["mixture"]) == ["python", "noise"]
    assert list(result["test_loss"]) == ["numpy"]


# ---- the same run in other forms -----------------------------------------------------------------

def test_looking_more_often_changes_nothing(synthetic, reference):
    run("fastmix.py", *BASE, "--log_every", 7, "--eval_tokens", 128, "--out_dir", "looked at",
        cwd=synthetic)
    assert_same(synthetic / "looked at", reference, with_log=False)


def two_processes(*args, cwd):
    """What torchrun starts, without its own imports of torch."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):
        processes.append(start("fastmix.py", *args, cwd=cwd,
                               env=env | {"RANK": rank, "LOCAL_RANK": rank}))
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert ended[1][0] == ""  # only the first one prints


def test_two_processes_are_as_one(synthetic):
    """The same draws, shared; sums in another order, so that rounding differs."""
    flags = [*BASE, "--max_steps", 20]
    two_processes(*flags, "--out_dir", "two", cwd=synthetic)
    run("fastmix.py", *flags, "--out_dir", "one", cwd=synthetic)
    one = log_rows(synthetic / "one")[-1]
    two = log_rows(synthetic / "two")[-1]
    assert one["alpha"]["b"] > 0.5
    for key in ("alpha", "alignment", "source_loss", "target_losses"):
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
    assert result_json(synthetic / "two")["test_loss"] == pytest.approx(
        result_json(synthetic / "one")["test_loss"], rel=1e-4)


def test_batches_that_two_processes_cannot_share(synthetic):
    flags = [*SHORT, "--sources", "a,b"]
    for flag in (["--batch_size", 7], ["--target_batch_size", 1]):
        line = refused("fastmix.py", *flags, *flag, cwd=synthetic,
                       env={"WORLD_SIZE": "2", "RANK": "0"})
        assert f"{flag[0]} {flag[1]}" in line


# ---- other starts --------------------------------------------------------------------------------

def test_init_from_takes_the_weights_and_the_size_alone(synthetic, reference):
    """Mixture, optimizer and steps are new, and the block size may be another one."""
    run("fastmix.py", "--init_from", "reference/ckpt.pt", "--block_size", 24, "--sources", "a,b",
        "--target", "target", "--max_steps", 2, "--eval_tokens", 256, "--device", "cpu",
        "--learning_rate", 0, "--learning_rate_mixture", 0, "--out_dir", "still", cwd=synthetic)
    before = torch.load(reference / "ckpt.pt", weights_only=True)
    after = torch.load(synthetic / "still" / "ckpt.pt", weights_only=True)
    assert before["model"].keys() == after["model"].keys()
    for name, weight in before["model"].items():
        assert torch.equal(after["model"][name], weight), name
    assert after["state"]["step"] == 2
    assert after["config"] == before["config"] | {"block_size": 24}
    assert result_json(synthetic / "still")["mixture"] == {"a": 0.5, "b": 0.5}


def test_fixed_mixtures(tmp_path):
    """
    uniform, proportional, weights and a file: what is asked is trained, and nothing compared. The
    shares of bytes are those of tokens, times bytes per token.
    """
    for name, n in (("a", 4000), ("b", 12_000)):
        chain_set(tmp_path / "data" / name, 1, n=n)
    path = tmp_path / "data" / "b" / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["bytes"] *= 3
    path.write_text(json.dumps(meta))
    (tmp_path / "m.json").write_text('{"mixture": {"b": 0.125, "a": 0.875}}')
    for text, share in (("uniform", 0.5), ("proportional", 0.25), ("a=3,b=1", 0.75), ("b", 0.0),
                        ("m.json", 0.875)):
        out = tmp_path / f"out-{text}"
        run("fastmix.py", *SHORT, "--sources", "a,b", "--mixture", text, "--out_dir", out,
            cwd=tmp_path)
        result = result_json(out)
        assert result["mixture"] == pytest.approx({"a": share, "b": 1 - share})
        assert result["bytes"]["b"] == pytest.approx(3 * (1 - share) / (share + 3 * (1 - share)))
        assert result["target_weights"] == {"a": 0.5, "b": 0.5}  # without --target
        last = log_rows(out)[-1]
        assert last["alignment"] == {"a": None, "b": None}
        assert (last["source_loss"]["a"] is None) == (share == 0)


def test_a_run_shorter_than_the_real_one_sees_as_much_less_text(tmp_path):
    """A tenth, here two of 19 symbols, which stand in rows. A hundredth would be too little."""
    ids = np.arange(20_000) // 1053
    write_set(tmp_path / "data" / "one", {"train": ids, "val": ids, "test": ids})
    argv = ["fastmix.py", *TINY, "--sources", "one", "--mixture", "uniform", "--max_steps", 100]
    loss = {}
    for real in (1, 10):
        run(*argv, "--train_tokens", real * 100 * 8 * 16, "--out_dir", real, cwd=tmp_path)
        loss[real] = log_rows(tmp_path / str(real))[-1]["target_val_loss"]
    assert loss[10] > loss[1] + 0.5
    line = refused(*argv, "--train_tokens", 100 * 100 * 8 * 16, cwd=tmp_path)
    assert "may read only 200 tokens of 'one'" in line


# ---- stopped and resumed -------------------------------------------------------------------------

def test_killed_and_resumed_is_bit_for_bit_the_same(synthetic, reference):
    """And while the disk is full a resumed run ends with one line, its checkpoint as it was."""
    out = synthetic / "killed"
    process = start("fastmix.py", *BASE, "--out_dir", "killed", cwd=synthetic)
    wait_for_step(process, out, 25)
    process.kill()
    process.communicate()
    before = (out / "ckpt.pt").read_bytes()
    line = refused("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic,
                   limit=(resource.RLIMIT_FSIZE, len(before) // 2))
    assert "cannot write killed/ckpt.pt" in line
    assert (out / "ckpt.pt").read_bytes() == before
    assert not list(out.glob("*.partial"))

    run("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic)
    assert_same(out, reference)

    # a run that has ended gives its result once more
    run("fastmix.py", "--resume", "--out_dir", "killed", cwd=synthetic)
    assert_same(out, reference)


def test_ctrl_c_says_how_to_resume(synthetic):
    out = synthetic / "interrupted"
    flags = [*BASE, "--max_steps", 10**6, "--out_dir", out.name]
    process = start("fastmix.py", *flags, cwd=synthetic)
    wait_for_step(process, out, 10)
    process.send_signal(signal.SIGINT)
    stdout, err = process.communicate()
    assert process.returncode == 130, (stdout, err)
    assert err == ""
    assert "--resume" in stdout.splitlines()[-1]
    assert torch.load(out / "ckpt.pt", weights_only=True)["state"]["step"] >= 5
    assert not (out / "mixture.json").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(synthetic):
    line = refused("fastmix.py", *BASE, "--learning_rate", 1e30, "--warmup_steps", 0,
                   "--out_dir", "hot", cwd=synthetic)
    assert "no longer finite at step 5;" in line
    assert "--learning_rate 1e+30" in line
    ckpt = torch.load(synthetic / "hot" / "ckpt.pt", weights_only=True)
    assert ckpt["state"]["step"] == 0
    assert ckpt["model"]["lm_head.weight"].isfinite().all()
    assert [row["step"] for row in log_rows(synthetic / "hot")] == [0]


# ---- one clear line ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wrong(synthetic, tmp_path_factory):
    """The synthetic sets, some that do not go with them, a run in done/, and parts of runs."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(synthetic / "data", folder / "data")
    ids = markov(1, 3000)
    splits = {"train": ids[:1000], "val": ids[1000:2000], "test": ids[2000:]}
    write_set(folder / "data" / "short", splits | {"val": ids[:16]})  # windows take 17
    write_set(folder / "data" / "gpt2", splits, tokenizer="gpt2")
    write_set(folder / "other" / "a", splits)
    write_set(folder / "other" / "b", splits)
    run("fastmix.py", *SHORT, "--sources", "a,b", "--out_dir", "done", cwd=folder)
    for name in ("ckpt.pt", "mixture.json"):
        (folder / f"only {name}").mkdir()
        shutil.copy(folder / "done" / name, folder / f"only {name}")
    (folder / "gpt2.json").write_text('{"mixture": {"a": 1}, "tokenizer": "gpt2"}')
    return folder


AB = ["--sources", "a,b"]
RESUME = ["--resume", "--out_dir", "done"]
CASES = {
    "unknown set": (["--sources", "a,nowhere"], "no set 'nowhere' in data/"),
    "two tokenizers": (["--sources", "a,gpt2"], "'gpt2' was made with the tokenizer gpt2"),
    "name twice": (["--sources", "a,b,a"], "a,b,a"),
    "target alone": (["--target", "a"], "--target a needs --sources"),
    "weights of 0": ([*AB, "--target", "a=0,b=0"], "'a=0,b=0'"),
    "negative weight": ([*AB, "--mixture", "a=-1,b=2"], "'a=-1,b=2'"),
    "no weight": ([*AB, "--mixture", "a=much,b"], "'much'"),
    "unknown source": ([*AB, "--mixture", "c"], "--mixture c names c, but --sources are a, b"),
    "mixture of other tokens": ([*AB, "--mixture", "gpt2.json"], "gpt2.json", "gpt2"),
    "no steps": ([*AB, "--max_steps", 0], "--max_steps", "'0'"),
    "more than all": ([*AB, "--uniform_share", 2], "--uniform_share 2"),
    "text too short": (["--sources", "a,short"], "short/val.bin: 16 tokens", "--block_size 16"),
    "odd heads": ([*AB, "--n_head", 3], "--n_embd 32", "--n_head 3"),
    "a checkpoint's": ([*AB, "--out_dir", "only ckpt.pt"], "only ckpt.pt/ holds another run"),
    "a result's": ([*AB, "--out_dir", "only mixture.json"], "mixture.json/ holds another run"),
    "nothing to resume": ([*AB, "--resume"], "nothing to resume/ckpt.pt"),
    "its tokenizer": (["--sources", "gpt2", "--init_from", "done/ckpt.pt"], "tokenizer synthetic"),
    "other data": ([*RESUME, "--data_dir", "other"], "the sets in other/"),
    "other flags": ([*RESUME, "--sources", "b,a"], "done/ckpt.pt", "--sources"),
}


def test_one_clear_line(wrong):
    """Each wrong command gets one, exits with 2, and costs nothing that was there."""
    def files():
        return {path: path.stat().st_mtime_ns for path in wrong.rglob("*")}

    def line_of(case):
        flags, *_ = CASES[case]
        return refused("fastmix.py", *SHORT, "--out_dir", case, *flags, cwd=wrong)

    before = files()
    with ThreadPoolExecutor(2) as pool:
        lines = dict(zip(CASES, pool.map(line_of, CASES)))
    for case, (_, *parts) in CASES.items():
        for part in parts:
            assert part in lines[case], (case, lines[case])
    assert files() == before
