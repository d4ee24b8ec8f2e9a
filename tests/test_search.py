"""The search as a whole: does it step as a plain reference does, and find what was planted? By the command line."""
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, example_set, log_rows, markov, run, write_set
from fastmix import draw_batch
from model import GPT, GPTConfig, learning_rate_at
from prepare_data import IGNORE, TokenSet

SEARCHES = {  # name: (sources, seed, further flags)
    **{f"planted-{seed}": ("a,b,c,noise", seed) for seed in (0, 1, 2)},
    "weights": ("a,b,c,noise", 3, "--uniform_share", 1),
    "sampling": ("a,b,c,noise", 3, "--uniform_share", 0),
    "seldom": ("a,b,c,noise", 3, "--outer_every", 4),
    "accumulated": ("a,b,c,noise", 3, "--grad_accum", 2, "--batch_size", 4),
    "bfloat16": ("a,b,c,noise", 3, "--dtype", "bfloat16"),
    "fewer sequences than sources": ("a,b,c,noise", 3, "--batch_size", 2),
    "two targets": ("a,b,c,noise", 3, "--target", "target,target_c"),
    "once": ("a,b,noise", 4),
    **{f"twice-{seed}": ("a,b,b2,noise", seed) for seed in (4, 5, 6)},
}


@pytest.fixture(scope="module")
def found(synthetic):
    """{name: mixture} of all searches, two at a time. `target` continues the chain of b; the noise is uniform."""
    def search(item):
        name, (sources, seed, *more) = item
        stdout = run("fastmix.py", *TINY, "--sources", sources, "--target", "target", "--seed", seed, "--max_steps",
                     100, "--log_every", 50, "--learning_rate", 1e-2, "--learning_rate_mixture", 0.08, "--out_dir",
                     name, *more, cwd=synthetic)
        few = "warning: with 2 sequences a step for 4 sources, each step compares only some of them"
        warnings = [line for line in stdout.splitlines() if line.startswith("warning: ")]
        assert warnings == ([few] if name == "fewer sequences than sources" else [])
        return name, json.loads((synthetic / name / "mixture.json").read_text())["mixture"]
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(search, SEARCHES.items()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_source_that_is_the_target(found, seed):
    mixture = found[f"planted-{seed}"]
    assert mixture["b"] > 0.9, mixture
    assert max(mixture[n] for n in ("a", "c", "noise")) < 0.05, mixture


@pytest.mark.parametrize("name", ["weights", "sampling", "seldom", "accumulated", "bfloat16",
                                  "fewer sequences than sources"])
def test_finds_it_by_every_variant(found, name):
    mixture = found[name]
    assert max(mixture, key=mixture.get) == "b" and mixture["b"] > 0.5, mixture


def test_two_targets_share_the_mixture(found):
    """Each counts the same: the source of each gets about a half."""
    mixture = found["two targets"]
    assert mixture["b"] + mixture["c"] > 0.9 and 0.3 < mixture["b"] < 0.7, mixture


def test_a_source_given_twice_shares_its_weight(found):
    """Together both halves get what the source gets alone; between them only noise moves the mixture, and little."""
    for seed in (4, 5, 6):
        twice = found[f"twice-{seed}"]
        assert abs(twice["b"] + twice["b2"] - found["once"]["b"]) < 0.1, (found["once"], twice)
        assert 0.35 < twice["b"] / (twice["b"] + twice["b2"]) < 0.65, twice


def mean_loss(net, x, y):
    """Over learned tokens, NaN without any."""
    logits = (net(x) @ net.lm_head.weight.T).flatten(0, 1)
    return F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE)


