"""
Many runs of fastmix.py at fixed mixtures, trained at once. Their weights lie in tensors with one
more dimension, and every step is one step of all of them: a GPU that one small proxy leaves idle
most of the time trains hundreds.

Each run has the initialisation, the batches, the optimizer and the evaluation that `python
fastmix.py --seed SEED --mixture MIXTURE` gives it, and the same loss up to rounding:
tests/test_bench.py compares them. Only the step itself is written anew here, because the loop of
fastmix.py trains one model.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmix import draw, evaluate, learning_rate_at
from model import GPT, GPTConfig
from prepare_data import gather, load_sets

EVAL_BATCH = 256  # sequences; how they are grouped changes nothing but rounding


def initial_weights(config, seeds, device):
    """{name: (M, ...)} of M models, each as fastmix.py initialises it by its seed."""
    models = {}
    for seed in set(seeds):
        torch.manual_seed(seed)
        models[seed] = dict(GPT(config).named_parameters())
    weights = {}
    for name in models[seeds[0]]:
        stacked = torch.stack([models[seed][name].detach() for seed in seeds])
        weights[name] = stacked.to(device).requires_grad_()
    return weights


def draw_batches(sources, mixtures, seeds, step, batch_size):
    """
    The batches of M runs: inputs and targets, each (M, B, T). For each run this draws what
    fastmix.draw_batch() does, but the windows of all runs are read at once.
    """
    drawn = []
    fractions = []
    for q, seed in zip(mixtures, seeds):
        rng = np.random.default_rng((seed, step, 0))  # as in fastmix.py's inner step
        drawn.append(draw(q, batch_size, rng.random(), rng.permutation(len(q))))
        fractions.append(rng.random(batch_size))
    x, y = gather(sources, "train", np.concatenate(drawn), np.concatenate(fractions))
    shape = (len(seeds), batch_size, -1)
    return torch.from_numpy(x).view(shape), torch.from_numpy(y).view(shape)


def clip_gradients(weights, largest):
    """Clips the norm of each run's gradient, as clip_grad_norm_() does for one."""
    squares = [w.grad.flatten(1).square().sum(1) for w in weights.values()]
    norm = sum(squares).sqrt()  # (M,)
    scale = (largest / (norm + 1e-6)).clamp(max=1)
    for w in weights.values():
        w.grad *= scale.view(-1, *[1] * (w.dim() - 1))


def train_many(args, seeds, mixtures, device, test_tokens):
    """
    Trains M runs at once. seeds: M numbers; mixtures (M, K); args: fastmix.py's settings, which
    must be the defaults for grad_accum, dtype and compile. Sets must be text, without masks.
    Returns the mean over the targets of the test losses (M,), in nats per token, each on at most
    test_tokens of its target.
    """
    names = args.sources.split(",")
    target_names = args.target.split(",")
    sets = load_sets(args.data_dir, names, target_names, args.block_size)
    sources = [sets[name] for name in names]
    config = GPTConfig(sources[0].vocab_size, args.block_size, args.n_layer, args.n_head,
                       args.n_embd)
    weights = initial_weights(config, seeds, device)
    net = GPT(config).to(device)  # its own weights are placeholders

    # one run's matrices have 2 dimensions, its LayerNorm gains 1; here a first one is added
    matrices = [w for w in weights.values() if w.dim() == 3]
    gains = [w for w in weights.values() if w.dim() == 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    def hidden_states(weights, x):
        with sdpa_kernel(SDPBackend.MATH):  # the one that vmap knows
            return torch.func.functional_call(net, weights, (x,))

    for step in range(args.max_steps):
        x, y = draw_batches(sources, mixtures, seeds, step, args.batch_size)
        h = torch.vmap(hidden_states)(weights, x.to(device)).flatten(1, 2)  # (M, B T, C)
        logits = torch.bmm(h, weights["lm_head.weight"].transpose(1, 2))  # (M, B T, V)
        total = F.cross_entropy(logits.flatten(0, 1), y.to(device).flatten(), reduction="sum")
        loss = total / (args.batch_size * args.block_size)  # the sum of the runs' mean losses
        loss.backward()
        if args.grad_clip:
            clip_gradients(weights, args.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    targets = [sets[name] for name in target_names]
    test_losses = []
    for i in range(len(seeds)):
        net.load_state_dict({name: w[i] for name, w in weights.items()})
        losses = evaluate(net, net.lm_head.weight, targets, "test", test_tokens, EVAL_BATCH)
        test_losses.append(np.mean(list(losses.values())))
    return np.array(test_losses)
