"""
(1) and (3) of fastmix.py: draws, weights, the mixture's step and its bounds, against enumeration,
differences, and the derivative of the outer problem by autograd.
"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix
from fastmix import (DAMPING, IGNORE, batch_loss, draw, draw_batch, fused_cross_entropy, gather,
                     inverse_curvature, mixture_step, search_bounds, source_weights,
                     target_gradient, within_bounds)
from model import GPT, GPTConfig


# ---- (1) draws ---------------------------------------------------------------------------------

def offsets(q, n):
    """
    All that draw() can do for a fixed order of the sources: between neighbouring breaks every
    offset gives the same sequences. Returns a midpoint and the length of each such interval.
    """
    edges = np.cumsum(q) / np.sum(q)
    breaks = np.unique(np.concatenate([[0.0, 1.0], (edges * n) % 1.0]))
    return list(zip((breaks[1:] + breaks[:-1]) / 2, np.diff(breaks)))


def orders(K):
    """Every order of K sources or, where those are too many, five."""
    if K < 5:
        return [np.array(order) for order in itertools.permutations(range(K))]
    rng = np.random.default_rng(0)
    return [rng.permutation(K) for _ in range(5)]


SHARES = [[0.5, 0.5], [0.7, 0.2, 0.06, 0.04], [1.0, 0.0, 0.0], [1 / 3] * 3, [0.01] * 100]


@pytest.mark.parametrize("q", SHARES)
@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_systematic_draw_is_unbiased_and_within_one(q, n):
    q = np.array(q)
    for order in orders(len(q)):
        expected = np.zeros(len(q))
        for offset, length in offsets(q[order], n):
            source = draw(q, n, offset, order)
            count = np.bincount(source, minlength=len(q))
            assert len(source) == n
            assert (np.diff(source) >= 0).all()
            assert (count >= np.floor(q * n - 1e-9)).all()
            assert (count <= np.ceil(q * n + 1e-9)).all()
            expected += length * count
        np.testing.assert_allclose(expected, q / q.sum() * n, atol=1e-9)


def test_draw_at_the_edges():
    last_offset = np.nextafter(1.0, 0.0)
    for order in orders(10):
        for q in ([0.1] * 10, [0.7] * 10):  # sums that rounding keeps off a whole number
            source = draw(np.array(q), 8, last_offset, order)
            assert source.min() >= 0
            assert source.max() < 10
    # no share, no sequence
    assert draw(np.array([0.0, 1.0, 0.0]), 4, 0.0, np.arange(3)).tolist() == [1] * 4


def test_every_pair_of_sources_meets():
    """2 sequences of 4 sources: each pair as often as any other, no source with itself."""
    q = np.full(4, 0.25)
    together = np.zeros((4, 4))
    for order in orders(4):
        for offset, length in offsets(q, 2):
            a, b = draw(q, 2, offset, order)
            together[a, b] += length / math.factorial(4)
    np.testing.assert_allclose(together, np.triu(np.full((4, 4), 1 / 6), 1), atol=1e-12)


@pytest.mark.parametrize("q", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
def test_every_pair_of_sources_meets_in_what_a_run_draws(q):
    sets = [Windows(k, 4, 7) for k in range(4)]
    pairs = set()
    for step in range(300):
        rng = np.random.default_rng((0, step, 0))
        source, _, _ = draw_batch(sets, "train", q, 2, rng)
        pairs.add(tuple(source.tolist()))
    assert set(itertools.combinations(range(4), 2)) <= pairs


class Windows:
    """A TokenSet of exactly two windows of length T; every `unlearned`-th token is masked."""

    def __init__(self, seed, T, vocab_size, unlearned=None):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocab_size, (T + 2,), generator=g).numpy()
        self.mask = np.ones(T + 2, dtype=bool)
        self.block_size = T
        if unlearned:
            self.mask[::unlearned] = False

    def density(self, split):
        _, y = self.windows(split, np.arange(2))
        return (y != IGNORE).mean()

    def at_fraction(self, split, u):
        return (u * 2).astype(int)

    def windows(self, split, start):
        at = start[:, None] + np.arange(self.block_size + 1)
        x = self.ids[at][:, :-1]
        y = np.where(self.mask, self.ids, IGNORE)[at][:, 1:]
        return x, y


def mean_loss(model, sets, k):
    """Of source k over all its learned tokens, in both windows."""
    x, y = gather(sets, "train", np.array([k, k]), np.array([0.25, 0.75]))
    logits = model(torch.from_numpy(x)) @ model.lm_head.weight.T
    y = torch.from_numpy(y)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE)


def draws(sets, q, n):
    """Every draw of n sequences that draw_batch() can make: (probability, sources (n,), x, y)."""
    for order in orders(len(q)):
        for offset, length in offsets(np.asarray(q)[order], n):
            for places in itertools.product([0.25, 0.75], repeat=n):

                def random(size=None):
                    return offset if size is None else np.array(places)

                rng = SimpleNamespace(permutation=lambda K: order, random=random)
                source, x, y = draw_batch(sets, "train", q, n, rng)
                yield length / 2**n / math.factorial(len(q)), source, x, y


def flat_gradient(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("unlearned", [(None, None, None), (None, 2, 3)])
@pytest.mark.parametrize("drawn_by", [[0.62, 0.27, 0.11], [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("eps", [0.0, 0.25, 1.0])
def test_expected_gradient_is_the_mixtures(eps, drawn_by, unlearned):
    """
    Formula (1), by enumeration of every order, offset and window of a batch: the expected gradient
    is sum_k beta_k g_k, where g_k is the gradient of source k's mean loss over its learned tokens
    and beta_k its share of the learned tokens. q may come from another mixture than alpha.
    """
    K, B, T, V = 3, 3, 4, 7
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 1, 1, 4)).double()
    sets = [Windows(k, T, V, unlearned[k]) for k in range(K)]
    alpha = torch.tensor([0.62, 0.27, 0.11], dtype=torch.float64)
    density = torch.tensor([s.density("train") for s in sets], dtype=torch.float64)
    q = (1 - eps) * torch.tensor(drawn_by, dtype=torch.float64) + eps / K
    r = source_weights(alpha, q, density)
    beta = alpha * density / (alpha * density).sum()
    if unlearned == (None, None, None):  # the formulas of the paper
        torch.testing.assert_close(beta, alpha)
        torch.testing.assert_close(r, alpha / q)
    if eps == 0 and drawn_by == alpha.tolist():  # drawn by the mixture: all tokens weigh the same
        torch.testing.assert_close(r, r[:1].expand(K))

    exact = 0
    for k in range(K):
        exact = exact + beta[k] * flat_gradient(mean_loss(model, sets, k), model)
    expected_loss = 0  # the gradient is linear in the loss
    for probability, source, x, y in draws(sets, q, B):
        loss, _, _ = batch_loss(model, model.lm_head.weight, x, y, r[source], y.numel())
        expected_loss = expected_loss + probability * loss
    torch.testing.assert_close(flat_gradient(expected_loss, model), exact)


@pytest.mark.parametrize("unlearned", [(None, None), (None, 2), (3, 1)])
def test_each_target_counts_equally_however_dense_its_mask(unlearned):
    """By enumeration: the target's expected gradient, as main() takes it, is the targets' mean."""
    T, V, n = 5, 7, 2
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 1, 1, 4)).double()
    head = model.lm_head.weight
    targets = [Windows(k, T, V, unlearned[k]) for k in range(2)]
    if unlearned == (3, 1):
        targets[1].mask[3] = True  # one learned token in all
    exact = 0
    for k in range(2):
        (grad,) = torch.autograd.grad(mean_loss(model, targets, k), head)
        exact = exact + grad / 2
    density = torch.tensor([t.density("val") for t in targets], dtype=torch.float64)
    expected = 0
    for probability, target, x, y in draws(targets, [0.5, 0.5], n):
        G, _ = target_gradient(model, head, x, y, 1 / density[target], n * T)
        expected = expected + probability * G
    torch.testing.assert_close(expected, exact)


def test_processes_share_a_batch(monkeypatch):
    """Together they draw what one process draws, each of two every second sequence."""
    sets = [Windows(k, 4, 7) for k in range(3)]
    q = [0.5, 0.3, 0.2]
    source, x, y = draw_batch(sets, "train", q, 7, np.random.default_rng(1))
    assert source.tolist() == sorted(source.tolist())
    for rank in range(2):
        monkeypatch.setattr(fastmix, "ranks", lambda: (rank, 2))
        part = draw_batch(sets, "train", q, 7, np.random.default_rng(1))
        for got, whole in zip(part, (source, x, y)):
            assert torch.equal(got, whole[rank::2])


# ---- (3) the mixture's step --------------------------------------------------------------------

def move(z, A, present=None, density=None, rate=0.05, scale=None, n_before=0):
    """By how much mixture_step() moves z (K,). The first step's scale is its own rms."""
    if present is None:
        present = torch.ones(len(z), dtype=torch.bool)
    if density is None:
        density = torch.ones(len(z), dtype=torch.float64)
    if scale is None:
        scale = torch.zeros((), dtype=torch.float64)
    moved = z.clone()
    mixture_step(moved, scale, A, present, density, rate, n_before)
    return moved - z