def reference_search(folder, args):
    """
    What a search goes through, by the formulas alone: one backward pass for each source, and for each target sequence.
    It shares with fastmix.py the draws and the model. Mixtures, alignments and losses of the sources, each (steps, K),
    NaN where there are none.
    """
    sources, targets = ([TokenSet(folder, n, args.block_size) for n in names] for names in (args.sources, args.targets))
    K, n = len(sources), args.batch_size * args.grad_accum
    density = torch.tensor([s.density("train") for s in sources], dtype=torch.float64)
    torch.manual_seed(args.seed)
    net = GPT(GPTConfig(sources[0].vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd))
    head = net.lm_head.weight
    optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay, (0.9, 0.95), fused=False)
    z, G, H, v, seen = torch.zeros(K, dtype=torch.float64), 0, 0, None, []
    for step in range(args.max_steps):
        alpha = torch.softmax(z, 0)
        if step % args.outer_every == 0:
            _, k, x, y = draw_batch(targets, "val", [1 / len(targets)] * len(targets), args.target_batch_size,
                                    np.random.default_rng((args.seed, step, 1)))
            # a sequence of m learned tokens counts as m of those that its target has in a sequence on average
            g = sum(torch.autograd.grad(mean_loss(net, x[[i]], y[[i]]), head)[0] * (y[i] != IGNORE).sum()
                    / (targets[k[i]].density("val") * args.block_size * len(k)) for i in range(len(k)))
            G = 0.9 * G + 0.1 * g
            hs = [net(x[[i]])[y[[i]] != IGNORE].detach() for i in range(len(k))]
            H = 0.9 * H + 0.1 * sum(h.T @ h / (targets[k[i]].density("val") * y.numel()) for i, h in enumerate(hs))
            rows = torch.ones_like(head) if v is None else v.mean(1, keepdim=True)
            PG = G / (rows + 0.1 * rows.mean())
            PG = torch.linalg.solve(H + 0.1 * H.trace() / len(H) * torch.eye(len(H)), PG.T).T
        q = 0.75 * alpha + 0.25 / K
        _, k, x, y = draw_batch(sources, "train", q, n, np.random.default_rng((args.seed, step, 0)))
        M, total, (A, losses) = (alpha * density).sum(), 0, torch.full((2, K), torch.nan, dtype=torch.float64)
        for s in k.unique():
            loss, learned = mean_loss(net, x[k == s], y[k == s]), (y[k == s] != IGNORE).sum()
            losses[s], A[s] = loss.item(), (PG * torch.autograd.grad(loss, head, retain_graph=True)[0]).sum().item()
            total = total + alpha[s] / (q[s] * M) * loss * learned / y.numel()
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        g = head.grad.clone()
        v = 0.05 * g**2 if v is None else 0.95 * v + 0.05 * g**2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.outer_every == 0:
            there = ~A.isnan()
            share = alpha[there] / alpha[there].sum()
            a, d = A[there], density[there]
            M = (share * d).sum()
            mean = (share * d * a).sum() / M
            a = d / M * (a - mean / 2) + mean / 2  # per token drawn; for text this changes nothing
            move = (a - (share * a).sum()) / (share * a**2).sum().sqrt()
            z[there] += args.learning_rate_mixture * move
        else:
            A[:] = torch.nan
        seen.append(torch.stack([alpha, A, losses]))
    return torch.stack(seen, 1).numpy()


@pytest.mark.parametrize("sources, targets, flags", [
    (["text", "other", "qa"], ["text"], {}),
    (["text", "other"], ["other"], {"outer_every": 3, "grad_accum": 2, "batch_size": 4}),
    (["qa", "text", "other"], ["qa", "text"], {"batch_size": 2})])
def test_search_equals_a_plain_reference(tmp_path, sources, targets, flags):
    """With masks and without, several targets, micro-batches, seldom outer steps, and sources absent from a batch."""
    for name, seed in (("text", 3), ("other", 4)):
        ids = markov(seed, 6000)
        write_set(tmp_path / "data" / name, {"train": ids[:3000], "val": ids[3000:4500], "test": ids[4500:]}, 65)
    example_set(tmp_path / "data" / "qa", 1, 3, n=400)
    args = dict(seed=5, n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=8, grad_accum=1, target_batch_size=4,
                warmup_steps=3, max_steps=16, learning_rate=1e-2, learning_rate_mixture=0.1, weight_decay=0.1,
                grad_clip=1.0, outer_every=1) | flags
    given = [word for flag, value in args.items() for word in (f"--{flag}", value)]
    run("fastmix.py", *TINY, *given, "--log_every", 1, "--sources", ",".join(sources), "--target", ",".join(targets), cwd=tmp_path)
    rows = log_rows(tmp_path / "out")
    alpha, alignment, loss = reference_search(tmp_path / "data",
                                              SimpleNamespace(sources=sources, targets=targets, **args))

    def logged(key, rows):
        return np.array([[np.nan if v is None else v for v in row[key].values()] for row in rows])
    np.testing.assert_allclose(logged("alpha", rows[:-1]), alpha, atol=1e-4)
    np.testing.assert_allclose(logged("source_loss", rows[1:]), loss, atol=1e-3)
    np.testing.assert_allclose(logged("alignment", rows[1:]), alignment, atol=1e-3 * np.nanmax(np.abs(alignment)))
    assert np.abs(alpha[-1] - alpha[0]).max() > 0.03
