"""
Formulas (1) to (3): draws, weights, the curvature and the mixture's step, against enumeration,
explicit inverses, and the derivative of the outer problem by finite differences.
"""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmix import (BOUND, DAMPING, draw, fused_cross_entropy, inverse_curvature, mixture_step,
                     target_gradient)
from prepare_data import IGNORE


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- (1) draws -----------------------------------------------------------------------------------

def draws(q, n):
    """
    All that draw() can do, (probability, sources (n,)): every order of the sources and, for each,
    one offset of every interval within which all offsets draw the same.
    """
    orders = list(itertools.permutations(range(len(q))))
    for order in map(np.array, orders):
        edges = np.cumsum(q[order]) * n
        breaks = np.unique([0.0, 1.0, *(edges % 1.0)])
        for start, end in itertools.pairwise(breaks):
            yield (end - start) / len(orders), draw(q, n, (start + end) / 2, order)


@pytest.mark.parametrize("q", [[0.5, 0.5], [0.7, 0.2, 0.06, 0.04], [1, 0, 0], [1 / 3] * 3])
@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_draws_are_unbiased_and_within_one(q, n):
    q = np.array(q, dtype=float)
    mean = 0
    for probability, source in draws(q, n):
        count = np.bincount(source, minlength=len(q))
        assert count.sum() == n
        assert (np.abs(count - n * q) < 1).all()
        mean = mean + probability * count
    np.testing.assert_allclose(mean, n * q, atol=1e-12)


def test_the_last_point_falls_to_a_source_with_a_share():
    """At the last offset there is, which rounding makes 1."""
    for q in (np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.1, 0.9])):
        source = draw(q, 8, np.nextafter(1.0, 0.0), np.arange(3))
        assert (q[source] > 0).all()


def test_every_pair_of_sources_meets():
    """Two sequences of four sources: each pair is drawn as often as any other."""
    together = np.zeros((4, 4))
    for probability, source in draws(np.full(4, 0.25), 2):
        a, b = sorted(source)
        together[a, b] += probability
    np.testing.assert_allclose(together, np.triu(np.full((4, 4), 1 / 6), 1), atol=1e-12)


# ---- (1) weights ---------------------------------------------------------------------------------

K = 3  # each source or target is one sequence of T tokens, drawn again and again
T = 6
C = 4
V = 7
WHOLE = (6, 6, 6)  # how many of their tokens are learned
MASKED = (6, 3, 1)


def sequences(n_learned):
    """Hidden states (K, T, C), labels (K, T), a head (V, C), and the density (K,)."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, T, C, dtype=torch.float64, generator=g)
    labels = torch.randint(0, V, (K, T), generator=g)
    for k in range(K):
        labels[k, n_learned[k]:] = IGNORE
    head = torch.randn(V, C, dtype=torch.float64, generator=g, requires_grad=True)
    return hidden, labels, head, (labels != IGNORE).double().mean(1)


def mean_gradient(hidden, labels, head):
    """Of the mean loss of one sequence's learned tokens, at the head."""
    loss = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE)
    return torch.autograd.grad(loss, head)[0]


@pytest.mark.parametrize("n_learned", [WHOLE, MASKED])
@pytest.mark.parametrize("eps", [0.0, 0.25, 1.0])
def test_expected_gradient_is_the_mixtures(eps, n_learned):
    """
    Over all draws of a batch by q, with the weights r, it is sum_k beta_k g_k, where g_k is the
    gradient of source k's mean loss per learned token. Without masks beta is alpha.
    """
    B = 4
    hidden, labels, head, density = sequences(n_learned)
    alpha = vector(0.62, 0.27, 0.11)
    beta = alpha * density / (alpha * density).sum()
    exact = 0
    for k in range(K):
        exact = exact + beta[k] * mean_gradient(hidden[k], labels[k], head)

    q = (1 - eps) * alpha + eps / K
    r = alpha / (q * (alpha * density).sum())
    expected_loss = 0
    for probability, source in draws(q.numpy(), B):
        loss, _, _ = fused_cross_entropy(hidden[source], head, labels[source],
                                         r[source] / (B * T), None)
        expected_loss = expected_loss + probability * loss
    torch.testing.assert_close(torch.autograd.grad(expected_loss, head)[0], exact)
    if n_learned == WHOLE:
        assert torch.equal(beta, alpha)


