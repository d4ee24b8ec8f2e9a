"""Sampling, the equivalence of weights and sampling, and the mixture's gradient, against enumeration and differences."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmix import (IGNORE, alignment_scale, batch_loss, draw, entropy_gradient, fused_cross_entropy, gather,
                     head_pass, loss_weights, mixture_gradient, mixture_step)
from model import GPT, GPTConfig


def offsets(q, n):
    """Exact enumeration of the offset: midpoints and lengths of the intervals on which draw() is constant."""
    edges = np.cumsum(q) / np.sum(q)
    breaks = np.unique(np.concatenate([[0.0, 1.0], (edges * n) % 1.0]))
    return list(zip((breaks[1:] + breaks[:-1]) / 2, np.diff(breaks)))


@pytest.mark.parametrize("q", [[0.5, 0.5], [0.7, 0.2, 0.06, 0.04], [1.0, 0.0, 0.0], [1 / 3] * 3, [0.01] * 100])
@pytest.mark.parametrize("n", [1, 8, 33])
def test_systematic_draw_is_unbiased_and_within_one(q, n):
    expected = np.zeros(len(q))
    for offset, length in offsets(q, n):
        count = np.bincount(draw(np.array(q), np.append(offset, np.zeros(n))), minlength=len(q))
        assert (count >= np.floor(np.array(q) * n - 1e-9)).all() and (count <= np.ceil(np.array(q) * n + 1e-9)).all()
        expected += length * count
    np.testing.assert_allclose(expected, np.array(q) / sum(q) * n, atol=1e-9)


def test_draw_at_the_edges():
    u = np.zeros(9)
    u[0] = np.nextafter(1.0, 0.0)
    assert draw(np.array([0.1] * 10), u).max() < 10


class Windows:
    """A source of exactly two windows of length T; every `unlearned`-th target is masked."""

    def __init__(self, seed, T, vocab_size, unlearned=None):
        self.ids = torch.randint(0, vocab_size, (T + 2,), generator=torch.Generator().manual_seed(seed)).numpy()
        self.mask, self.block_size = np.ones(T + 2, dtype=bool), T
        if unlearned:
            self.mask[::unlearned] = False
        self.density = self.windows("train", np.arange(2))[1].ne(IGNORE).double().mean().item()

    def at_fraction(self, split, u):
        return (u * 2).astype(int)

    def windows(self, split, start):
        at = start[:, None] + np.arange(self.block_size + 1)
        return torch.from_numpy(self.ids[at][:, :-1]), torch.from_numpy(np.where(self.mask, self.ids, IGNORE)[at][:, 1:])


@pytest.mark.parametrize("unlearned", [(None, None, None), (None, 2, 3)])
@pytest.mark.parametrize("known", [[0.62, 0.27, 0.11], [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("eps", [0.0, 0.25, 1.0])
def test_expected_gradient_is_the_mixtures(eps, known, unlearned):
    """
    Formula (1) by enumeration of every offset and every window of a batch: E[gradient] = sum_k beta_k g_k, g_k the
    gradient of source k's mean loss over its learned tokens; where all tokens are learned, beta is alpha. The mixture
    that sequences are drawn by may be an old one.
    """
    K, B, T, V = 3, 3, 4, 7
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 1, 1, 4)).double()
    head, params = model.lm_head.weight, list(model.parameters())
    sets = [Windows(k, T, V, unlearned[k]) for k in range(K)]
    alpha = torch.tensor([0.62, 0.27, 0.11], dtype=torch.float64)
    density = torch.tensor([s.density for s in sets], dtype=torch.float64)
    q = (1 - eps) * torch.tensor(known, dtype=torch.float64) + eps / K
    weights = loss_weights(alpha, q, density)
    beta = alpha * density / (alpha * density).sum()
    if eps == 0 and known == alpha.tolist():  # sampling by the mixture: all learned tokens weigh the same
        torch.testing.assert_close(weights, weights[:1].expand(K))

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    exact = 0
    for k in range(K):
        x, y = gather(sets, "train", np.array([k, k]), np.array([0.25, 0.75]))
        loss = F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        exact = exact + beta[k] * flat(loss)
    expected = 0
    for offset, length in offsets(q.numpy(), B):
        for places in itertools.product([0.25, 0.75], repeat=B):
            source = draw(q.numpy(), np.array([offset, *places]))
            x, y = gather(sets, "train", source, np.array(places))
            r = weights[torch.from_numpy(source)]
            expected = expected + length / 2**B * flat(batch_loss(model, head, x, y, r, y.numel())[0])
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize("density", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.6, 0.1, 0.4]])
def test_gradient_on_z_equals_difference_of_the_look_ahead(density):
    """
    Formula (3) against a central difference of L_val(W - eta sqrt(M / M_0) sum_k beta_k(z) g_k) over z, W the head; for
    text M, the learned part of a batch, is 1 and beta is alpha.
    """
    K, N, V, C, eta, step = 4, 30, 11, 5, 1e-5, 1e-4
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, C, generator=g, dtype=torch.float64)
    hidden = torch.randn(K + 1, N, C, generator=g, dtype=torch.float64)  # K sources and, last, the target
    targets = torch.randint(0, V, (K + 1, N), generator=g)
    even = torch.full((N,), 1 / N, dtype=torch.float64)
    G = [head_pass(hidden[k], weight, targets[k], even, grad_weight=True)[3] for k in range(K + 1)]
    A = torch.stack([fused_cross_entropy(hidden[k], weight, targets[k], G_val=G[-1])[2].mean() for k in range(K)])
    z, density = torch.randn(K, generator=g, dtype=torch.float64), torch.tensor(density, dtype=torch.float64)

    def look_ahead(z):
        learned, learned_0 = torch.softmax(z, 0) * density, (torch.softmax(z_0, 0) * density).sum()
        root = (learned.sum() / learned_0).sqrt()
        ahead = weight - eta * root * sum(b * g_k for b, g_k in zip(learned / learned.sum(), G))
        return F.cross_entropy(hidden[-1] @ ahead.T, targets[-1])
    z_0 = z
    difference = torch.stack([(look_ahead(z + d) - look_ahead(z - d)) / (2 * step)
                              for d in step * torch.eye(K, dtype=torch.float64)])
    got = mixture_gradient(torch.softmax(z, 0), A, torch.ones(K, dtype=torch.bool), eta, density)
    torch.testing.assert_close(got, difference, rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(got.sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)


def test_entropy_term_is_its_gradient_and_raises_entropy():
    z = torch.tensor([1.5, 0.2, -0.7], dtype=torch.float64, requires_grad=True)
    alpha = torch.softmax(z, 0)
    lam, everyone = 0.3, torch.ones(3, dtype=torch.bool)
    (expected,) = torch.autograd.grad(lam * (alpha * alpha.log()).sum(), z)
    got = lam * entropy_gradient(alpha.detach(), everyone)
    torch.testing.assert_close(got, expected)

    def entropy(z):
        return -(torch.softmax(z, 0) * torch.log_softmax(z, 0)).sum()
    assert entropy(z.detach() - 0.1 * got) > entropy(z.detach())  # a descent step flattens the mixture


def test_absent_source_keeps_its_logit_and_stays_out_of_the_centring():
    present = torch.tensor([True, False, True])
    alpha = torch.softmax(torch.tensor([0.5, 1.0, -0.3]), 0)
    gradient = mixture_gradient(alpha, torch.tensor([2.0, 0.0, 1.0]), present)
    share = alpha[[0, 2]] / alpha[[0, 2]].sum()
    centred = torch.tensor([2.0, 1.0]) - (share * torch.tensor([2.0, 1.0])).sum()
    torch.testing.assert_close(gradient[[0, 2]], -alpha[[0, 2]] * centred)
    assert gradient[1] == 0
    # whatever number stands for the missing alignment changes nothing
    torch.testing.assert_close(gradient, mixture_gradient(alpha, torch.tensor([2.0, -50.0, 1.0]), present))

    z = torch.tensor([0.5, 1.0, -0.3])
    mixture_step(z, gradient + 7.0 * (~present), alpha, present, 0.1)
    assert z[1] == 1.0 and z[0] > 0.5 and z[2] < -0.3
    weights = torch.tensor([0.2, 0.5, 0.3])
    expected = ((0.2 * 2.0**2 + 0.3 * 1.0**2) / 0.5) ** 0.5
    assert alignment_scale(weights, torch.tensor([2.0, -50.0, 1.0]), present).item() == pytest.approx(expected)


def test_equal_alignments_leave_the_mixture_alone():
    alpha = torch.softmax(torch.randn(5, dtype=torch.float64), 0)
    gradient = mixture_gradient(alpha, torch.full((5,), 3.0, dtype=torch.float64), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(gradient, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def relative_step(z, A, density=1.0, learning_rate=0.05):
    """The outer step's second half, as main() takes it, with all sources present."""
    alpha, present = torch.softmax(z, 0), torch.ones(len(z), dtype=torch.bool)
    eta = 1 / alignment_scale(alpha * density, A, present)
    z = z.clone()
    mixture_step(z, mixture_gradient(alpha, A, present, eta, density), alpha, present, learning_rate)
    return z


