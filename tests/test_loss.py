"""(1) and (2) of fastmix.py: the fused weighted cross-entropy and the alignments, against autograd in float64."""
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastmix
from fastmix import IGNORE, batch_loss, fused_cross_entropy, inverse_curvature, loss_weights, target_gradient
from model import GPT, GPTConfig

N, V, C = 23, 17, 6
ENDS = [5, 5, 16, 23]  # four sources, the second without a token


def inputs(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::5] = IGNORE
    r = torch.rand(N, generator=g, dtype=dtype) * 3
    return hidden, weight, targets, r


def plain_loss(hidden, weight, targets, r):
    token_loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    r = r * (targets != IGNORE)
    return (r * token_loss).sum() / r.sum(), token_loss


@pytest.mark.parametrize("chunk", [1, 4, 7, N, 100, None])
@pytest.mark.parametrize("grad_out", [1.0, -2.5])
@pytest.mark.parametrize("ends", [None, ENDS])
def test_loss_and_gradients_equal_plain(chunk, grad_out, ends):
    """Whatever is asked for beside them: parts of the gradient by source change neither the loss nor the gradient."""
    hidden, weight, targets, r = inputs()
    r.requires_grad_()
    G = None if ends is None else torch.randn(V, C, dtype=torch.float64)
    expected, expected_tokens = plain_loss(hidden, weight, targets, r)
    expected_grads = torch.autograd.grad(expected * grad_out, (hidden, weight, r))
    loss, token_loss, parts = fused_cross_entropy(hidden, weight, targets, r, PG=G, ends=ends, chunk=chunk)
    grads = torch.autograd.grad(loss * grad_out, (hidden, weight, r))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(token_loss, expected_tokens.detach())
    assert not token_loss.requires_grad and not parts.requires_grad and parts.shape == (len(ends or [N]),)
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want)


def test_without_weights_it_is_the_mean():
    hidden, weight, targets, _ = inputs()
    torch.testing.assert_close(fused_cross_entropy(hidden, weight, targets)[0],
                               F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE))


def test_gradcheck():
    hidden, weight, targets, r = inputs()
    r.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w, r: fused_cross_entropy(h, w, targets, r, ends=ENDS, chunk=7)[0],
                                    (hidden, weight, r))


def test_no_second_derivative_is_refused_not_wrong():
    hidden, weight, targets, r = inputs()
    (grad,) = torch.autograd.grad(fused_cross_entropy(hidden, weight, targets, r)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_nothing_learned_is_nan_as_in_torch():
    hidden, weight, targets, r = inputs()
    nothing = torch.full_like(targets, IGNORE)
    assert fused_cross_entropy(hidden, weight, nothing)[0].isnan()
    loss, _, parts = fused_cross_entropy(hidden, weight, nothing, r, N, torch.ones_like(weight), ENDS)
    assert loss == 0 and not parts.any()  # a sum over nothing is 0, and so its gradient
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_large_logits_do_not_overflow():
    hidden, weight, targets, r = inputs(dtype=torch.float32)
    loss, _, _ = fused_cross_entropy(hidden * 1e4, weight, targets, r)
    torch.testing.assert_close(loss, plain_loss(hidden * 1e4, weight, targets, r)[0])


def test_bfloat16_autocast():
    """Under autocast the matmuls are bfloat16, the softmax and the sums float32; gradients keep their inputs' type."""
    hidden, weight, targets, r = inputs(dtype=torch.float32)
    exact = plain_loss(hidden.bfloat16().float(), weight.bfloat16().float(), targets, r)[0]
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss, token_loss, _ = fused_cross_entropy(hidden, weight, targets, r, chunk=4)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == token_loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    for got, want in zip(grads, expected):
        assert (got - want).norm() < 0.02 * want.norm()


def test_log_sum_exp_is_float32_under_bfloat16():
    """4096 equal logits: a bfloat16 sum would stop growing at 256."""
    hidden, weight, targets = torch.zeros(2, C), torch.zeros(4096, C), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = fused_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, torch.tensor(4096.0).log())


def test_computes_only_what_is_asked(monkeypatch):
    """Matmuls of a walk in one chunk: the logits, and one more for each of the two gradients that is wanted."""
    hidden, weight, targets, r = inputs()
    shapes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: shapes.append((len(a), b.shape[1])) or mm(a, b, out=out))
    with torch.no_grad():
        fused_cross_entropy(hidden, weight, targets, r)
    assert shapes == [(N, V)]  # an evaluation forms no gradient
    loss, _, _ = fused_cross_entropy(hidden.detach(), weight, targets, r, chunk=N)
    assert shapes[1:] == [(N, V), (V, C)]  # nor does the target's gradient at the head go through the model
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0],
                               torch.autograd.grad(plain_loss(hidden, weight, targets, r)[0], weight)[0])
    loss, _, _ = fused_cross_entropy(hidden, weight.detach(), targets, r, chunk=N)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0],
                               torch.autograd.grad(plain_loss(hidden, weight, targets, r)[0], hidden)[0])
    assert shapes[3:] == [(N, V)]


