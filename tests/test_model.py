"""
model.py: a GPT that is causal, blind to absolute position in its scores and the same in every
block size; its initialisation and optimizer; checkpoints, whole, damaged and foreign.
"""
import copy
import math
import os
from types import SimpleNamespace

import pytest
import torch

import fastmix
from model import GPT, GPTConfig, load_checkpoint, restore, rotate, rotation, save_checkpoint

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


def gpt(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return GPT(config)


# ---- the model ---------------------------------------------------------------------------------

def test_a_hidden_state_depends_on_the_past_only():
    model = gpt().double()
    x = torch.randint(0, 11, (3, 8))
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before = model(x)
    after = model(changed)
    assert before.shape == (3, 8, 8)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-6).all()
    torch.testing.assert_close(model(x[:, :4]), before[:, :4])  # shorter than the block size


def test_a_hidden_state_is_normalised_and_sees_all_of_its_past():
    """What forward() returns has gone through the last LayerNorm; lm_head is not applied."""
    model = gpt().double()
    x = torch.randint(0, 11, (1, 8))
    hidden = model(x)
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(1, 8).double(), rtol=0, atol=1e-6)
    before = hidden[0, 7]
    for t in range(8):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        assert (model(changed)[0, 7] - before).abs().max() > 1e-6
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(model(x), hidden)


def test_scores_depend_on_distances_alone():
    """q at position i and k at position j: the product is that of any other pair as far apart."""
    T, D = 9, 6
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, D, dtype=torch.float64, generator=g)
    cos, sin = rotation(T, D).double()
    q = rotate(q.expand(1, 1, T, D), cos, sin)[0, 0]  # (T, D), one vector at every position
    k = rotate(k.expand(1, 1, T, D), cos, sin)[0, 0]
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-6)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(T))


def test_weights_serve_every_block_size():
    short = gpt(GPTConfig(11, 4, 1, 2, 8))
    long = gpt(GPTConfig(11, 16, 1, 2, 8), seed=1)
    long.load_state_dict(short.state_dict())
    x = torch.randint(0, 11, (2, 4))
    torch.testing.assert_close(short(x), long(x))


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    found = torch._dynamo.explain(gpt())(torch.zeros(2, 8, dtype=torch.int64))
    assert found.graph_break_count == 0
    assert found.graph_count == 1


@pytest.mark.parametrize("n_embd, n_head", [(10, 4), (12, 4), (6, 2)])
def test_channels_that_do_not_make_pairs_get_one_line(capsys, n_embd, n_head):
    with pytest.raises(SystemExit) as ended:
        GPT(GPTConfig(n_embd=n_embd, n_head=n_head))
    assert ended.value.code == 2
    assert f"--n_embd {n_embd} must be an even multiple" in capsys.readouterr().err


