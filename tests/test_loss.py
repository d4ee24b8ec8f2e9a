"""(1) and (2) of fastmix.py: the fused loss and the alignments, against autograd in float64."""
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastmix
from fastmix import (DAMPING, IGNORE, batch_loss, fused_cross_entropy, inverse_curvature, pieces,
                     source_weights, target_gradient)
from model import GPT, GPTConfig

N, V, C = 23, 17, 6  # tokens, vocabulary, channels
ENDS = [5, 5, 16, 23]  # where the tokens of four sources end; the second has none


def inputs(seed=0, dtype=torch.float64):
    """hidden (N, C), weight (V, C), targets (N,) of which a fifth are not learned, coef (N,)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::5] = IGNORE
    coef = torch.rand(N, generator=g, dtype=dtype) * 3
    return hidden, weight, targets, coef


def plain_loss(hidden, weight, targets, coef):
    """What fused_cross_entropy() computes, by torch and with all logits at once."""
    logits = hidden @ weight.T
    token_loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return (coef * token_loss).sum(), token_loss


# ---- the fused loss ----------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 4, 7, N, 100, None])
@pytest.mark.parametrize("grad_out", [1.0, -2.5])
@pytest.mark.parametrize("ends", [None, ENDS])
@pytest.mark.parametrize("block_rows", [1, 5, V])
def test_loss_and_gradients_equal_plain(monkeypatch, chunk, grad_out, ends, block_rows):
    """To ask for parts by source, too, changes neither the loss nor the gradients."""
    monkeypatch.setattr(fastmix, "CACHED", block_rows * C)
    hidden, weight, targets, coef = inputs()
    PG = None
    if ends is not None:
        PG = torch.randn(V, C, dtype=torch.float64)
    expected, expected_tokens = plain_loss(hidden, weight, targets, coef)
    expected_grads = torch.autograd.grad(expected * grad_out, (hidden, weight))

    loss, token_loss, parts = fused_cross_entropy(hidden, weight, targets, coef, PG, ends, chunk)
    grads = torch.autograd.grad(loss * grad_out, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(token_loss, expected_tokens.detach())
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want)
    assert not token_loss.requires_grad
    assert not parts.requires_grad
    if ends is None:
        assert parts.tolist() == [0.0]  # one source, and nothing to compare its gradient with
    else:
        assert parts.shape == (4,)


def test_gradcheck():
    hidden, weight, targets, coef = inputs()

    def loss(hidden, weight):
        return fused_cross_entropy(hidden, weight, targets, coef, ends=ENDS, chunk=7)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_second_derivative_is_refused_not_wrong():
    hidden, weight, targets, coef = inputs()
    loss, _, _ = fused_cross_entropy(hidden, weight, targets, coef)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_where_nothing_is_learned_all_is_zero():
    """A sum over nothing is 0, and so is its gradient."""
    hidden, weight, targets, coef = inputs()
    nothing = torch.full_like(targets, IGNORE)
    PG = torch.ones_like(weight)
    loss, token_loss, parts = fused_cross_entropy(hidden, weight, nothing, coef, PG, ENDS)
    assert loss == 0
    assert not token_loss.any()
    assert not parts.any()
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, coef = inputs(dtype=torch.float32)
    hidden = hidden * 1e4
    loss, _, _ = fused_cross_entropy(hidden, weight, targets, coef)
    torch.testing.assert_close(loss, plain_loss(hidden, weight, targets, coef)[0])


def test_bfloat16_autocast():
    """The matmuls are bfloat16, the softmax and the sums float32; gradients keep their dtype."""
    hidden, weight, targets, coef = inputs(dtype=torch.float32)
    coef = coef / coef[targets != IGNORE].sum()  # a weighted mean, so that tolerances have a scale
    rounded = hidden.bfloat16().float()
    exact, _ = plain_loss(rounded, weight.bfloat16().float(), targets, coef)
    expected_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss, token_loss, _ = fused_cross_entropy(hidden, weight, targets, coef, chunk=4)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for tensor in (loss, token_loss, *grads):
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    for got, want in zip(grads, expected_grads):
        assert (got - want).norm() < 0.02 * want.norm()


def test_a_likely_label_keeps_its_gradient_under_bfloat16():
    """p_y is 1 - 1e-4, which bfloat16 rounds to 1; the gradient p_y - 1 must not become 0."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[math.log(1e4)], [0.0]], requires_grad=True)
    label = torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = fused_cross_entropy(hidden, weight, label, torch.ones(1))
    (grad,) = torch.autograd.grad(loss, weight)
    expected = torch.sigmoid(-weight[:1].bfloat16().float())  # 1 - p_y of the rounded logit
    torch.testing.assert_close(grad, torch.cat([-expected, expected]), rtol=0.02, atol=0)