class RidgeRegression:
    """
    The two nested problems, small enough to be solved exactly. Four sources and a target are sets
    of 12 tokens with features x_t and a value y_t to predict; a mask says which are learned. The
    training loss is that of tokens drawn by alpha, divided by the share of them that is learned,
    and weight decay. It keeps w* away from where the sources' gradients cancel.
    """

    K, N, D = 4, 12, 3  # sources, tokens in each, features
    decay = 0.7

    def __init__(self, n_learned):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.K + 1, self.N, self.D, dtype=torch.float64, generator=g)
        self.y = torch.randn(self.K + 1, self.N, dtype=torch.float64, generator=g)
        self.mask = torch.zeros(self.K + 1, self.N, dtype=torch.float64)  # the last is the target
        for k, n in enumerate((*n_learned, self.N)):
            self.mask[k, :n] = 1
        self.density = self.mask[:-1].mean(1)  # (K,)

    def loss(self, w, k):
        """The mean loss of source k's learned tokens."""
        token_loss = (self.x[k] @ w - self.y[k])**2 / 2
        return (self.mask[k] * token_loss).sum() / self.mask[k].sum()

    def train_loss(self, w, alpha):
        learned_loss = 0
        learned = 0
        for k in range(self.K):
            token_loss = (self.x[k] @ w - self.y[k])**2 / 2
            learned_loss = learned_loss + alpha[k] * (self.mask[k] * token_loss).mean()
            learned = learned + alpha[k] * self.mask[k].mean()
        return learned_loss / learned + self.decay / 2 * (w**2).sum()

    def optimum(self, alpha):
        """w*(alpha): the training loss is quadratic, so one Newton step from 0 is enough."""
        w = torch.zeros(self.D, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(self.train_loss(w, alpha), w, create_graph=True)
        return -torch.linalg.solve(self.curvature(alpha, create_graph=True), g)

    def curvature(self, alpha, create_graph=False):
        w = torch.zeros(self.D, dtype=torch.float64)
        return torch.autograd.functional.hessian(lambda w: self.train_loss(w, alpha), w,
                                                 create_graph=create_graph)

    def target_loss(self, alpha):
        return self.loss(self.optimum(alpha), self.K)

    def alignments(self, alpha):
        """Formula (2): A_k = <C^-1 g_val, g_k>, with the gradients at w*."""
        w = self.optimum(alpha).detach().requires_grad_()
        gradients = []
        for k in range(self.K + 1):
            gradients.append(torch.autograd.grad(self.loss(w, k), w)[0])
        PG = torch.linalg.solve(self.curvature(alpha), gradients.pop())
        return torch.stack(gradients) @ PG


@pytest.mark.parametrize("n_learned", [(12, 12, 12, 12), (12, 7, 1, 5)])
def test_step_is_down_the_derivative_of_the_outer_problem(n_learned):
    """
    dL_val(w*(alpha)) / dalpha by autograd, through the exact solution of the inner problem. The
    step on z is against it, in units of the rms of the alignments over the learned tokens.
    """
    problem = RidgeRegression(n_learned)
    z = torch.tensor([0.3, -0.5, 0.1, 0.8], dtype=torch.float64)
    alpha = torch.softmax(z, 0).requires_grad_()
    (derivative,) = torch.autograd.grad(problem.target_loss(alpha), alpha)
    alpha = alpha.detach()

    # the docstring's formula
    A = problem.alignments(alpha)
    M = (alpha * problem.density).sum()
    beta = alpha * problem.density / M
    mean = (beta * A).sum()
    assert abs(mean) > 0.05 * A.abs().max()  # so that the mean's part in it is tested
    torch.testing.assert_close(-problem.density / M * (A - mean), derivative, rtol=1e-8, atol=1e-10)
    # the step
    rms = (beta * A**2).sum().sqrt()
    step = move(z, A, density=problem.density, rate=0.05)
    torch.testing.assert_close(step, -0.05 * derivative / rms, rtol=1e-8, atol=1e-10)
    # the gradient over z has a factor alpha_k more, and the step is a descent along it, too
    z.requires_grad_()
    (over_z,) = torch.autograd.grad(problem.target_loss(torch.softmax(z, 0)), z)
    torch.testing.assert_close(step * alpha, -0.05 * over_z / rms, rtol=1e-8, atol=1e-10)


def test_small_steps_lower_the_outer_loss():
    """Down the derivative by autograd: 200 steps of the mixture, each at the inner optimum."""
    problem = RidgeRegression((12, 7, 1, 5))
    z = torch.zeros(4, dtype=torch.float64)
    losses = []
    for _ in range(200):
        alpha = torch.softmax(z, 0)
        losses.append(problem.target_loss(alpha).item())
        z += move(z, problem.alignments(alpha), density=problem.density, rate=0.01)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("units", ["gradient", "curvature"])
@pytest.mark.parametrize("density", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.6, 0.1, 0.4]])
def test_move_equals_difference_of_the_look_ahead(density, units):
    """
    Formulas (1) to (3) in a row, from the weights of tokens to the move of z, against a central
    difference over z of L_val(W - eta P sum_k beta_k(z) g_k), where W is the head. The step goes
    along alpha and is in units of the rms: both are taken out again.
    """
    K, N, V, C = 4, 30, 11, 5
    eta = 1e-5
    rate = 0.05
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, C, generator=g, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(K + 1, N, C, generator=g, dtype=torch.float64)  # the last is the target's
    targets = torch.randint(0, V, (K + 1, N), generator=g)
    z = torch.randn(K, generator=g, dtype=torch.float64)
    density = torch.tensor(density, dtype=torch.float64)
    v = torch.ones(V, C, dtype=torch.float64)
    S = torch.eye(C, dtype=torch.float64)
    if units == "curvature":
        v = torch.rand(V, C, generator=g, dtype=torch.float64)**2
        S = hidden[-1].T @ hidden[-1] / N

    def gradient(k):
        loss = F.cross_entropy(hidden[k] @ weight.T, targets[k])
        return torch.autograd.grad(loss, weight)[0]

    rows = v.mean(1, keepdim=True)
    rows = rows + DAMPING * rows.mean()
    columns = S + DAMPING * S.trace() / C * torch.eye(C, dtype=torch.float64)
    # P g_k; P is symmetric, so that <P g_val, g_k> = <g_val, P g_k>
    steps = torch.stack([torch.linalg.solve(columns, (gradient(k) / rows).T).T for k in range(K)])

    def look_ahead(z):
        beta = torch.softmax(z, 0) * density
        beta = beta / beta.sum()
        ahead = weight - eta * torch.einsum("k,kvc->vc", beta, steps)
        return F.cross_entropy(hidden[-1] @ ahead.T, targets[-1]).item()

    difference = torch.zeros(K, dtype=torch.float64)
    for k in range(K):
        d = torch.zeros(K, dtype=torch.float64)
        d[k] = 1e-4
        difference[k] = (look_ahead(z + d) - look_ahead(z - d)) / 2e-4

    # as main() does, but that the batch has N tokens of each source
    alpha = torch.softmax(z, 0)
    r = source_weights(alpha, 0.75 * alpha + 0.25 / K, density)
    PG = inverse_curvature(gradient(K), S, v)
    coef = r.repeat_interleave(N) / (K * N)
    ends = [N, 2 * N, 3 * N, 4 * N]
    _, _, parts = fused_cross_entropy(hidden[:K].flatten(0, 1), weight, targets[:K].flatten(), coef,
                                      PG, ends)
    A = parts * (K * N) / (r * N)
    step = move(z, A, density=density, rate=rate)
    beta = alpha * density / (alpha * density).sum()
    rms = (beta * A**2).sum().sqrt()
    torch.testing.assert_close(-eta * alpha * step * rms / rate, difference, rtol=1e-3, atol=1e-12)
    assert abs((alpha * step).sum()) < 1e-14


