"""The GPT: causal, blind to absolute position in its scores, and the same in every block size."""
import torch

from model import GPT, GPTConfig, rotate, rotation


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
