"""The fused loss and the alignments, formulas (1) and (2), against autograd in float64."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmix import fused_cross_entropy
from prepare_data import IGNORE

K = 3
B = 12
T = 16
C = 6
V = 50
N = B * T  # tokens; the loss takes 64 of them at a time


def batch(masked=False, dtype=torch.float64):
    """A batch at random, with weights of its sequences that are as uneven as a search's."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=g)
    if masked:
        labels[::2, ::3] = IGNORE
        labels[5] = IGNORE  # a sequence that teaches nothing
    return SimpleNamespace(
        hidden=torch.randn(B, T, C, generator=g, dtype=dtype, requires_grad=True),
        head=torch.randn(V, C, generator=g, dtype=dtype, requires_grad=True),
        labels=labels,
        weight=torch.rand(B, generator=g, dtype=dtype)**8 / N,
        source=torch.randint(0, K, (B,), generator=g),
        PG=torch.randn(V, C, generator=g, dtype=dtype))


def fused(b, PG=None):
    return fused_cross_entropy(b.hidden, b.head, b.labels, b.weight, PG)


def plain_loss(b):
    """The same by torch, with all logits at once: the loss, and that of each token, (B, T)."""
    logits = b.hidden @ b.head.T  # (B, T, V)
    token_loss = F.cross_entropy(logits.transpose(1, 2), b.labels, ignore_index=IGNORE,
                                 reduction="none")
    return (b.weight[:, None] * token_loss).sum(), token_loss


def assert_equal(found, expected):
    """To 12 digits of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


# ---- the loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_equal_autograd(masked):
    """With PG too, and with another gradient from above than 1."""
    b = batch(masked)
    expected, expected_tokens = plain_loss(b)
    expected_gradients = torch.autograd.grad(-2.5 * expected, (b.hidden, b.head))
    loss, token_loss, alignment = fused(b, b.PG)
    gradients = torch.autograd.grad(-2.5 * loss, (b.hidden, b.head))
    assert_equal(loss, expected)
    assert_equal(token_loss, expected_tokens)
    for found, expected in zip(gradients, expected_gradients):
        assert_equal(found, expected)
    assert not token_loss.requires_grad
    assert not alignment.requires_grad
    # a head that is not trained passes its gradient on
    b.head = b.head.detach()
    assert_equal(torch.autograd.grad(fused(b)[0], b.hidden)[0], gradients[0] / -2.5)


def test_a_batch_without_a_learned_token():
    """A sum over nothing is 0, and so are its gradients."""
    b = batch()
    b.labels[:] = IGNORE
    loss, token_loss, alignment = fused(b, b.PG)
    gradients = torch.autograd.grad(loss, (b.hidden, b.head))
    for tensor in (loss, token_loss, alignment, *gradients):
        assert not tensor.any()


def test_bfloat16_products():
    """Under autocast they cost about 1%; what comes out stays in float32."""
    b = batch(masked=True, dtype=torch.float32)
    expected, _ = plain_loss(b)
    _, _, expected_alignment = fused(b, b.PG)
    expected_gradients = torch.autograd.grad(expected, (b.hidden, b.head))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, alignment = fused(b, b.PG)
    gradients = torch.autograd.grad(loss, (b.hidden, b.head))
    for found, exact in zip((loss, alignment, *gradients),
                            (expected, expected_alignment, *expected_gradients)):
        assert found.dtype == torch.float32
        assert 0 < (found - exact).norm() < 0.02 * exact.norm()


def test_a_likely_label_keeps_its_gradient_under_bfloat16():
    """p_y is 1 - 1e-4, which bfloat16 rounds to 1; the gradient p_y - 1 must not become 0."""
    hidden = torch.ones(1, 1, 1)
    head = torch.tensor([[math.log(1e4)], [0.0]], requires_grad=True)
    label = torch.tensor([[0]])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = fused_cross_entropy(hidden, head, label, torch.ones(1), None)
    (gradient,) = torch.autograd.grad(loss, head)
    torch.testing.assert_close(gradient, torch.tensor([[-1e-4], [1e-4]]), rtol=0.05, atol=0)


# ---- what it costs -------------------------------------------------------------------------------

class Cost(TorchDispatchMode):
    """Counts multiplications in units of a product of N, V and C, and finds the largest tensor."""

    def __init__(self):
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:  # mm or addmm_, whose last two arguments are multiplied
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1] / (N * V * C)
        if torch.is_tensor(out):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("what, products", [("evaluation", 1), ("target", 2), ("fixed", 3),
                                            ("search", 4)])
def test_only_what_is_asked_is_computed(what, products):
    """
    One product for the logits, one for each of the two gradients, one for the alignments. An
    evaluation detaches the head, a target its hidden states. And the logits of all tokens, the
    largest tensor there could be, are never held.
    """
    b = batch()
    PG = None
    if what == "evaluation":
        b.head = b.head.detach()
        b.hidden = b.hidden.detach()
    if what == "target":
        b.hidden = b.hidden.detach()
    if what == "search":
        PG = b.PG
    with Cost() as cost:
        loss, _, _ = fused(b, PG)
    assert cost.products == pytest.approx(products)
    assert cost.largest <= 64 * V < N * V
    assert loss.requires_grad == (what != "evaluation")


# ---- the alignments ------------------------------------------------------------------------------

def test_a_tokens_alignment_is_a_backward_pass_of_it():
    """a_t = <PG, gradient of loss_t at the head>, whatever the token's weight."""
    b = batch(masked=True)
    _, _, found = fused(b, b.PG)
    _, token_loss = plain_loss(b)
    expected = torch.zeros(N, dtype=torch.float64)
    for t, loss in enumerate(token_loss.flatten()):
        (g,) = torch.autograd.grad(loss, b.head, retain_graph=True)
        expected[t] = (b.PG * g).sum()
    assert_equal(found, expected.view(B, T))


@pytest.mark.parametrize("masked", [False, True])
def test_a_sources_alignment_is_that_of_its_gradient(masked):
    """
    The mean of its learned tokens' alignments is <PG, g_k>. g_k comes from a backward pass through
    the source's mean loss, and from the formula for it: the mean of (p_t - y_t) h_t^T over the
    source's learned tokens.
    """
    b = batch(masked)
    learned = b.labels != IGNORE  # (B, T)
    _, token_loss = plain_loss(b)
    p = torch.softmax(b.hidden @ b.head.T, -1)  # (B, T, V)
    y = F.one_hot(b.labels.clamp(min=0), V)
    by_autograd = torch.zeros(K, dtype=torch.float64)
    by_formula = torch.zeros(K, dtype=torch.float64)
    for k in range(K):
        mine = learned & (b.source == k)[:, None]
        (g,) = torch.autograd.grad(token_loss[mine].mean(), b.head, retain_graph=True)
        by_autograd[k] = (b.PG * g).sum()
        g = (p - y)[mine].T @ b.hidden[mine] / mine.sum()  # (V, C)
        by_formula[k] = (b.PG * g).sum()

    _, _, alignment = fused(b, b.PG)
    A = torch.bincount(b.source, alignment.sum(1), K)
    A = A / torch.bincount(b.source, learned.double().sum(1), K)
    assert_equal(A, by_autograd)
    assert_equal(A, by_formula.detach())