def test_absent_source_keeps_its_logit_and_stays_out_of_the_mean():
    """The others move as if there were no such source, whatever number stands for its alignment."""
    z = torch.tensor([0.5, 1.0, -0.3], dtype=torch.float64)
    density = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    present = torch.tensor([True, False, True])
    among = move(z[[0, 2]], torch.tensor([2.0, 1.0], dtype=torch.float64),
                 density=density[[0, 2]], rate=0.1)
    assert among[0] > 0 > among[1]
    for missing in (math.nan, -50.0):
        A = torch.tensor([2.0, missing, 1.0], dtype=torch.float64)
        moved = move(z, A, present, density, 0.1)
        torch.testing.assert_close(moved[[0, 2]], among)
        assert moved[1] == 0


@pytest.mark.parametrize("present", [[False, True, False], [False, False, False]])
def test_a_source_alone_has_nothing_to_be_compared_with(present):
    z = torch.tensor([0.5, 1.0, -0.3], dtype=torch.float64)
    A = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)
    density = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    assert not move(z, A, torch.tensor(present), density).any()


def test_equal_alignments_leave_the_mixture_alone():
    z = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = torch.full((5,), 3.0, dtype=torch.float64)
    density = torch.tensor([1.0, 0.3, 0.2, 0.7, 0.9], dtype=torch.float64)
    assert move(z, A).abs().max() < 1e-12
    assert move(z, A, density=density).abs().max() < 1e-12