def test_initialisation_is_gpt2s():
    """0.02 everywhere, over sqrt(2 n_layer) where a block writes into the residual stream."""
    model = gpt(GPTConfig(vocab_size=500, block_size=8, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        std = 0.02
        if "proj" in name or "down" in name:
            std = 0.005  # 0.02 / sqrt(16)
        assert p.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(p.mean().item()) < 0.05 * std, name
    x = torch.randint(0, 500, (4, 8))
    logits = model(x) @ model.lm_head.weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)  # knows nothing yet


def test_the_head_is_not_tied_to_the_embedding():
    model = gpt()
    assert model.lm_head.weight.data_ptr() != model.tok_emb.weight.data_ptr()
    assert model.lm_head.bias is None


# ---- the optimizer -----------------------------------------------------------------------------

def test_what_decays_are_matrices_and_embeddings():
    model = gpt()
    decay, rest = model.configure_optimizer(1e-3, 0.1, fused=True).param_groups
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_keeps_the_running_mean_of_squared_gradients(fused):
    """v, of which fastmix.py makes the curvature."""
    model = gpt()
    head = model.lm_head.weight
    optimizer = model.configure_optimizer(1e-3, 0.1, fused)
    v = 0
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        v = 0.95 * v + 0.05 * head.grad**2
        optimizer.step()
    torch.testing.assert_close(optimizer.state[head]["exp_avg_sq"], v)


# ---- checkpoints -------------------------------------------------------------------------------

def trained(config=CONFIG, steps=2, seed=0):
    """A model, its optimizer and the state of a loop, such as they are after some steps."""
    model = gpt(config, seed)
    optimizer = model.configure_optimizer(1e-3, 0.1, fused=False)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    state = SimpleNamespace(step=steps, before={"target": 2.5}, z=torch.randn(3).double(),
                            G=torch.randn(11, config.n_embd))
    return model, optimizer, state


def settings(config=CONFIG):
    return {"args": {"seed": 1}, "config": vars(config), "tokenizer": "bytes",
            "digests": {"a": "1"}}


def written(path, config=CONFIG):
    """The contents of a whole checkpoint, which is written to path, too."""
    save_checkpoint(path, *trained(config), settings(config))
    return load_checkpoint(path, "mend")


def test_round_trip(tmp_path):
    """All that a run is comes back bit for bit, and it continues as it would have."""
    path = tmp_path / "ckpt.pt"
    model, optimizer, state = trained()
    save_checkpoint(path, model, optimizer, state, settings())
    ckpt = load_checkpoint(path, "mend")
    for name, value in settings().items():
        assert ckpt[name] == value

    model_2, optimizer_2, state_2 = trained(steps=0, seed=1)
    z = state_2.z
    restore(ckpt, path, model_2, optimizer_2, state_2)
    assert state_2.step == 2
    assert state_2.before == {"target": 2.5}
    assert torch.equal(state_2.z, state.z)
    assert state_2.z is z  # filled in place, so that it stays on its device
    assert torch.equal(state_2.G, state.G)
    for net, opt in ((model, optimizer), (model_2, optimizer_2)):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    for name, p in model.state_dict().items():
        assert torch.equal(p, model_2.state_dict()[name]), name


def test_weights_alone(tmp_path):
    """As --init_from takes them: the optimizer and the loop start anew."""
    path = tmp_path / "ckpt.pt"
    ckpt = written(path)
    model, _, _ = trained(steps=0, seed=1)
    restore(ckpt, path, model)
    for name, p in model.state_dict().items():
        assert torch.equal(p, ckpt["model"][name]), name


def test_a_checkpoint_holds_no_positions(tmp_path):
    """So that it can be trained further with another block size."""
    path = tmp_path / "ckpt.pt"
    ckpt = written(path)
    longer = gpt(GPTConfig(11, 32, 2, 2, 8), seed=1)
    restore(ckpt, path, longer)
    torch.testing.assert_close(longer.lm_head.weight.data, ckpt["model"]["lm_head.weight"])


def one_line(capsys, function, *args):
    """The one line on stderr with which a function ends the program, with status 2."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "cut at its end", "garbage",
                                     "text", "a tensor", "a list", "nothing", "nanoGPT's"])
def test_a_file_that_is_no_checkpoint_gets_one_line(tmp_path, capsys, content):
    path = tmp_path / "ckpt.pt"
    ckpt = written(path)
    whole = path.read_bytes()
    nanogpt = {"model": ckpt["model"], "optimizer": ckpt["optimizer"], "model_args": {},
               "iter_num": 5, "config": {}}
    files = {"empty": b"", "truncated": whole[: len(whole) // 2], "cut at its end": whole[:-1],
             "garbage": bytes(range(256)) * 99, "text": b"not a checkpoint\n"}
    objects = {"a tensor": torch.ones(3), "a list": [1, 2], "nothing": None, "nanoGPT's": nanogpt}
    path.unlink()
    if content in files:
        path.write_bytes(files[content])
    elif content in objects:
        torch.save(objects[content], path)
    line = one_line(capsys, load_checkpoint, path, "do this or that")
    assert str(path) in line
    assert line.endswith("; do this or that\n")


@pytest.mark.parametrize("flags", [["--resume", "--out_dir", "there"],
                                   ["--init_from", "there/ckpt.pt", "--out_dir", "new"]])
def test_a_truncated_checkpoint_on_the_command_line(tmp_path, capsys, monkeypatch, flags):
    """Nothing is trained then, or written, or lost."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "ckpt.pt"
    written(path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    assert "there/ckpt.pt cannot be read" in one_line(capsys, fastmix.main, flags)
    assert path.read_bytes() == half
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["ckpt.pt", "there"]


@pytest.mark.parametrize("key", ["model", "optimizer", "state", "args", "config", "tokenizer",
                                 "digests"])
def test_a_checkpoint_that_lacks_a_key_gets_one_line(tmp_path, capsys, key):
    path = tmp_path / "ckpt.pt"
    ckpt = written(path)
    del ckpt[key]
    torch.save(ckpt, path)
    assert "is not a checkpoint of this fastmix.py" in one_line(capsys, load_checkpoint, path, "")


def of_another_model(**changes):
    """The weights and AdamW's state of a GPT of another shape, after two steps."""
    config = GPTConfig(**vars(CONFIG) | changes)
    model, optimizer, _ = trained(config)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def sgd_state():
    model, optimizer, _ = trained()
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    sgd = torch.optim.SGD(groups, 1e-3, momentum=0.9)
    sgd.step()
    return sgd.state_dict()


def damaged(ckpt, how):
    """A copy of a checkpoint in which one thing is not what this model's run would write."""
    ckpt = copy.deepcopy(ckpt)
    if how == "weights of another width":
        ckpt["model"] = of_another_model(n_embd=16)["model"]
    elif how == "weights of a deeper model":
        ckpt["model"] = of_another_model(n_layer=3)["model"]
    elif how == "weights without the head":
        del ckpt["model"]["lm_head.weight"]
    elif how == "optimizer of a wider model":
        ckpt["optimizer"] = of_another_model(n_embd=16)["optimizer"]
    elif how == "optimizer of a deeper model":
        ckpt["optimizer"] = of_another_model(n_layer=3)["optimizer"]
    elif how == "optimizer is SGD":
        ckpt["optimizer"] = sgd_state()
    elif how == "state without z":
        del ckpt["state"]["z"]
    elif how == "state without step":
        del ckpt["state"]["step"]
    elif how == "state of more sources":
        ckpt["state"]["z"] = torch.zeros(4).double()
    elif how == "state of one source":  # which torch would copy onto all three
        ckpt["state"]["z"] = torch.zeros(1).double()
    elif how == "state is a list":
        ckpt["state"] = [1, 2]
    return ckpt


@pytest.mark.parametrize("how", [
    "weights of another width", "weights of a deeper model", "weights without the head",
    "optimizer of a wider model", "optimizer of a deeper model", "optimizer is SGD",
    "state without z", "state without step", "state of more sources", "state of one source",
    "state is a list"])
def test_a_checkpoint_that_does_not_fit_gets_one_line(tmp_path, capsys, how):
    path = tmp_path / "ckpt.pt"
    ckpt = damaged(written(path), how)
    line = one_line(capsys, restore, ckpt, path, *trained(steps=0, seed=1))
    assert f"{path} does not fit this model and its settings" in line


def test_a_strangers_checkpoint_runs_no_code(tmp_path, capsys):
    class Payload:

        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "ckpt.pt"
    torch.save({"args": Payload()}, path)
    assert "cannot be read as a checkpoint" in one_line(capsys, load_checkpoint, path, "")
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)  # it would have
    assert (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    class Full:

        def __reduce__(self):
            raise OSError("No space left on device")

    path = tmp_path / "ckpt.pt"
    written(path)
    before = path.read_bytes()
    model, optimizer, state = trained()
    state.z = Full()
    line = one_line(capsys, save_checkpoint, path, model, optimizer, state, settings())
    assert f"cannot write {path} (No space left on device)" in line
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
