"""The fused weighted cross-entropy and the alignments against autograd in float64."""
import pytest
import torch
import torch.nn.functional as F

from fastmix import (IGNORE, batch_loss, full_alignment, full_target_gradient, fused_cross_entropy, head_pass,
                     target_gradient)
from model import GPT, GPTConfig

N, V, C = 23, 17, 6


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
def test_loss_and_gradients_equal_plain(chunk, grad_out):
    hidden, weight, targets, r = inputs()
    r.requires_grad_()
    expected, expected_tokens = plain_loss(hidden, weight, targets, r)
    expected_grads = torch.autograd.grad(expected * grad_out, (hidden, weight, r))
    loss, token_loss, alignment = fused_cross_entropy(hidden, weight, targets, r, chunk=chunk)
    grads = torch.autograd.grad(loss * grad_out, (hidden, weight, r))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(token_loss, expected_tokens.detach())
    assert alignment is None and not token_loss.requires_grad
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want)


def test_without_weights_it_is_the_mean():
    hidden, weight, targets, _ = inputs()
    torch.testing.assert_close(fused_cross_entropy(hidden, weight, targets)[0],
                               F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE))


def test_gradcheck():
    hidden, weight, targets, r = inputs()
    r.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w, r: fused_cross_entropy(h, w, targets, r, chunk=7)[0],
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
    loss = fused_cross_entropy(hidden, weight, nothing, r, divisor=N)[0]  # a sum over nothing is 0, and so its gradient
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()


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


@pytest.mark.parametrize("chunk", [3, None])
def test_alignment_of_each_token(chunk):
    """<G_val, gradient of token t's loss at the head>, one backward pass per token as the reference."""
    hidden, weight, targets, r = inputs()
    G_val = torch.randn(V, C, dtype=torch.float64)
    _, _, alignment = fused_cross_entropy(hidden, weight, targets, r, G_val, chunk)
    token_loss = plain_loss(hidden, weight, targets, r)[1]
    for t in range(N):
        (g,) = torch.autograd.grad(token_loss[t], weight, retain_graph=True)
        torch.testing.assert_close(alignment[t], (G_val * g).sum())


def test_alignments_of_sources_equal_explicit_backward_passes():
    """On a real model: A_k from the training pass against one backward pass per source and one for the target."""
    K, B, T = 3, 7, 8
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 2, 2, 8)).double()
    head = model.lm_head.weight
    x, y = torch.randint(0, V, (2, B, T))
    target_x, target_y = torch.randint(0, V, (2, 4, T))
    source = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    r = torch.rand(B).double() + 0.5
    G_val = target_gradient(model, head, target_x, target_y, target_y.numel())
    assert head.grad is None and not G_val.requires_grad

    def head_gradient(x, y):
        return torch.autograd.grad(F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten()), head)[0]
    g_val = head_gradient(target_x, target_y)
    torch.testing.assert_close(G_val, g_val)
    loss, token_loss, alignment = batch_loss(model, head, x, y, r, B * T, G_val)
    for k in range(K):
        rows = source == k
        torch.testing.assert_close(alignment[rows].mean(), (g_val * head_gradient(x[rows], y[rows])).sum())
    torch.testing.assert_close(loss, (r[:, None] * token_loss).sum() / (B * T))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0.005), (torch.float32, 0.02)])
def test_alignments_over_all_parameters_equal_explicit_backward_passes(dtype, tolerance):
    """The finite difference of --alignment all against one backward pass per source, with masked tokens."""
    K, B, T = 3, 9, 8
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 2, 2, 8)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # away from the start, where all gradients are alike
            p += 0.3 * torch.randn_like(p)
    x, y = torch.randint(0, V, (2, B, T))
    target_x, target_y = torch.randint(0, V, (2, 4, T))
    y[:, ::3] = target_y[:, 5] = IGNORE
    before = [p.clone() for p in model.parameters()]

    def gradient(x, y):
        logits = model(x) @ model.lm_head.weight.T
        return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE),
                                   list(model.parameters()))
    g_val = full_target_gradient(model, target_x, target_y, (target_y != IGNORE).sum())
    expected_g_val = gradient(target_x, target_y)
    for got, want in zip(g_val.values(), expected_g_val):
        torch.testing.assert_close(got, want)
    _, token_loss, _ = batch_loss(model, model.lm_head.weight, x, y, torch.ones(B, dtype=dtype), B * T)
    alignment = full_alignment(model, x, y, token_loss, g_val)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and (alignment[y == IGNORE] == 0).all()
    got, want = torch.empty(2, K, dtype=dtype)
    for k in range(K):
        rows = slice(3 * k, 3 * k + 3)
        got[k] = alignment[rows].sum() / (y[rows] != IGNORE).sum()
        want[k] = sum((a * b).sum() for a, b in zip(expected_g_val, gradient(x[rows], y[rows])))
    assert (got - want).abs().max() < tolerance * want.abs().max(), (got, want)
    assert want.abs().min() > 0.01 * want.abs().max()  # none is a mere zero


def test_head_pass_computes_only_what_is_asked():
    hidden, weight, targets, _ = inputs()
    _, alignment, grad_h, grad_W = head_pass(hidden.detach(), weight.detach(), targets)
    assert alignment is None and grad_h is None and grad_W is None