@pytest.mark.parametrize("value", [0.01, 0.3])
def test_equal_densities_are_as_none(value):
    g = torch.Generator().manual_seed(1)
    z, A = torch.randn(2, 6, dtype=torch.float64, generator=g)
    density = torch.full((6,), value, dtype=torch.float64)
    torch.testing.assert_close(move(z, A, density=density), move(z, A))


def test_mixture_step_is_exponentiated_gradient_in_relative_units():
    """
    Without masks alpha_k becomes proportional to alpha_k exp(rate A_k / rms), which is where
    -rate <alpha, A> / rms + KL(alpha, old alpha) is least.
    """
    g = torch.Generator().manual_seed(5)
    z, A = torch.randn(2, 6, generator=g, dtype=torch.float64)
    old = torch.softmax(z, 0)
    rms = (old * A**2).sum().sqrt()
    expected = old * torch.exp(0.05 * A / rms)
    new = torch.softmax(z + move(z, A), 0)
    torch.testing.assert_close(new, expected / expected.sum())
    torch.testing.assert_close(move(z, 1e-6 * A), move(z, A))  # the scale of A does not matter

    def objective(alpha):
        return -0.05 * (alpha * A).sum() / rms + (alpha * (alpha / old).log()).sum()

    for d in 1e-3 * torch.randn(20, 6, generator=g, dtype=torch.float64):
        assert objective(new) < objective(torch.softmax(new.log() + d, 0))