def test_a_target_counts_by_its_weight_however_dense_its_mask():
    """Over all draws of target batches g_val is sum_k weight_k g_k, and s_val the same of h h^T."""
    B = 2
    hidden, labels, head, density = sequences(MASKED)
    target_weights = vector(0.5, 0.2, 0.3)
    exact_g = 0
    exact_s = 0
    for k in range(K):
        exact_g = exact_g + target_weights[k] * mean_gradient(hidden[k], labels[k], head)
        h = hidden[k][labels[k] != IGNORE]
        exact_s = exact_s + target_weights[k] * h.T @ h / len(h)

    expected_g = 0
    expected_s = 0
    for probability, target in draws(target_weights.numpy(), B):
        g_val, s_val = target_gradient(lambda x: hidden[x], head, torch.from_numpy(target),
                                       labels[target], 1 / density[target] / (B * T))
        expected_g = expected_g + probability * g_val
        expected_s = expected_s + probability * s_val
    torch.testing.assert_close(expected_g, exact_g)
    torch.testing.assert_close(expected_s, exact_s)


# ---- (2) the curvature ---------------------------------------------------------------------------

def test_curvature_is_an_inverse_kronecker_product():
    """The curvature over all V C weights of the head is one matrix; P G is its inverse times G."""
    g = torch.Generator().manual_seed(0)
    G = torch.randn(V, C, dtype=torch.float64, generator=g)
    v = torch.rand(V, C, dtype=torch.float64, generator=g)
    v[3] = 0  # a token that has not turned up yet
    h = torch.randn(9, C, dtype=torch.float64, generator=g)
    S = h.T @ h
    outputs = torch.diag(v.mean(1) + DAMPING * v.mean())
    inputs = S + DAMPING * S.trace() / C * torch.eye(C, dtype=torch.float64)
    curvature = torch.kron(outputs, inputs)  # (V C, V C)
    expected = (torch.linalg.inv(curvature) @ G.flatten()).view(V, C)
    torch.testing.assert_close(inverse_curvature(G, S, v), expected)


# ---- (3) the mixture's step ----------------------------------------------------------------------

def step(z, A, present=None, density=None, rate=0.2, scale=None, n_before=0):
    """By how much mixture_step() moves z (K,). The first step's scale is its own rms."""
    if present is None:
        present = torch.ones(len(z), dtype=torch.bool)
    if density is None:
        density = torch.ones(len(z), dtype=torch.float64)
    if scale is None:
        scale = vector(0)[0]
    moved = z.clone()
    mixture_step(moved, scale, A, present, density, rate, n_before)
    return moved - z


class Quadratic:
    """
    The two nested problems, small enough to be solved exactly: sources with the mean losses
    L_k(w) = 1/2 (w - c_k)^T Q_k (w - c_k) per learned token, and a target with L_val(w) =
    1/2 |w - t|^2. Weight decay keeps w* from where the sources' gradients cancel.
    """

    K = 4  # sources
    D = 3  # weights
    decay = 0.7

    def __init__(self, density):
        g = torch.Generator().manual_seed(0)
        root = torch.randn(self.K, self.D, self.D, dtype=torch.float64, generator=g)
        self.Q = root @ root.mT
        self.c = torch.randn(self.K, self.D, dtype=torch.float64, generator=g)
        self.t = torch.randn(self.D, dtype=torch.float64, generator=g)
        self.density = density

    def beta(self, alpha):
        """The sources' shares of the learned tokens."""
        return alpha * self.density / (alpha * self.density).sum()

    def H(self, alpha):
        """The Hessian of the training loss."""
        H = torch.einsum("k,kij->ij", self.beta(alpha), self.Q)
        return H + self.decay * torch.eye(self.D, dtype=torch.float64)

    def optimum(self, alpha):
        pull = torch.einsum("k,kij,kj->i", self.beta(alpha), self.Q, self.c)
        return torch.linalg.solve(self.H(alpha), pull)

    def target_loss(self, alpha):
        """L_val(w*(alpha))"""
        return (self.optimum(alpha) - self.t).square().sum() / 2

    def alignments(self, alpha):
        """A_k = <H^-1 g_val, g_k> at w*."""
        w = self.optimum(alpha)
        g = torch.einsum("kij,kj->ki", self.Q, w - self.c)  # (K, D)
        return g @ torch.linalg.solve(self.H(alpha), w - self.t)


