"""
The search as a whole: does it step as a plain reference does, and find what was planted? And the
learning rate of the steps between.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix
from conftest import TINY, example_set, log_rows, markov, run, write_set
from fastmix import draw_batch, learning_rate_at
from model import GPT, GPTConfig
from prepare_data import IGNORE, TokenSet

# ---- what a search finds -----------------------------------------------------------------------

# {name: (sources, seed, further flags)}. `target` continues the chain of b, target_c that of c, b2
# is b again, and the noise is uniform.
SEARCHES = {
    "planted-0": ("a,b,c,noise", 0),
    "planted-1": ("a,b,c,noise", 1),
    "planted-2": ("a,b,c,noise", 2),
    "weights": ("a,b,c,noise", 3, "--uniform_share", 1),
    "sampling": ("a,b,c,noise", 3, "--uniform_share", 0),
    "seldom": ("a,b,c,noise", 3, "--outer_every", 4),
    "accumulated": ("a,b,c,noise", 3, "--grad_accum", 2, "--batch_size", 4),
    "bfloat16": ("a,b,c,noise", 3, "--dtype", "bfloat16"),
    "fewer sequences than sources": ("a,b,c,noise", 3, "--batch_size", 2),
    "two targets": ("a,b,c,noise", 3, "--target", "target,target_c"),
    "once": ("a,b,noise", 4),
    "twice-4": ("a,b,b2,noise", 4),
    "twice-5": ("a,b,b2,noise", 5),
    "twice-6": ("a,b,b2,noise", 6),
}


def search(folder, name):
    """Runs one of the above in the folder -> the mixture that it finds."""
    sources, seed, *flags = SEARCHES[name]
    stdout = run("fastmix.py", *TINY, "--sources", sources, "--target", "target", "--seed", seed,
                 "--max_steps", 100, "--log_every", 50, "--learning_rate", 1e-2,
                 "--out_dir", name, *flags, cwd=folder)
    expected = []
    if name == "fewer sequences than sources":
        expected.append("warning: with 2 sequences per step for 4 sources, each step compares only "
                        "some of them")
    assert [line for line in stdout.splitlines() if line.startswith("warning: ")] == expected
    return json.loads((folder / name / "mixture.json").read_text())["mixture"]


@pytest.fixture(scope="module")
def found(synthetic):
    """{name: mixture} of all searches, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        mixtures = pool.map(lambda name: search(synthetic, name), SEARCHES)
        return dict(zip(SEARCHES, mixtures))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_source_that_is_the_target(found, seed):
    mixture = found[f"planted-{seed}"]
    assert mixture["b"] > 0.9, mixture
    assert max(mixture["a"], mixture["c"], mixture["noise"]) < 0.05, mixture


@pytest.mark.parametrize("name", ["weights", "sampling", "seldom", "accumulated", "bfloat16",
                                  "fewer sequences than sources"])
def test_finds_it_by_every_variant(found, name):
    mixture = found[name]
    assert max(mixture, key=mixture.get) == "b", mixture
    assert mixture["b"] > 0.5, mixture


def test_two_targets_share_the_mixture(found):
    """Each counts the same: the source of each gets about a half."""
    mixture = found["two targets"]
    assert mixture["b"] + mixture["c"] > 0.9, mixture
    assert 0.3 < mixture["b"] < 0.7, mixture


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_a_source_given_twice_shares_its_weight(found, seed):
    """Both halves together get what it gets alone. Between them only noise moves the mixture."""
    once = found["once"]
    twice = found[f"twice-{seed}"]
    both = twice["b"] + twice["b2"]
    assert abs(both - once["b"]) < 0.1, (once, twice)
    assert 0.35 < twice["b"] / both < 0.65, twice


# ---- how it steps ------------------------------------------------------------------------------

def mean_loss(net, x, y):
    """Over learned tokens, NaN without any."""
    logits = net(x) @ net.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE)


def target_moments(net, targets, args, step):
    """
    The target's gradient at the head, and the second moment of its hidden states, sequence by
    sequence. One of m learned tokens counts as m of those that its target has in a sequence on
    average.
    """
    rng = np.random.default_rng((args.seed, step, 1))
    n = args.target_batch_size
    target, x, y = draw_batch(targets, "val", [1 / len(targets)] * len(targets), n, rng)
    G = 0
    S = 0
    for i in range(n):
        chosen = targets[target[i]]
        average = chosen.density("val") * chosen.fill("val") * args.block_size
        learned = y[i] != IGNORE
        (g,) = torch.autograd.grad(mean_loss(net, x[[i]], y[[i]]), net.lm_head.weight)
        G = G + g * learned.sum() / average / n
        h = net(x[[i]])[0][learned].detach()
        S = S + h.T @ h / average / n
    return G, S