def test_the_scale_is_a_running_mean_of_the_rms():
    """The mean of all steps so far up to the 50th, and from there a running mean of decay 0.98."""
    g = torch.Generator().manual_seed(2)
    z = torch.randn(4, dtype=torch.float64, generator=g)
    alpha = torch.softmax(z, 0)
    scale = torch.zeros((), dtype=torch.float64)
    all_rms = []
    for n in range(120):
        A = torch.randn(4, dtype=torch.float64, generator=g) ** 3
        all_rms.append((alpha * A**2).sum().sqrt().item())
        moved = move(z, A, scale=scale, n_before=n)
        if n < 50:
            expected = np.mean(all_rms)
        else:
            expected = 0.98 * expected + 0.02 * all_rms[-1]
        assert scale.item() == pytest.approx(expected)
        torch.testing.assert_close(moved, 0.05 * (A - (alpha * A).sum()) / expected)


def test_rare_large_alignments_count_for_what_they_are():
    """
    Source 0 has an alignment of 1 at each step, source 1 one of 20 at each tenth step and else 0.
    So source 1 helps twice as much, and its logit has to rise over the other's. Divided by the rms
    of the step itself, as it once was, it fell.
    """
    z = torch.zeros(2, dtype=torch.float64)
    scale = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    by_own_rms = torch.zeros(2, dtype=torch.float64)
    for n in range(400):
        A = torch.tensor([1.0, 20.0 if n % 10 == 9 else 0.0], dtype=torch.float64)
        moved = move(z, A, scale=scale, n_before=n)
        by_own_rms += move(z, A)
        if n >= 100:
            total += moved
    # Over 300 steps the alignments differ by 1 on average; the rms is 14.2 in each tenth step. A
    # fiftieth of that is in the scale of the step itself, which therefore counts a little less.
    mean_rms = (9 * math.sqrt(0.5) + math.sqrt(200.5)) / 10
    assert total[1] - total[0] == pytest.approx(0.05 * 300 / mean_rms, rel=0.15)
    assert by_own_rms[1] < by_own_rms[0]