@pytest.mark.parametrize("chunk", [1, 3, 6, None])
def test_parts_equal_a_backward_pass_of_each_token(chunk):
    """sum_t coef_t <G, gradient of token t's loss at the head> over each source's tokens."""
    hidden, weight, targets, r = inputs()
    G = torch.randn(V, C, dtype=torch.float64)
    _, _, parts = fused_cross_entropy(hidden, weight, targets, r, divisor=7, PG=G, ends=ENDS, chunk=chunk)
    token_loss = plain_loss(hidden, weight, targets, r)[1]
    tokens = torch.stack([r[t] / 7 * (G * torch.autograd.grad(token_loss[t], weight, retain_graph=True)[0]).sum()
                          for t in range(N)])
    torch.testing.assert_close(parts, torch.stack([part.sum() for part in tokens.tensor_split(ENDS[:-1])]).detach())
    assert parts[1] == 0 and (parts[[0, 2, 3]] != 0).all()


# ---- alignments of sources on a model, as main() computes them

K, B, T = 4, 12, 8
SEQUENCES = torch.tensor([0] * 2 + [1] * 7 + [3] * 3)  # the source of each; source 2 is absent
ALPHA_LOGITS = {"even": [0.0, 0.4, -0.3, 0.2], "at the floor": [-18.0, 0.0, 0.5, -17.5]}


def gpt(dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 2, 2, 8)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # away from the start, where all gradients are alike
            p += 0.3 * torch.randn_like(p)
    return model


def batch(masked):
    """x, y (B, T) of the sources above; with masks, a fifth to all of a source's tokens are learned."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, V, (2, B, T), generator=g)
    if masked:
        y[SEQUENCES == 0, ::3] = y[SEQUENCES == 1, 1:6] = IGNORE
        y[4] = IGNORE  # a sequence that teaches nothing
    return x, y


def alignments(model, x, y, weights, G, grad_accum):
    """(K,), NaN where a source is absent: the loop's inner step and the first line of its outer step."""
    parts, learned = torch.zeros(2, K, dtype=torch.float64)
    for micro in range(grad_accum):
        m = slice(micro, None, grad_accum)
        ends = (torch.bincount(SEQUENCES[m], minlength=K).cumsum(0) * T).tolist()
        loss, _, part = batch_loss(model, model.lm_head.weight, x[m], y[m], weights[SEQUENCES[m]], B * T, G, ends)
        loss.backward()
        parts += part
        learned.index_add_(0, SEQUENCES[m], (y[m] != IGNORE).double().sum(1))
    return parts * (B * T) / (weights * learned)


def explicit(model, x, y, G):
    """(K,) by a backward pass for each source: the product of G with the gradient of its mean loss at the head."""
    A, sizes = torch.full((2, K), torch.nan, dtype=torch.float64)
    for k in SEQUENCES.unique():
        logits = model(x[SEQUENCES == k]) @ model.lm_head.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), y[SEQUENCES == k].flatten(), ignore_index=IGNORE)
        (g,) = torch.autograd.grad(loss, model.lm_head.weight)
        A[k], sizes[k] = (G * g).sum(), G.norm() * g.norm()
    return A, sizes


def trained(model):
    """An AdamW optimizer that has taken some steps on the model, and the v that its gradients at the head make."""
    optimizer, v = model.configure_optimizer(1e-3, 0.1, (0.9, 0.95), fused=False), 0
    for seed in range(4):
        x = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(seed))
        F.cross_entropy((model(x) @ model.lm_head.weight.T).flatten(0, 1), x.flatten()).backward()
        v = 0.95 * v + 0.05 * model.lm_head.weight.grad**2
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, v


def kfac(G, H, v):
    """inverse_curvature() as one linear system over all V C weights: (rows of v, damped) x (H, damped) times P G is G."""
    rows, identity = v.mean(1), torch.eye(len(H), dtype=torch.float64)
    curvature = torch.kron(torch.diag(rows + 0.1 * rows.mean()), H + 0.1 * H.trace() / len(H) * identity)
    return torch.linalg.solve(curvature, G.flatten()).view_as(G)


def loss_weights_of(mixture, masked):
    z = torch.tensor(ALPHA_LOGITS[mixture], dtype=torch.float64)
    alpha = torch.softmax(z - z.max(), 0)
    density = torch.tensor([0.6, 0.3, 1.0, 1.0] if masked else [1.0] * K, dtype=torch.float64)
    return loss_weights(alpha, 0.75 * alpha + 0.25 / K, density)