def damped(factor):
    """A factor of the curvature, plus its mean diagonal."""
    return factor + factor.trace() / len(factor) * torch.eye(len(factor))


def times_P(curvature, G, S, v):
    """P G. v is 1 everywhere before the first step, when AdamW has none yet."""
    if curvature == "none":
        return G
    if curvature == "adamw":
        return G / (v.sqrt() + 0.1 * v.sqrt().mean())
    rows = torch.diag(v.mean(1))
    return torch.linalg.inv(damped(rows)) @ G @ torch.linalg.inv(damped(S))


def reference_search(folder, args):
    """
    What a search does, by the formulas alone: a backward pass for each source, and for each target
    sequence. It shares with fastmix.py the draws, the learning rate and the model. Returns the
    mixtures, and the sources' alignments and losses, each (steps, K), NaN where there are none.
    """
    sources = [TokenSet(folder, name, args.block_size) for name in args.sources]
    targets = [TokenSet(folder, name, args.block_size) for name in args.targets]
    K = len(sources)
    density = torch.tensor([s.density("train") for s in sources], dtype=torch.float64)
    fill = torch.tensor([s.fill("train") for s in sources], dtype=torch.float64)
    torch.manual_seed(args.seed)
    net = GPT(GPTConfig(sources[0].vocab_size, args.block_size, args.n_layer, args.n_head,
                        args.n_embd))
    head = net.lm_head.weight
    optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay, fused=False)
    z = torch.zeros(K, dtype=torch.float64)
    G = 0
    S = 0
    v = torch.zeros_like(head)
    all_rms = []  # fewer than 50, so that their mean is the scale
    history = []
    for step in range(args.max_steps):
        alpha = torch.softmax(z, 0)
        outer = step % args.outer_every == 0

        # outer step, first half: P times the running mean of the target's gradient
        if outer:
            G_now, S_now = target_moments(net, targets, args, step)
            G = 0.9 * G + 0.1 * G_now
            S = 0.9 * S + 0.1 * S_now
            PG = times_P(args.curvature, G, S, v if step > 0 else torch.ones_like(v))

        # inner step: tokens drawn by q, and each source's tokens weighted by r
        q = 0.75 * alpha + 0.25 / K
        by_sequence = q / fill / (q / fill).sum()
        n = args.batch_size * args.grad_accum
        n_tokens = n * args.block_size / (q / fill).sum()
        rng = np.random.default_rng((args.seed, step, 0))
        source, x, y = draw_batch(sources, "train", by_sequence, n, rng)
        r = alpha / q / (alpha * density).sum()
        A = torch.full((K,), torch.nan, dtype=torch.float64)
        losses = torch.full((K,), torch.nan, dtype=torch.float64)
        total = 0
        for k in source.unique():
            loss = mean_loss(net, x[source == k], y[source == k])
            losses[k] = loss.item()
            if outer:
                (g,) = torch.autograd.grad(loss, head, retain_graph=True)
                A[k] = (PG * g).sum().item()
            learned = (y[source == k] != IGNORE).sum()
            total = total + r[k] * loss * learned / n_tokens
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        v = 0.95 * v + 0.05 * head.grad**2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        optimizer.step()
        optimizer.zero_grad()

        # outer step, second half: the mixture of the sources in the batch
        if outer:
            there = ~A.isnan()
            beta = alpha[there] * density[there] / (alpha * density)[there].sum()
            relative = density[there] / (alpha * density)[there].sum() * alpha[there].sum()
            mean = (beta * A[there]).sum()
            all_rms.append((beta * A[there]**2).sum().sqrt())
            rate = args.learning_rate_mixture * (args.max_steps - step) / args.max_steps
            z[there] += rate * relative * (A[there] - mean) / np.mean(all_rms)
        history.append(torch.stack([alpha, A, losses]))
    return torch.stack(history, 1).numpy()


def logged(rows, key):
    """(steps, K) from the log, NaN for null."""
    table = [list(row[key].values()) for row in rows]
    return np.array(table, dtype=float)  # None becomes NaN


