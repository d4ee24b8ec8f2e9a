"""The GPT: causal, blind to absolute position in its scores, and the same in every block size. The learning rate."""
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig, learning_rate_at, rotate, rotation


def test_a_hidden_state_depends_on_the_past_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 8, 2, 2, 8)).double()
    x = torch.randint(0, 11, (3, 8))
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-6).all()
    torch.testing.assert_close(model(x[:, :4]), before[:, :4])


def test_scores_depend_on_distances_alone():
    """q at position i and k at position j: the product is that of any other pair as far apart."""
    q, k = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation(9, 6).double()
    q, k = (rotate(x.expand(1, 1, 9, 6), cos, sin)[0, 0] for x in (q, k))  # (T, D), one vector at every position
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-6)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(9))


def test_weights_serve_every_block_size():
    torch.manual_seed(0)
    short, long = GPT(GPTConfig(11, 4, 1, 2, 8)), GPT(GPTConfig(11, 16, 1, 2, 8))
    long.load_state_dict(short.state_dict())
    x = torch.randint(0, 11, (2, 4))
    torch.testing.assert_close(short(x), long(x))


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    found = torch._dynamo.explain(GPT(GPTConfig(11, 8, 2, 2, 8)))(torch.zeros(2, 8, dtype=torch.int64))
    assert found.graph_break_count == 0 and found.graph_count == 1


@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 40), (10, 40), (100, 40)])
def test_learning_rate_warms_up_and_falls_to_a_tenth(warmup_steps, max_steps):
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [learning_rate_at(step, args) for step in range(max_steps + 1)]
    warm, rest = rates[:warmup_steps], rates[warmup_steps:]
    assert warm == pytest.approx([2.0 * (i + 1) / (warmup_steps + 1) for i in range(len(warm))])
    if rest:
        assert rest[0] == 2.0 and rest[-1] == pytest.approx(0.2) and rest[len(rest) // 2] == pytest.approx(1.1)
        assert all(a > b for a, b in zip(rest, rest[1:]))
    assert min(rates) > 0


def test_what_decays_are_matrices_and_embeddings():
    model = GPT(GPTConfig(11, 8, 2, 2, 8))
    decay, rest = model.configure_optimizer(1e-3, 0.1, (0.9, 0.95), fused=True).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decay["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert model.num_params() == sum(p.numel() for p in model.parameters())
