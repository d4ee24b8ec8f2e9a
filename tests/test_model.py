"""model.py: the GPT, its learning rate, and checkpoints, whole and damaged."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, learning_rate_at, load_checkpoint, save_checkpoint

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


def gpt(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return GPT(config)


# ---- the model -----------------------------------------------------------------------------------

def test_a_hidden_state_depends_on_its_past_and_on_all_of_it():
    model = gpt().double()
    x = torch.randint(0, 11, (1, 8))
    hidden = model(x)  # (1, 8, 8)
    for t in range(8):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        difference = (model(changed) - hidden).abs().amax(-1)[0]  # (8,)
        assert (difference > 1e-9).tolist() == [False] * t + [True] * (8 - t)


def test_positions_count_by_their_distances():
    """All of them moved by 5 give the same hidden states, two tokens exchanged give others."""
    model = gpt(GPTConfig(11, 8, 1, 2, 8)).double()
    for p in model.parameters():
        p.data *= 10  # so that attention is far from even
    x = torch.arange(8)[None]
    hidden = model(x)
    exchanged = model(x[:, [1, 0, *range(2, 8)]])
    assert (exchanged - hidden)[0, 7].abs().max() > 1e-3
    model.rotation = gpt(replace(CONFIG, block_size=13)).rotation[:, 5:].double()
    torch.testing.assert_close(model(x), hidden, rtol=1e-5, atol=1e-5)


def test_a_new_model_knows_nothing():
    """Its loss is about log V, that of a guess."""
    model = gpt(GPTConfig(vocab_size=500, block_size=8, n_layer=8, n_head=4, n_embd=128))
    x = torch.randint(0, 500, (4, 8))
    logits = model(x) @ model.lm_head.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), x.flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)


def test_torch_compile_takes_the_model_whole():
    """To trace it is what can fail; to compile it for real, as --compile does, takes a minute."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(gpt())(torch.zeros(2, 8, dtype=torch.int64))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_learning_rate_warms_up_and_falls_to_a_tenth(warmup_steps):
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=warmup_steps, max_steps=40)
    rates = [learning_rate_at(step, args) for step in range(41)]
    for step, rate in enumerate(rates[:warmup_steps]):
        assert rate == pytest.approx(2.0 * (step + 1) / (warmup_steps + 1))
    falling = rates[warmup_steps:]
    assert falling[0] == 2.0
    assert falling[len(falling) // 2] == pytest.approx(1.1)
    assert falling[-1] == pytest.approx(0.2)
    assert falling == sorted(set(falling), reverse=True)


# ---- checkpoints ---------------------------------------------------------------------------------

def train(model, optimizer):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def saved(path):
    """Writes a checkpoint, and returns the model and the optimizer that are in it."""
    model = gpt()
    optimizer = model.configure_optimizer(1e-3, 0.1)
    train(model, optimizer)
    state = SimpleNamespace(step=1, z=torch.tensor([0.1, 0.2], dtype=torch.float64), log=[{"a": 1}])
    save_checkpoint(path, model, optimizer, state, {"config": vars(CONFIG)})
    return model, optimizer


def test_round_trip(tmp_path):
    """What is saved comes back, and training goes on as it would have."""
    model, optimizer = saved(tmp_path / "ckpt.pt")
    ckpt = load_checkpoint(tmp_path / "ckpt.pt")
    assert ckpt["config"] == vars(CONFIG)
    assert ckpt["state"].pop("z").tolist() == [0.1, 0.2]
    assert ckpt["state"] == {"step": 1, "log": [{"a": 1}]}
    copy = gpt(seed=1)
    copy.load_state_dict(ckpt["model"])
    optimizer_of_copy = copy.configure_optimizer(1e-3, 0.1)
    optimizer_of_copy.load_state_dict(ckpt["optimizer"])
    train(model, optimizer)
    train(copy, optimizer_of_copy)
    for p, q in zip(model.parameters(), copy.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("what", ["cut", "a stranger's"])
def test_a_file_that_is_no_checkpoint_gets_one_line(tmp_path, capsys, what):
    """Nor are objects read, for they may run code as they are made."""
    path = tmp_path / "ckpt.pt"
    saved(path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        torch.save({"args": SimpleNamespace()}, path)
    with pytest.raises(SystemExit) as ended:
        load_checkpoint(path)
    assert ended.value.code == 2
    assert f"error: {path} cannot be read as a checkpoint" in capsys.readouterr().err
