"""(1) and (3) of fastmix.py: draws, weights, and the mixture's step, against enumeration, differences and autograd."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix
from fastmix import (IGNORE, batch_loss, draw, draw_batch, fused_cross_entropy, gather, inverse_curvature, loss_weights,
                     mixture_step, per_drawn_token, target_gradient, within_bounds)
from model import GPT, GPTConfig


def offsets(q, n):
    """Exact enumeration of the offset: midpoints and lengths of the intervals on which draw() is constant."""
    edges = np.cumsum(q) / np.sum(q)
    breaks = np.unique(np.concatenate([[0.0, 1.0], (edges * n) % 1.0]))
    return list(zip((breaks[1:] + breaks[:-1]) / 2, np.diff(breaks)))


def orders(K):
    """Every order of K sources or, where that is too many, some."""
    rng = np.random.default_rng(0)
    return map(np.array, itertools.permutations(range(K))) if K < 5 else [rng.permutation(K) for _ in range(5)]


@pytest.mark.parametrize("q", [[0.5, 0.5], [0.7, 0.2, 0.06, 0.04], [1.0, 0.0, 0.0], [1 / 3] * 3, [0.01] * 100])
@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_systematic_draw_is_unbiased_and_within_one(q, n):
    q = np.array(q)
    for order in orders(len(q)):
        expected = np.zeros(len(q))
        for offset, length in offsets(q[order], n):
            source = draw(q, n, offset, order)
            count = np.bincount(source, minlength=len(q))
            assert len(source) == n and (np.diff(source) >= 0).all()
            assert (count >= np.floor(q * n - 1e-9)).all() and (count <= np.ceil(q * n + 1e-9)).all()
            expected += length * count
        np.testing.assert_allclose(expected, q / q.sum() * n, atol=1e-9)


def test_draw_at_the_edges():
    for order in orders(10):
        for q in ([0.1] * 10, [0.7] * 10):  # sums that rounding keeps off a whole number
            source = draw(np.array(q), 8, np.nextafter(1.0, 0.0), order)
            assert source.min() >= 0 and source.max() < 10
    assert draw(np.array([0.0, 1.0, 0.0]), 4, 0.0, np.arange(3)).tolist() == [1] * 4  # no share, no sequence


def test_every_pair_of_sources_meets():
    """2 sequences of 4 sources, over every order and offset: each pair as often as any other, none with itself."""
    q, together = np.full(4, 0.25), np.zeros((4, 4))
    for order in orders(4):
        for offset, length in offsets(q, 2):
            a, b = draw(q, 2, offset, order)
            together[a, b] += length / math.factorial(4)
    np.testing.assert_allclose(together, np.triu(np.full((4, 4), 1 / 6), 1), atol=1e-12)
    # and in what a run draws, where sources count unequally too
    sets = [Windows(k, 4, 7) for k in range(4)]
    for q in ([0.25] * 4, [0.4, 0.3, 0.2, 0.1]):
        found = {tuple(draw_batch(sets, "train", q, 2, np.random.default_rng((0, step, 0)))[0]) for step in range(300)}
        assert set(itertools.combinations(range(4), 2)) <= found


class Windows:
    """A set of exactly two windows of length T; every `unlearned`-th target is masked."""

    def __init__(self, seed, T, vocab_size, unlearned=None):
        self.ids = torch.randint(0, vocab_size, (T + 2,), generator=torch.Generator().manual_seed(seed)).numpy()
        self.mask, self.block_size = np.ones(T + 2, dtype=bool), T
        if unlearned:
            self.mask[::unlearned] = False

    def density(self, split):
        return (self.windows(split, np.arange(2))[1] != IGNORE).mean()

    def at_fraction(self, split, u):
        return (u * 2).astype(int)

    def windows(self, split, start):
        at = start[:, None] + np.arange(self.block_size + 1)
        return self.ids[at][:, :-1], np.where(self.mask, self.ids, IGNORE)[at][:, 1:]


def whole(sets, k):
    """Both windows of a set: x, y (2, T)."""
    return map(torch.from_numpy, gather(sets, "train", np.array([k, k]), np.array([0.25, 0.75])))


def draws(sets, q, n):
    """Every draw of n sequences that draw_batch() can make: (probability, set of each (n,), x, y)."""
    for order in orders(len(q)):
        for offset, length in offsets(np.asarray(q)[order], n):
            for places in itertools.product([0.25, 0.75], repeat=n):
                rng = SimpleNamespace(permutation=lambda K: order,
                                      random=lambda n=None: np.array(places) if n else offset)
                _, k, x, y = draw_batch(sets, "train", q, n, rng)
                yield length / 2**n / math.factorial(len(q)), k, x, y


@pytest.mark.parametrize("unlearned", [(None, None, None), (None, 2, 3)])
@pytest.mark.parametrize("known", [[0.62, 0.27, 0.11], [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("eps", [0.0, 0.25, 1.0])
def test_expected_gradient_is_the_mixtures(eps, known, unlearned):
    """
    Formula (1) by enumeration of every order, offset and window of a batch: E[gradient] = sum_k beta_k g_k, g_k the
    gradient of source k's mean loss over its learned tokens; where all tokens are learned, beta is alpha. The mixture
    that sequences are drawn by may be another one.
    """
    K, B, T, V = 3, 3, 4, 7
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 1, 1, 4)).double()
    head, params = model.lm_head.weight, list(model.parameters())
    sets = [Windows(k, T, V, unlearned[k]) for k in range(K)]
    alpha = torch.tensor([0.62, 0.27, 0.11], dtype=torch.float64)
    density = torch.tensor([s.density("train") for s in sets], dtype=torch.float64)
    q = (1 - eps) * torch.tensor(known, dtype=torch.float64) + eps / K
    weights = loss_weights(alpha, q, density)
    beta = alpha * density / (alpha * density).sum()
    if eps == 0 and known == alpha.tolist():  # sampling by the mixture: all learned tokens weigh the same
        torch.testing.assert_close(weights, weights[:1].expand(K))

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    exact = 0
    for k in range(K):
        x, y = whole(sets, k)
        loss = F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        exact = exact + beta[k] * flat(loss)
    # the gradient is linear in the loss, so that one of the expected loss does
    expected = sum(p * batch_loss(model, head, x, y, weights[k], y.numel())[0] for p, k, x, y in draws(sets, q, B))
    torch.testing.assert_close(flat(expected), exact)


@pytest.mark.parametrize("unlearned", [(None, None), (None, 2), (3, 1)])
def test_each_target_counts_equally_however_dense_its_mask(unlearned):
    """By enumeration: E[the target's gradient as main() takes it] is the mean of the targets' gradients, all means."""
    T, V, n = 5, 7, 2
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 1, 1, 4)).double()
    head = model.lm_head.weight
    targets = [Windows(k, T, V, u) for k, u in enumerate(unlearned)]
    if unlearned == (3, 1):
        targets[1].mask[3] = True  # one learned token in all
    exact = 0
    for k in range(2):
        x, y = whole(targets, k)
        loss = F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        exact = exact + torch.autograd.grad(loss, head)[0] / 2
    expected = 0
    for p, k, x, y in draws(targets, [0.5, 0.5], n):
        r = torch.tensor([1 / t.density("val") for t in targets], dtype=torch.float64)[k]
        expected = expected + p * target_gradient(model, head, x, y, r, n * T)[0]
    torch.testing.assert_close(expected, exact)


def test_processes_share_a_batch(monkeypatch):
    """Together the ranks draw what one process draws, each every second sequence."""
    sets, q = [Windows(k, 4, 7) for k in range(3)], [0.5, 0.3, 0.2]
    source, k, x, y = draw_batch(sets, "train", q, 7, np.random.default_rng(1))
    assert k.tolist() == source.tolist()
    for rank in range(2):
        monkeypatch.setattr(fastmix, "ranks", lambda: (rank, 2))
        source_r, k_r, x_r, y_r = draw_batch(sets, "train", q, 7, np.random.default_rng(1))
        assert source_r.tolist() == source.tolist()
        assert torch.equal(k_r, k[rank::2]) and torch.equal(x_r, x[rank::2]) and torch.equal(y_r, y[rank::2])


# ---- (3) the mixture

def step_of(z, A, present=None, rate=0.05):
    """z after mixture_step(), which works in place."""
    z = z.clone()
    mixture_step(z, A, torch.ones(len(z), dtype=torch.bool) if present is None else present, rate)
    return z


@pytest.mark.parametrize("units", ["gradient", "curvature"])
@pytest.mark.parametrize("density", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.6, 0.1, 0.4]])
def test_move_equals_difference_of_the_look_ahead(density, units):
    """
    Formulas (2) and (3), from parts of the head's gradient to the move of z, against a central difference over z of
    L_val(W - eta sqrt(M / M_0) P sum_k beta_k(z) g_k), W the head. For text M, the learned part of a batch, is 1 and
    beta is alpha. mixture_step() steps along alpha, and in units of the rms: both are taken out again.
    """
    K, N, V, C, eta, step, rate = 4, 30, 11, 5, 1e-5, 1e-4, 0.05
    g = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(V, C, generator=g, dtype=torch.float64))
    hidden = torch.randn(K + 1, N, C, generator=g, dtype=torch.float64)  # K sources and, last, the target
    targets = torch.randint(0, V, (K + 1, N), generator=g)
    z, density = torch.randn(K, generator=g, dtype=torch.float64), torch.tensor(density, dtype=torch.float64)
    z -= z.max()
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95))
    rows, H = torch.ones(V, 1, dtype=torch.float64), torch.eye(C, dtype=torch.float64)  # before its first step
    if units == "curvature":
        v = torch.zeros(V, C, dtype=torch.float64)
        for _ in range(3):
            weight.grad = torch.randn(V, C, generator=g, dtype=torch.float64) * torch.rand(V, 1, generator=g)
            v = 0.95 * v + 0.05 * weight.grad**2
            optimizer.step()
        rows, H = v.mean(1, keepdim=True), hidden[-1].T @ hidden[-1] / N
    damped = H + 0.1 * H.trace() / C * torch.eye(C, dtype=torch.float64)

    def times_P(g):  # (..., V, C); symmetric, so that <P g_val, g_k> = <g_val, P g_k>
        return torch.linalg.solve(damped, (g / (rows + 0.1 * rows.mean())).mT).mT

    def gradient(k):  # of a mean loss, by autograd
        return torch.autograd.grad(F.cross_entropy(hidden[k] @ weight.T, targets[k]), weight)[0]
    alone = torch.stack([gradient(k) for k in range(K)])

    def look_ahead(z):
        learned, learned_0 = torch.softmax(z, 0) * density, (torch.softmax(z_0, 0) * density).sum()
        root = (learned.sum() / learned_0).sqrt()
        ahead = weight - eta * root * times_P(torch.einsum("k,kvc->vc", learned / learned.sum(), alone))
        return F.cross_entropy(hidden[-1] @ ahead.T, targets[-1])
    z_0 = z
    difference = torch.stack([(look_ahead(z + d) - look_ahead(z - d)) / (2 * step)
                              for d in step * torch.eye(K, dtype=torch.float64)]).detach()

    # as main() does, but that the sources' batch has N tokens of each
    alpha, everyone = torch.softmax(z, 0), torch.ones(K, dtype=torch.bool)
    q = 0.75 * alpha + 0.25 / K
    weights = loss_weights(alpha, q, density)
    PG = inverse_curvature(gradient(K), H, weight, optimizer)
    parts = fused_cross_entropy(hidden[:K].flatten(0, 1), weight, targets[:K].flatten(), weights.repeat_interleave(N),
                                K * N, PG, [N * (k + 1) for k in range(K)])[2]
    A = parts * (K * N) / (weights * N)
    if (density != 1).any():
        A = per_drawn_token(A, alpha, density, everyone)
    else:  # for text it has nothing to convert
        torch.testing.assert_close(per_drawn_token(A, alpha, density, everyone), A)
    move = step_of(z, A, everyone, rate) - z
    rms = (alpha * A**2).sum().sqrt()
    torch.testing.assert_close(-eta * alpha * move * rms / rate, difference, rtol=1e-3, atol=1e-12)
    assert abs((alpha * move).sum()) < 1e-14


def projected_by_brute_force(p, lower, upper):
    """
    The mixture of least KL divergence to p within the bounds: of all ways in which sources lie at their lower bound, at
    their upper one, or between them (3^K), the best of those that hold.
    """
    best, found = math.inf, None
    for ways in itertools.product((0, 1, 2), repeat=len(p)):
        ways = np.array(ways)
        a = np.select([ways == 0, ways == 1], [lower, upper], 0.0)
        left = 1 - a.sum()
        if (ways == 2).any():
            a[ways == 2] = p[ways == 2] / p[ways == 2].sum() * left
        elif abs(left) > 1e-12:
            continue
        if (a < lower - 1e-12).any() or (a > upper + 1e-12).any():
            continue
        divergence = (a[a > 0] * np.log(a[a > 0] / p[a > 0])).sum()
        if divergence < best:
            best, found = divergence, a
    return found


@pytest.mark.parametrize("seed", range(40))
def test_bounds_are_a_projection(seed):
    """Lower and upper bounds of some sources, mixtures from even to as uneven as the floor under z lets them be."""
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 7))
    z = rng.normal(size=K) * rng.choice([0.1, 2.0, 6.0])
    inside = rng.dirichlet(np.ones(K))  # bounds around some mixture can be met
    lower = np.where(rng.random(K) < 0.5, inside * rng.random(K), 0.0)
    upper = np.where(rng.random(K) < 0.5, inside + (1 - inside) * rng.random(K) * 0.3, 1.0)
    given = torch.tensor(z)
    within_bounds(given, torch.tensor(lower), torch.tensor(upper))
    alpha, p = torch.softmax(given, 0).numpy(), np.exp(z) / np.exp(z).sum()
    assert (alpha >= lower - 1e-9).all() and (alpha <= upper + 1e-9).all()
    np.testing.assert_allclose(alpha, projected_by_brute_force(p, lower, upper), atol=1e-9)


def test_a_mixture_within_its_bounds_is_left_alone():
    z = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    before = z.clone()
    within_bounds(z, torch.zeros(3), torch.ones(3))
    assert torch.equal(z, before)


def test_absent_source_keeps_its_logit_and_stays_out_of_the_centring():
    present = torch.tensor([True, False, True])
    z, A = torch.tensor([[0.5, 1.0, -0.3], [2.0, math.nan, 1.0]], dtype=torch.float64)
    moved = step_of(z, A, present, 0.1)
    share = torch.softmax(z[[0, 2]], 0)
    mean, rms = (share * A[[0, 2]]).sum(), (share * A[[0, 2]]**2).sum().sqrt()
    torch.testing.assert_close(moved[[0, 2]], z[[0, 2]] + 0.1 * (A[[0, 2]] - mean) / rms)
    assert moved[1] == 1.0 and moved[0] > 0.5 and moved[2] < -0.3
    # whatever number stands for the missing alignment changes nothing
    assert torch.equal(moved, step_of(z, torch.tensor([2.0, -50.0, 1.0], dtype=torch.float64), present, 0.1))
    # nor does what there would be to compare it with where it is alone, or none is there
    for alone in ([False, True, False], [False] * 3):
        assert torch.equal(step_of(z, A.nan_to_num(), torch.tensor(alone), 0.1), z)


def test_absent_source_stays_out_of_the_conversion_to_drawn_tokens():
    present, alpha = torch.tensor([True, False, True]), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    A, density = torch.tensor([[2.0, math.nan, 1.0], [0.5, 0.1, 0.9]], dtype=torch.float64)
    among = per_drawn_token(A[[0, 2]], alpha[[0, 2]], density[[0, 2]], torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(per_drawn_token(A, alpha, density, present)[[0, 2]], among)


def test_equal_alignments_leave_the_mixture_alone():
    z = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(step_of(z, torch.full((5,), 3.0, dtype=torch.float64)), z, atol=1e-12, rtol=0)


def test_mixture_step_is_exponentiated_gradient_in_relative_units():
    """alpha_k goes as alpha_k exp(rate A_k / rms): the minimiser of -rate <alpha, A / rms> + KL(alpha, old)."""
    g = torch.Generator().manual_seed(5)
    z, A = torch.randn(2, 6, generator=g, dtype=torch.float64)
    alpha = torch.softmax(z, 0)
    expected = alpha * torch.exp(0.05 * A / (alpha * A**2).sum().sqrt())
    torch.testing.assert_close(torch.softmax(step_of(z, A), 0), expected / expected.sum())
    torch.testing.assert_close(step_of(z, 1e-6 * A), step_of(z, A))  # their scale does not matter

    new = torch.softmax(step_of(z, A), 0)

    def objective(a):
        return -0.05 * (a * A).sum() / (alpha * A**2).sum().sqrt() + (a * (a / alpha).log()).sum()
    for d in 1e-3 * torch.randn(20, 6, generator=g, dtype=torch.float64):
        assert objective(new) < objective(torch.softmax(new.log() + d, 0))


def test_mixture_step_at_the_edges():
    for A in (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-20]), torch.tensor([-3.0, -1.0, -2.0])):
        z = step_of(torch.zeros(3, dtype=torch.float64), A.double())
        assert z.abs().max() < 0.1 and z.argmax() == A.argmax()
    # no source is lost, however far it fell or is thrown: alpha stays above 1e-8
    for z, rate in (([0.0, -200.0, 1.0], 0.05), ([0.0, 0.0, 0.0], 1e3), ([30.0, 0.0, 30.0], 1e30)):
        z = step_of(torch.tensor(z, dtype=torch.float64), torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64), rate=rate)
        assert z.isfinite().all() and torch.softmax(z, 0).min() > 1e-9
        assert z.min() == z.max() - 18
    # between equals there is nothing to choose, whatever their number: equal moves, and as if they were one
    twice = step_of(torch.tensor([0.3, -0.2, -0.2]), torch.tensor([1.0, 3.0, 3.0]))
    once = step_of(torch.tensor([0.3, -0.2 + math.log(2)]), torch.tensor([1.0, 3.0]))
    assert twice[1] == twice[2]
    torch.testing.assert_close(torch.softmax(twice, 0)[0], torch.softmax(once, 0)[0])