def test_mixture_step_is_exponentiated_gradient_in_relative_units():
    """alpha_k goes as alpha_k exp(rate A_k / rms): the minimiser of -rate <alpha, A / rms> + KL(alpha, old)."""
    g = torch.Generator().manual_seed(5)
    z, A = torch.randn(2, 6, generator=g, dtype=torch.float64)
    alpha = torch.softmax(z, 0)
    expected = alpha * torch.exp(0.05 * A / (alpha * A**2).sum().sqrt())
    torch.testing.assert_close(torch.softmax(relative_step(z, A), 0), expected / expected.sum())
    torch.testing.assert_close(relative_step(z, 1e-6 * A), relative_step(z, A))  # their scale does not matter

    new = torch.softmax(relative_step(z, A), 0)

    def objective(a):
        return -0.05 * (a * A).sum() / (alpha * A**2).sum().sqrt() + (a * (a / alpha).log()).sum()
    for d in 1e-3 * torch.randn(20, 6, generator=g, dtype=torch.float64):
        assert objective(new) < objective(torch.softmax(new.log() + d, 0))


def test_mixture_step_at_the_edges():
    for A in (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-20]), torch.tensor([-3.0, -1.0, -2.0])):
        z = relative_step(torch.zeros(3), A)
        assert z.abs().max() < 0.1 and z.argmax() == A.argmax()
    lost = relative_step(torch.tensor([0.0, -200.0]), torch.tensor([1.0, 2.0]))  # alpha is 0 in float32
    assert lost.isfinite().all()
    # between equals there is nothing to choose, whatever their number: equal moves, and as if they were one
    twice = relative_step(torch.tensor([0.3, -0.2, -0.2]), torch.tensor([1.0, 3.0, 3.0]))
    once = relative_step(torch.tensor([0.3, -0.2 + math.log(2)]), torch.tensor([1.0, 3.0]))
    assert twice[1] == twice[2]
    torch.testing.assert_close(torch.softmax(twice, 0)[0], torch.softmax(once, 0)[0])