@pytest.mark.parametrize("chunk", [1, 5, None])  # 5 straddles sequences and the ends of sources
@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("units", ["gradient", "curvature"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixture", ALPHA_LOGITS)
def test_alignments_of_sources_equal_explicit_backward_passes(monkeypatch, mixture, masked, units, grad_accum, chunk):
    monkeypatch.setattr(fastmix, "fused_cross_entropy", functools.partial(fused_cross_entropy, chunk=chunk))
    model = gpt()
    G = torch.randn(V, C + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected_G = G
    if units == "curvature":
        optimizer, v = trained(model)
        H = torch.randn(9, C + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        G, expected_G = inverse_curvature(G, H.T @ H, model.lm_head.weight, optimizer), kfac(G, H.T @ H, v)
    x, y = batch(masked)
    weights = loss_weights_of(mixture, masked)
    assert mixture == "even" or weights[0] < 1e-6
    A = alignments(model, x, y, weights, G, grad_accum)
    expected, sizes = explicit(model, x, y, expected_G)
    torch.testing.assert_close(A, expected, equal_nan=True)
    assert A.isnan().tolist() == [False, False, True, False]
    assert (expected.abs() > 1e-3 * sizes)[~A.isnan()].all()  # none is a mere zero


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("mixture", ALPHA_LOGITS)
def test_alignments_survive_rounding(mixture, dtype, tolerance):
    """Even of a source whose weight is at the floor, against float64; in units of the norms that are multiplied."""
    x, y = batch(masked=True)
    G = torch.randn(V, C + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected, sizes = explicit(gpt(), x, y, G)
    weights = loss_weights_of(mixture, True).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        A = alignments(gpt().float(), x, y, weights, G.float(), 2)
    known = ~expected.isnan()
    assert ((A - expected).abs() < tolerance * sizes)[known].all(), (A, expected, sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_gradients_at_the_floor_do_not_underflow(dtype):
    """A long run's step: 2^20 tokens in it, so that a source at the floor has coefficients of 1e-15."""
    hidden, weight, targets, _ = inputs(dtype=torch.float32)
    G = torch.randn(V, C)
    coef = torch.where(torch.arange(N) < ENDS[0], 1.5e-8 / 2**20, 1.0 / 2**20)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        parts = fused_cross_entropy(hidden, weight, targets, coef, 1, G, ENDS)[2] / coef[[0, 0, -1, -1]]
        expected = fused_cross_entropy(hidden, weight, targets, torch.ones(N), 1, G, ENDS)[2]
    torch.testing.assert_close(parts, expected, rtol=0.02 if dtype == "bfloat16" else 1e-5, atol=0)


def test_target_gradient_equals_autograd():
    """Weighted by sequence and masked; nothing is left on the parameters, and no gradient goes through the model."""
    model = gpt()
    head = model.lm_head.weight
    x, y = batch(masked=True)
    r = torch.rand(B, dtype=torch.float64) + 0.5
    G, H = target_gradient(model, head, x, y, r, B * T)
    token_loss = F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="none")
    expected = torch.autograd.grad((r[:, None] * token_loss.view(B, T)).sum() / (B * T), head)[0]
    torch.testing.assert_close(G, expected)
    hidden = model(x).detach()  # (B, T, C)
    weight = r[:, None] * (y != IGNORE)
    torch.testing.assert_close(H, torch.einsum("bt,btc,btd->cd", weight, hidden, hidden) / (B * T))
    assert not G.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("seen", [False, True])
def test_curvature_is_that_of_a_softmax_head(seen):
    """
    The exact Hessian of the mean loss over W, from autograd: at W = 0, where all tokens are as likely, it is (1 - 1 / V)
    x E[h h^T] up to scale, and its inverse makes P G of a G that sums to 0 over tokens, but for the damping.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 4, dtype=torch.float64, generator=g) @ torch.randn(4, 4, dtype=torch.float64, generator=g)
    W = torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    G = torch.randn(5, 4, dtype=torch.float64, generator=g)
    G, H = G - G.mean(0), hidden.T @ hidden / len(hidden)

    def loss(W):
        return -torch.log_softmax(hidden @ W.T, 1).mean()
    hessian = torch.autograd.functional.hessian(loss, W).reshape(20, 20)
    exact = (torch.linalg.pinv(hessian) @ G.flatten()).view_as(G)
    optimizer = SimpleNamespace(state={W: {"exp_avg_sq": torch.full_like(W, 0.3)} if seen else {}})
    H = H - 0.1 / 1.1 * H.diagonal().mean() * torch.eye(4)  # so that damping gives H back
    found = inverse_curvature(G, H, W, optimizer)
    torch.testing.assert_close(found / found.norm(), exact / exact.norm())


def test_curvature_bounds_what_rare_tokens_count():
    """A token that has not turned up yet has v = 0: it counts as one with a tenth of the mean, and no more."""
    model = gpt()
    head = model.lm_head.weight
    G, H = torch.ones(V, C + 2, dtype=torch.float64), torch.eye(C + 2, dtype=torch.float64)
    optimizer, v = trained(model)
    v[3] = optimizer.state[head]["exp_avg_sq"][3] = 0.0
    found, rows = inverse_curvature(G, H, head, optimizer), v.mean(1)
    torch.testing.assert_close(found[3], G[3] / (0.1 * rows.mean() * 1.1))
    torch.testing.assert_close(found, kfac(G, H, v))