@pytest.mark.parametrize("sources, targets, flags", [
    (["text", "other", "qa"], ["text"], {"curvature": "kfac"}),
    (["text", "other", "qa"], ["text"], {"curvature": "adamw"}),
    (["text", "other", "qa"], ["text"], {"curvature": "none"}),
    (["text", "other"], ["other"],
     {"outer_every": 3, "grad_accum": 2, "batch_size": 4, "curvature": "kfac"}),
    (["qa", "text", "other"], ["qa", "text"], {"batch_size": 2, "curvature": "kfac"})])
def test_search_equals_a_plain_reference(tmp_path, sources, targets, flags):
    """
    With masks and without, several targets, micro-batches, seldom outer steps, and sources that
    are absent from a batch.
    """
    for name, seed in (("text", 3), ("other", 4)):
        ids = markov(seed, 6000)
        splits = {"train": ids[:3000], "val": ids[3000:4500], "test": ids[4500:]}
        write_set(tmp_path / "data" / name, splits, 65)
    example_set(tmp_path / "data" / "qa", 1, 3, n=400)
    args = {"seed": 5, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8,
            "grad_accum": 1, "target_batch_size": 4, "warmup_steps": 3, "max_steps": 16,
            "learning_rate": 1e-2, "learning_rate_mixture": 0.2, "weight_decay": 0.1,
            "grad_clip": 1.0, "outer_every": 1}
    args |= flags
    command = []
    for flag, value in args.items():
        command += [f"--{flag}", value]
    run("fastmix.py", *TINY, *command, "--log_every", 1, "--sources", ",".join(sources),
        "--target", ",".join(targets), cwd=tmp_path)
    rows = log_rows(tmp_path / "out")
    args = SimpleNamespace(sources=sources, targets=targets, **args)
    alpha, A, losses = reference_search(tmp_path / "data", args)

    # a row tells the mixture of the step to come, and what the step before it found
    np.testing.assert_allclose(logged(rows[:-1], "alpha"), alpha, atol=1e-4)
    np.testing.assert_allclose(logged(rows[1:], "source_loss"), losses, atol=1e-3)
    largest = np.nanmax(np.abs(A))
    np.testing.assert_allclose(logged(rows[1:], "alignment"), A, atol=1e-3 * largest)
    assert np.abs(alpha[-1] - alpha[0]).max() > 0.03


# ---- optimizers and the learning rate ----------------------------------------------------------

def train_by_sgd(monkeypatch, folder, *flags):
    """fastmix.main() in this process, for a few steps, with SGD in place of AdamW."""
    def configure_optimizer(self, learning_rate, weight_decay, fused):
        return torch.optim.SGD(self.parameters(), learning_rate)

    monkeypatch.setattr(GPT, "configure_optimizer", configure_optimizer)
    # a setting of the whole process, which the other tests do without
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.chdir(folder)
    argv = [*TINY, "--sources", "a,b,noise", "--target", "target", "--max_steps", "3", *flags]
    fastmix.main(argv)


def test_a_search_without_adamws_v_fails_loudly(synthetic, monkeypatch):
    """P is made of v, so a fork with another optimizer has to say what stands for it."""
    with pytest.raises(KeyError, match="exp_avg_sq"):
        train_by_sgd(monkeypatch, synthetic, "--out_dir", "sgd")
    assert not (synthetic / "sgd" / "mixture.json").exists()


def test_without_a_curvature_a_search_takes_every_optimizer(synthetic, monkeypatch):
    train_by_sgd(monkeypatch, synthetic, "--out_dir", "sgd-none", "--curvature", "none")
    rows = log_rows(synthetic / "sgd-none")
    assert rows[-1]["alpha"] != rows[0]["alpha"]


def test_training_at_a_fixed_mixture_takes_every_optimizer(synthetic, monkeypatch):
    train_by_sgd(monkeypatch, synthetic, "--out_dir", "sgd-fixed", "--mixture", "uniform")
    rows = log_rows(synthetic / "sgd-fixed")
    assert [row["step"] for row in rows] == [0, 3]


@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 40), (10, 40), (100, 40)])
def test_learning_rate_warms_up_and_falls_to_a_tenth(warmup_steps, max_steps):
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [learning_rate_at(step, args) for step in range(max_steps + 1)]
    assert min(rates) > 0
    for step, rate in enumerate(rates[:warmup_steps]):
        assert rate == pytest.approx(2.0 * (step + 1) / (warmup_steps + 1))
    falling = rates[warmup_steps:]
    if falling:
        assert falling[0] == 2.0
        assert falling[len(falling) // 2] == pytest.approx(1.1)
        assert falling[-1] == pytest.approx(0.2)
        assert falling == sorted(set(falling), reverse=True)
