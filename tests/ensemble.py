"""
Many runs of fastmix.py at fixed mixtures, trained at once: their weights lie in tensors with one more dimension, and
every step is one step of all of them. A GPU that is idle most of the time with one small proxy trains hundreds.

Each run has the initialisation, the batches, the optimizer and the evaluation that `python fastmix.py --seed SEED
--mixture MIXTURE` gives it, and the same loss up to rounding: tests/test_bench.py compares them step by step.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmix import draw
from model import GPT, GPTConfig, learning_rate_at
from prepare_data import TokenSet


def draws(runs, mixtures, args, step):
    """
    What fastmix.draw_batch() draws for each of M runs: the sources (M, B), ascending, and the fractions (M, B) of them
    where windows begin. runs are (seed, ...), mixtures (M, K). A seed's generator serves all of its runs.
    """
    drawn, n = {}, args.batch_size
    for seed in {seed for seed, *_ in runs}:
        rng = np.random.default_rng((seed, step, 0))
        drawn[seed] = rng.random(), rng.permutation(mixtures.shape[1]), rng.random(n)
    source = [draw(q, n, *drawn[seed][:2]) for q, (seed, *_) in zip(mixtures, runs)]
    return np.stack(source), np.stack([drawn[seed][2] for seed, *_ in runs])


def train_many(args, runs, device, test_tokens):
    """
    runs: (seed, schedule) for each of M runs, a schedule (P, 1 + K) as read_mixture() returns it. args has fastmix.py's
    settings; sets are text, without masks. Returns the mean over the targets of the test losses, (M,), in nats a token,
    on at most test_tokens of each.
    """
    T, B = args.block_size, args.batch_size
    sources, targets = ([TokenSet(args.data_dir, name, T) for name in names.split(",")]
                        for names in (args.sources, args.target))
    at = np.arange(args.max_steps) / args.max_steps
    mixtures = np.stack([[np.interp(at, s[:, 0], column) for column in s[:, 1:].T] for _, s in runs])  # (M, K, steps)
    sizes = np.array([len(s.tokens("train")) for s in sources])
    first = np.cumsum(sizes) - sizes  # where each source begins among the tokens
    tokens = torch.from_numpy(np.concatenate([s.tokens("train") for s in sources]).astype(np.int32)).to(device)

    config = GPTConfig(sources[0].vocab_size, T, args.n_layer, args.n_head, args.n_embd)
    models = {}
    for seed, _ in runs:
        if seed not in models:
            torch.manual_seed(seed)
            models[seed] = dict(GPT(config).named_parameters())
    with torch.device(device):
        net = GPT(config)
    params = {name: torch.stack([models[seed][name].detach() for seed, _ in runs]).to(device).requires_grad_()
              for name in models[runs[0][0]]}  # each (M, ...)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in params.values() if p.dim() == 3], "weight_decay": args.weight_decay},
         {"params": [p for p in params.values() if p.dim() == 2], "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    def hidden(params, x):
        with sdpa_kernel(SDPBackend.MATH):  # the one that vmap knows
            return torch.func.functional_call(net, params, (x,))

    def logits(x, in_dim):
        h = torch.vmap(hidden, in_dims=(0, in_dim))(params, x).flatten(1, 2)  # (M, B T, C)
        return torch.bmm(h, params["lm_head.weight"].transpose(1, 2))  # (M, B T, V)

    for step in range(args.max_steps):
        source, u = draws(runs, mixtures[:, :, step], args, step)  # (M, B)
        start = first[source]  # (M, B)
        for k, s in enumerate(sources):
            start[source == k] += s.at_fraction("train", u[source == k])
        windows = torch.from_numpy(start).to(device)[..., None] + torch.arange(T + 1, device=device)
        windows = tokens[windows].long()  # (M, B, T + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        x, y = windows[..., :-1], windows[..., 1:]
        loss = F.cross_entropy(logits(x, 0).flatten(0, 1), y.flatten(), reduction="sum") / (B * T)
        loss.backward()  # each run's gradients are those of its own mean
        if args.grad_clip:
            norm = sum(p.grad.flatten(1).square().sum(1) for p in params.values()).sqrt()  # (M,)
            scale = (args.grad_clip / (norm + 1e-6)).clamp(max=1)
            for p in params.values():
                p.grad *= scale.view(-1, *[1] * (p.dim() - 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    result = torch.zeros(len(runs), dtype=torch.float64, device=device)
    with torch.no_grad():
        for target in targets:
            start, total = target.spread("test", test_tokens), 0.0
            for i in range(0, len(start), B):
                x, y = (torch.from_numpy(t).to(device) for t in target.windows("test", start[i: i + B]))
                loss = F.cross_entropy(logits(x, None).flatten(0, 1), y.flatten().repeat(len(runs)), reduction="none")
                total = total + loss.view(len(runs), -1).double().sum(1)
            result += total / (len(start) * T) / len(targets)
    return result.cpu().numpy()