def test_log_sum_exp_is_float32_under_bfloat16():
    """4096 equal logits: a bfloat16 sum would stop growing at 256."""
    targets = torch.tensor([0, 1])
    coef = torch.tensor([0.5, 0.5])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = fused_cross_entropy(torch.zeros(2, C), torch.zeros(4096, C), targets, coef)
    torch.testing.assert_close(loss, torch.tensor(4096.0).log())


def test_computes_only_what_is_asked():
    """One matmul for the logits, and one more for each of the two gradients that is wanted."""
    hidden, weight, targets, coef = inputs()
    expected, _ = plain_loss(hidden, weight, targets, coef)
    expected_hidden, expected_weight = torch.autograd.grad(expected, (hidden, weight))

    def matmuls():
        """Counts multiplications, in units of one matrix product of N, V and C."""
        def of_addmm_(total, a, b, **_):  # torch's counter leaves it out
            return 2 * a[0] * a[1] * b[1]
        return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm_})

    def count(counter):
        return counter.get_total_flops() / (2 * N * V * C)

    with torch.no_grad(), matmuls() as counter:  # an evaluation
        fused_cross_entropy(hidden, weight, targets, coef)
    assert count(counter) == 1

    with matmuls() as counter:  # the target's gradient at the head
        loss, _, _ = fused_cross_entropy(hidden.detach(), weight, targets, coef)
        gradient, = torch.autograd.grad(loss, weight)
    assert count(counter) == 2
    torch.testing.assert_close(gradient, expected_weight)

    with matmuls() as counter:  # a head that is not trained
        loss, _, _ = fused_cross_entropy(hidden, weight.detach(), targets, coef)
        gradient, = torch.autograd.grad(loss, hidden)
    assert count(counter) == 2
    torch.testing.assert_close(gradient, expected_hidden)

    PG = torch.ones_like(weight)
    with matmuls() as counter:  # training, with the parts of four sources
        fused_cross_entropy(hidden, weight, targets, coef, PG, ENDS)
    assert count(counter) == 3


# ---- parts of the head's gradient, by source ---------------------------------------------------

@pytest.mark.parametrize("ends", [[23], ENDS, [0, 0, 23], [1, 2, 23], [7, 14, 21, 23], [9, 23, 23]])
@pytest.mark.parametrize("chunk", [1, 3, 7, 22, 23])
def test_pieces_cut_a_chunk_by_source(ends, chunk):
    """Each token is in one piece, that of its source; a source has one piece in a chunk at most."""
    source_of = []
    for k, end in enumerate(ends):
        source_of += [k] * (end - len(source_of))
    for start in range(0, N, chunk):
        end = min(start + chunk, N)
        covered = []
        sources = []
        for k, piece in pieces(start, end, ends):
            tokens = range(start, end)[piece]
            assert [source_of[t] for t in tokens] == [k] * len(tokens)
            covered += tokens
            sources.append(k)
        assert covered == list(range(start, end))
        assert sources == sorted(set(source_of[start:end]))


@pytest.mark.parametrize("chunk", [1, 3, 6, None])
@pytest.mark.parametrize("block_rows", [1, 5, V])
def test_parts_equal_a_backward_pass_of_each_token(monkeypatch, chunk, block_rows):
    """A source's part is the sum of coef_t <PG, gradient of loss_t at the head> over its tokens."""
    monkeypatch.setattr(fastmix, "CACHED", block_rows * C)
    hidden, weight, targets, coef = inputs()
    PG = torch.randn(V, C, dtype=torch.float64)
    _, token_loss = plain_loss(hidden, weight, targets, coef)
    expected = torch.zeros(len(ENDS), dtype=torch.float64)
    start = 0
    for k, end in enumerate(ENDS):
        for t in range(start, end):
            (grad,) = torch.autograd.grad(token_loss[t], weight, retain_graph=True)
            expected[k] += coef[t].item() * (PG * grad).sum()
        start = end
    _, _, parts = fused_cross_entropy(hidden, weight, targets, coef, PG, ENDS, chunk)
    torch.testing.assert_close(parts, expected)
    assert parts[1] == 0
    assert (parts[[0, 2, 3]] != 0).all()


# ---- alignments of sources on a model, as main() computes them ----------------------------------