@pytest.mark.parametrize("density", [(1, 1, 1, 1), (1, 0.6, 0.1, 0.4)])
def test_step_goes_down_the_derivative_of_the_outer_problem(density):
    """
    By finite differences dL_val(w*(alpha)) / dalpha_k is -(d_k / M) (A_k - mean), and without masks
    -A_k, but for what all sources share. The step on z is against it.
    """
    density = vector(*density)
    problem = Quadratic(density)
    z = vector(0.3, -0.5, 0.1, 0.8)
    alpha = torch.softmax(z, 0)
    derivative = torch.zeros(4, dtype=torch.float64)
    for k in range(4):
        change = torch.zeros(4, dtype=torch.float64)
        change[k] = 1e-5
        derivative[k] = problem.target_loss(alpha + change) - problem.target_loss(alpha - change)
    derivative /= 2e-5

    A = problem.alignments(alpha)
    beta = problem.beta(alpha)
    mean = (beta * A).sum()
    M = (alpha * density).sum()
    assert abs(mean) > 0.05 * A.abs().max()  # so that the mean's part in it is tested
    torch.testing.assert_close(-density / M * (A - mean), derivative, rtol=1e-6, atol=1e-8)
    rms = (beta * A**2).sum().sqrt()
    torch.testing.assert_close(step(z, A, density=density), -0.2 * derivative / rms,
                               rtol=1e-6, atol=1e-8)


def test_an_absent_source_keeps_its_logit():
    """The others move as if there were no such source, whatever number stands for its alignment."""
    z = vector(0.5, 1.0, -0.3)
    density = vector(0.5, 0.1, 0.9)
    others = [0, 2]
    among = step(z[others], vector(2, 1), density=density[others])
    assert among[0] > 0 > among[1]
    dz = step(z, vector(2, -50, 1), torch.tensor([True, False, True]), density)
    assert dz[1] == 0
    torch.testing.assert_close(dz[others], among)
    # and where all are absent nothing changes, nor does the scale
    scale = vector(3)[0]
    dz = step(z, vector(0, 0, 0), torch.tensor([False] * 3), density, scale=scale)
    assert dz.tolist() == [0, 0, 0]
    assert scale == 3


def test_the_scale_is_a_running_mean_of_the_rms():
    """Of 50 steps their mean; from there it forgets by 2% a step."""
    scale = vector(0)[0]
    for n in range(150):
        rms = n + 1
        if n >= 50:
            rms = 3
        step(vector(0, 0), vector(rms, -rms), scale=scale, n_before=n)
        if n == 49:
            assert scale.item() == pytest.approx(25.5)
    assert scale.item() == pytest.approx(3 + 22.5 * 0.98**100)


def test_a_rare_large_alignment_counts_for_what_it_is():
    """
    Source 0 has an alignment of 1 at each step, source 1 one of 20 at each tenth step and else 0.
    So source 1 helps twice as much, and its logit has to rise over the other's. If each step were
    divided by its own rms, it would fall.
    """
    scale = vector(0)[0]
    moved = vector(0, 0)
    for n in range(400):
        A = vector(1, 0)
        if n % 10 == 9:
            A = vector(1, 20)
        moved += step(vector(0, 0), A, scale=scale, n_before=n)
    assert moved[1] > moved[0] + 10


def test_one_odd_alignment_moves_a_logit_only_so_far():
    dz = step(vector(0, 0, 0), vector(-1, 0, 1e6), scale=vector(1)[0], n_before=1000)
    assert dz.abs().max() == 0.2 * BOUND


@pytest.mark.parametrize("z, rate", [((0, -200, 1), 0.05), ((0, 0, 0), 1e3), ((30, 0, 30), 1e6)])
def test_no_source_is_lost(z, rate):
    """However far it fell, or is thrown, its share stays above 1e-8 of the largest."""
    z = vector(*z)
    z = z + step(z, vector(1, 2, 1.5), density=vector(0.01, 1, 0.3), rate=rate)
    assert (z.max() - z.min()).item() == pytest.approx(18)