def test_mixture_step_at_the_edges():
    for A in ([0.0, 0.0, 0.0], [0.0, 0.0, 1e-20], [-3.0, -1.0, -2.0]):
        A = torch.tensor(A, dtype=torch.float64)
        z = move(torch.zeros(3, dtype=torch.float64), A)
        assert z.abs().max() < 0.1
        assert z.argmax() == A.argmax()
    # between equals there is nothing to choose: equal moves, and as if they were one source
    z = torch.tensor([0.3, -0.2, -0.2], dtype=torch.float64)
    twice = z + move(z, torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64))
    z = torch.tensor([0.3, -0.2 + math.log(2)], dtype=torch.float64)
    once = z + move(z, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert twice[1] == twice[2]
    torch.testing.assert_close(torch.softmax(twice, 0)[0], torch.softmax(once, 0)[0])


@pytest.mark.parametrize("z, rate", [([0.0, -200.0, 1.0], 0.05), ([0.0, 0.0, 0.0], 1e3),
                                     ([30.0, 0.0, 30.0], 1e30)])
def test_no_source_is_lost(z, rate):
    """However far it fell, or is thrown: its share stays above 1e-8 of the largest."""
    z = torch.tensor(z, dtype=torch.float64)
    A = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    scale = torch.zeros((), dtype=torch.float64)
    density = torch.ones(3, dtype=torch.float64)
    mixture_step(z, scale, A, torch.ones(3, dtype=torch.bool), density, rate, 0)
    assert z.isfinite().all()
    assert torch.softmax(z, 0).min() > 1e-9
    assert z.min() == z.max() - 18


# ---- bounds ------------------------------------------------------------------------------------

def projected_by_brute_force(p, lower, upper):
    """
    The mixture of least KL divergence to p within the bounds. Each source lies at its lower bound,
    at its upper one or between them: of these 3^K ways, the best of those that are possible.
    """
    least = math.inf
    best = None
    for way in itertools.product(("lower", "upper", "between"), repeat=len(p)):
        way = np.array(way)
        between = way == "between"
        a = np.select([way == "lower", way == "upper"], [lower, upper], 0.0)
        left = 1 - a.sum()
        if between.any():
            a[between] = p[between] / p[between].sum() * left
        elif abs(left) > 1e-12:
            continue
        if (a < lower - 1e-12).any() or (a > upper + 1e-12).any():
            continue
        some = a > 0
        divergence = (a[some] * np.log(a[some] / p[some])).sum()
        if divergence < least:
            least = divergence
            best = a
    return best


@pytest.mark.parametrize("seed", range(40))
def test_bounds_are_a_projection(seed):
    """Of mixtures from even to as uneven as the floor under z lets them be; some have no bound."""
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 7))
    z = rng.normal(size=K) * rng.choice([0.1, 2.0, 6.0])
    inside = rng.dirichlet(np.ones(K))  # bounds around some mixture can be met
    lower = np.where(rng.random(K) < 0.5, inside * rng.random(K), 0.0)
    above = inside + (1 - inside) * rng.random(K) * 0.3
    upper = np.where(rng.random(K) < 0.5, above, 1.0)
    given = torch.tensor(z)
    within_bounds(given, torch.tensor(lower), torch.tensor(upper))
    alpha = torch.softmax(given, 0).numpy()
    p = np.exp(z) / np.exp(z).sum()
    assert (alpha >= lower - 1e-9).all()
    assert (alpha <= upper + 1e-9).all()
    np.testing.assert_allclose(alpha, projected_by_brute_force(p, lower, upper), atol=1e-9)


def test_a_mixture_within_its_bounds_is_left_alone():
    z = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    before = z.clone()
    within_bounds(z, torch.zeros(3), torch.ones(3))
    assert torch.equal(z, before)


def test_bounds_of_a_search_are_a_mixture_that_within_bounds_reaches():
    """--bounds and the epochs of the real run give (K,) tensors that within_bounds() takes."""
    args = SimpleNamespace(bounds="b=0.2:0.5,c=0.1:", max_epochs=2.0, train_tokens=1000.0)
    available = torch.tensor([200, 300, 4000])
    lower, upper = search_bounds(args, ["a", "b", "c"], available)
    assert lower.tolist() == [0.0, 0.2, 0.1]
    assert upper.tolist() == [0.4, 0.5, 1.0]
    z = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
    within_bounds(z, lower, upper)
    torch.testing.assert_close(torch.softmax(z, 0), torch.tensor([0.4, 0.3, 0.3]).double())