K, B, T = 4, 12, 8  # sources, sequences, tokens in each
SOURCE = torch.tensor([0] * 2 + [1] * 7 + [3] * 3)  # (B,) each sequence's source; 2 is absent
LOGITS = {"even": [0.0, 0.4, -0.3, 0.2], "at the floor": [-18.0, 0.0, 0.5, -17.5]}


def gpt(dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 2, 2, 8)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # away from the start, where all gradients are alike
            p += 0.3 * torch.randn_like(p)
    return model


def batch(masked):
    """x, y (B, T); with masks the sources learn from a fifth of their tokens to all of them."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, V, (2, B, T), generator=g)
    if masked:
        y[SOURCE == 0, ::3] = IGNORE
        y[SOURCE == 1, 1:6] = IGNORE
        y[4] = IGNORE  # a sequence that teaches nothing
    return x, y


def target(dtype=torch.float64):
    """A target's gradient G (V, C), and the second moment S (C, C) of hidden states, at random."""
    g = torch.Generator().manual_seed(2)
    G = torch.randn(V, 8, dtype=dtype, generator=g)
    h = torch.randn(9, 8, dtype=dtype, generator=g)
    return G, h.T @ h


def weights_of(mixture, masked):
    """r (K,) of the mixtures above, with draws by q = 0.75 alpha + 0.25 / K."""
    z = torch.tensor(LOGITS[mixture], dtype=torch.float64)
    alpha = torch.softmax(z, 0)
    density = torch.ones(K, dtype=torch.float64)
    if masked:
        density = torch.tensor([0.6, 0.3, 1.0, 1.0], dtype=torch.float64)
    return source_weights(alpha, 0.75 * alpha + 0.25 / K, density)


def alignments(model, x, y, r, PG, grad_accum):
    """(K,), NaN where a source is absent: from micro-batches, by what main() does with them."""
    parts = torch.zeros(K, dtype=torch.float64)
    learned = torch.zeros(K, dtype=torch.float64)
    for micro in range(grad_accum):
        m = slice(micro, None, grad_accum)
        ends = (torch.bincount(SOURCE[m], minlength=K).cumsum(0) * T).tolist()
        loss, _, micro_parts = batch_loss(model, model.lm_head.weight, x[m], y[m], r[SOURCE[m]],
                                          B * T, PG, ends)
        loss.backward()
        parts += micro_parts
        learned.index_add_(0, SOURCE[m], (y[m] != IGNORE).double().sum(1))
    return parts * (B * T) / (r * learned)


def explicit(model, x, y, PG):
    """
    The same by a backward pass for each source: <PG, gradient of its mean loss at the head> (K,).
    And the product of the two norms (K,): what an alignment could be at most.
    """
    head = model.lm_head.weight
    A = torch.full((K,), torch.nan, dtype=torch.float64)
    largest = torch.full((K,), torch.nan, dtype=torch.float64)
    for k in SOURCE.unique():
        logits = model(x[SOURCE == k]) @ head.T
        loss = F.cross_entropy(logits.flatten(0, 1), y[SOURCE == k].flatten(), ignore_index=IGNORE)
        (grad,) = torch.autograd.grad(loss, head)
        A[k] = (PG * grad).sum()
        largest[k] = PG.norm() * grad.norm()
    return A, largest


def kfac(G, S, v):
    """inverse_curvature() as one linear system over all V C weights: curvature times PG is G."""
    rows = v.mean(1)
    rows = torch.diag(rows + DAMPING * rows.mean())
    columns = S + DAMPING * S.trace() / len(S) * torch.eye(len(S), dtype=torch.float64)
    return torch.linalg.solve(torch.kron(rows, columns), G.flatten()).view_as(G)


@pytest.mark.parametrize("chunk", [1, 5, None])  # 5 straddles sequences and the ends of sources
@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("units", ["gradient", "curvature"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixture", LOGITS)
def test_alignments_equal_explicit_backward_passes(monkeypatch, mixture, masked, units, grad_accum,
                                                   chunk):
    in_chunks = functools.partial(fused_cross_entropy, chunk=chunk)
    monkeypatch.setattr(fastmix, "fused_cross_entropy", in_chunks)
    G, S = target()
    PG = G
    expected_PG = G
    if units == "curvature":
        v = torch.rand(V, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        PG = inverse_curvature(G, S, v)
        expected_PG = kfac(G, S, v)
    x, y = batch(masked)
    r = weights_of(mixture, masked)
    assert mixture == "even" or r[0] < 1e-6
    expected, largest = explicit(gpt(), x, y, expected_PG)

    A = alignments(gpt(), x, y, r, PG, grad_accum)
    torch.testing.assert_close(A, expected, equal_nan=True)
    assert A.isnan().tolist() == [False, False, True, False]
    assert (expected.abs() > 1e-3 * largest)[~A.isnan()].all()  # none is a mere zero


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("mixture", LOGITS)
def test_alignments_survive_rounding(mixture, dtype, tolerance):
    """Even of a source whose weight is at the floor, as shares of the largest they could be."""
    x, y = batch(masked=True)
    G, _ = target()
    expected, largest = explicit(gpt(), x, y, G)
    r = weights_of(mixture, masked=True).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        A = alignments(gpt().float(), x, y, r, G.float(), 2)
    present = ~expected.isnan()
    close = (A - expected).abs() < tolerance * largest
    assert close[present].all(), (A, expected, largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_gradients_at_the_floor_do_not_underflow(dtype):
    """A long run has 2^20 tokens in a step: a source at the floor has coefficients of 1e-15."""
    hidden, weight, targets, _ = inputs(dtype=torch.float32)
    PG = torch.randn(V, C)
    coef = torch.full((N,), 1.0 / 2**20)
    coef[:ENDS[0]] = 1.5e-8 / 2**20
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        _, _, parts = fused_cross_entropy(hidden, weight, targets, coef, PG, ENDS)
        _, _, expected = fused_cross_entropy(hidden, weight, targets, torch.ones(N), PG, ENDS)
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5
    torch.testing.assert_close(parts / coef[[0, 0, -1, -1]], expected, rtol=tolerance, atol=0)


# ---- the target's gradient, and the curvature --------------------------------------------------

def test_target_gradient_equals_autograd():
    """Weighted by sequence and masked; nothing is left on the parameters."""
    model = gpt()
    head = model.lm_head.weight
    x, y = batch(masked=True)
    weight = torch.rand(B, dtype=torch.float64) + 0.5
    G, S = target_gradient(model, head, x, y, weight, B * T)

    coef = weight.repeat_interleave(T) / (B * T)
    hidden = model(x)  # (B, T, C)
    loss, _ = plain_loss(hidden.flatten(0, 1), head, y.flatten(), coef)
    torch.testing.assert_close(G, torch.autograd.grad(loss, head)[0])
    expected_S = 0
    for b in range(B):
        h = hidden[b][y[b] != IGNORE].detach()
        expected_S = expected_S + weight[b] * h.T @ h / (B * T)
    torch.testing.assert_close(S, expected_S)
    assert not G.requires_grad
    assert not S.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_curvature_is_that_of_a_softmax_head(scale):
    """
    The Hessian of the mean loss over the head W, by autograd. At W = 0 all tokens are as likely, v
    is the same in all rows, and the Hessian is a factor for the outputs times S = E[h h^T]. Its
    inverse, times a G whose rows sum to 0 as a softmax's do, is P G up to scale.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 4, dtype=torch.float64, generator=g)
    hidden = hidden @ torch.randn(4, 4, dtype=torch.float64, generator=g)  # correlated channels
    S = hidden.T @ hidden / len(hidden)
    G = torch.randn(5, 4, dtype=torch.float64, generator=g)
    G = G - G.mean(0)
    W = torch.zeros(5, 4, dtype=torch.float64)

    def loss(W):
        return -torch.log_softmax(hidden @ W.T, 1).mean()

    hessian = torch.autograd.functional.hessian(loss, W).reshape(20, 20)
    exact = (torch.linalg.pinv(hessian) @ G.flatten()).view_as(G)
    # take off beforehand what the damping will add
    identity = torch.eye(4, dtype=torch.float64)
    undamped = S - DAMPING / (1 + DAMPING) * S.diagonal().mean() * identity
    found = inverse_curvature(G, undamped, torch.full_like(W, scale))
    torch.testing.assert_close(found / found.norm(), exact / exact.norm())


def test_curvature_bounds_what_rare_tokens_count():
    """A token that never turned up has v = 0: it counts as if it had the mean."""
    G = torch.ones(V, C, dtype=torch.float64)
    S = torch.eye(C, dtype=torch.float64)
    v = torch.rand(V, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v[3] = 0.0
    found = inverse_curvature(G, S, v)
    torch.testing.assert_close(found[3], G[3] / (DAMPING * v.mean() * (1 + DAMPING)))
    torch.testing.assert_close(found, kfac(G, S, v))


def test_curvature_is_the_same_before_the_first_step_for_every_token():
    """Then main() has no v yet, and passes ones: all rows of G are weighted alike."""
    G, S = target()
    found = inverse_curvature(G, S, torch.ones(V, 8, dtype=torch.float64))
    columns = S + DAMPING * S.trace() / 8 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(columns, G.T).T / (1 + DAMPING))
