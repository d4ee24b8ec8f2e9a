"""
FastMix: find how much of each data source to train on, in one training run.

K sources, a mixture alpha of them, a small proxy model w and a target (validation) set. Two nested problems:

    outer:  min over alpha of  L_val(w*(alpha))
    inner:  w*(alpha) = argmin over w of  sum_k alpha_k L_k(w)

Both are descended at once. The inner step is ordinary training; the outer step moves alpha = softmax(z) by the gradient
of the target loss one step ahead, w' = w - eta P sum_k alpha_k g_k. P is an inverse curvature, not AdamW's 1 / sqrt(v),
so that the step points to where training will end: A_k approximates, at the LM head, the implicit derivative of w*:

    (1) weights    draw sources from q = (1 - eps) alpha + eps / K and weight source k's loss by alpha_k / q_k;
                   the expected gradient is sum_k alpha_k g_k for every eps    -> draw(), loss_weights()
    (2) alignment  A_k = <P g_val, g_k>    -> target_gradient(), inverse_curvature(); the pass that trains
                   forms g_k at the head anyway, in chunks of one source at a time    -> FusedWeightedCrossEntropy
    (3) mixture    dL_val(w') / dz_k = -eta alpha_k (A_k - sum_j alpha_j A_j), stepped as mirror
                   descent, A in units of its rms: z_k += rate (A_k - mean) / rms    -> mixture_step()

    python prepare_data.py && python fastmix.py                  search on the sample set, minutes on a 2-core CPU
    python fastmix.py --mixture out/mixture.json --out_dir out-found       train at the mixture that was found

Paper: "FastMix: Fast Data Mixture Optimization via Gradient Descent", Tan et al., ICLR 2026, arXiv 2606.14971.
This implementation's own: P (theirs is 1), a running mean of g_val, the rms, eps < 1 (theirs is 1), masks and bounds.
"""
import argparse
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from model import (GPT, GPTConfig, add_up, asked_to_stop, learning_rate_at, load_sets, open_run, plan, ranks, restore,
                   save_checkpoint, start_machine)
from plot_mixture import append_row, mixture_at, open_log, progress, read_mixture, result_table, save_result
from prepare_data import IGNORE, fail, gather, say

TEST_TOKENS = 2**18  # at most so many tokens of each test split are evaluated at the end
DECAY = 0.9  # what an outer step keeps of the running means G and H


# ---- config ---------------------------------------------------------------------------------------------------------

def parse_args(defaults):
    """Flags -> namespace; `defaults`, such as the settings in a checkpoint, replace the built-in ones."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="python fastmix.py [options]   (--help for all)")
    g = p.add_argument_group("data and output").add_argument
    g("--sources", help="comma-separated names of prepared sources (default: the sample's)")
    g("--target", help="set or sets to do well on, such as a,b or a=2,b=1 (default: the sources' own, or the sample's)")
    g("--data_dir", default="data", help="where prepare_data.py wrote (%(default)s)")
    g("--out_dir", default="out", help="gets log.jsonl, ckpt.pt and mixture.json (%(default)s)")
    g("--init_from", help="start from the weights in this checkpoint; the model's flags default to what it has")
    g("--resume", action="store_true", help="go on from out_dir/ckpt.pt, with the settings stored there")
    g = p.add_argument_group("mixture (the outer problem)").add_argument
    g("--mixture", help="train at this mixture instead of searching: mixture.json, log.jsonl (replays its trajectory), "
                        "uniform, proportional (to tokens) or a=0.8,b=0.2")
    g("--uniform_share", type=float, default=0.25, help="eps, the uniform share of a search's draws (%(default)s)")
    g("--outer_every", type=int, default=1, help="optimizer steps between two outer steps (%(default)s)")
    g("--learning_rate_mixture", type=float, default=0.02, help="step on z at one rms above the mean (%(default)s)")
    g("--target_batch_size", type=int, default=2, help="target sequences an outer step (%(default)s)")
    g("--train_tokens", type=float, help="of the later, real run: caps shares, sets repetition as it will be")
    g("--max_epochs", type=float, default=4.0, help="most epochs of a source in --train_tokens (%(default)s)")
    g("--bounds", help="least and largest shares of a search by name, such as web=0.1:0.5,code=:0.3")
    g = p.add_argument_group("model").add_argument
    g("--n_layer", type=int, default=2, help="blocks (%(default)s)")
    g("--n_head", type=int, default=4, help="attention heads (%(default)s)")
    g("--n_embd", type=int, default=128, help="channels (%(default)s)")
    g("--block_size", type=int, default=64, help="context, in tokens (%(default)s)")
    g = p.add_argument_group("training (the inner problem)").add_argument
    g("--batch_size", type=int, default=16, help="sequences a micro-batch, over all devices (%(default)s)")
    g("--grad_accum", type=int, default=1, help="micro-batches an optimizer step (%(default)s)")
    g("--max_steps", type=int, default=2400, help="optimizer steps (%(default)s)")
    g("--learning_rate", type=float, default=4e-3, help="AdamW's peak; a cosine takes it to a tenth (%(default)s)")
    g("--warmup_steps", type=int, default=50, help="optimizer steps of linear warm-up (%(default)s)")
    g("--weight_decay", type=float, default=0.1, help="on matrices and embeddings (%(default)s)")
    g("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 for none (%(default)s)")
    g = p.add_argument_group("machine and reports").add_argument
    g("--seed", type=int, default=1337, help="of initialisation, training batches and target batches (%(default)s)")
    g("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run (%(default)s)")
    g("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU that has it")
    g("--compile", action="store_true", help="torch.compile the model")
    g("--log_every", type=int, default=50, help="steps between reports: line, evaluation, checkpoint (%(default)s)")
    g("--eval_tokens", type=int, default=8192, help="tokens of each val split in an evaluation (%(default)s)")
    p.set_defaults(**defaults)
    args = p.parse_args()
    most = 2**63 - 1
    limits = {"seed": (0, most), "warmup_steps": (0, most), "uniform_share": (0, 1), "train_tokens": (1, most)}
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low, high = limits.get(name, (1, most) if type(value) is int else (0, 1e300))
            if not low <= value <= high:
                fail(f"--{name} {value} is not a number between {low} and {high:g}")
    return args


# ---- (1) draws, weights and the loss --------------------------------------------------------------------------------

def draw(q, n, offset, order):
    """
    Systematic sampling of n sequences over sources with probabilities q (K,): n equally spaced points, moved by one
    offset in [0, 1), on the cumulative q. Source k gets floor(n q_k) or ceil(n q_k) of them, n q_k in expectation.
    order is how sources lie along that line, a permutation new at each step: in a fixed order two neighbours with small
    q would never share a batch. Returns the sequences' sources, (n,) ascending.
    """
    edges = np.cumsum(q[order])
    place = np.searchsorted(edges / edges[-1], (np.arange(n) + offset) / n, side="right")
    return np.sort(order[np.minimum(place, len(q) - 1)])  # the last point may be rounded up to 1


def draw_batch(sets, split, q, n, rng):
    """
    n sequences of a split, drawn over the sets by q (K,). Returns the set of each, (n,) in numpy; and as tensors, of
    this process's part, the set (B,), inputs and next-token targets (B, T). Everything is ordered by set.
    """
    source = draw(np.asarray(q), n, rng.random(), rng.permutation(len(q)))
    rank, world = ranks()
    mine, u = source[rank::world], rng.random(n)[rank::world]
    x, y = gather(sets, split, mine, u)
    return source, *(torch.from_numpy(t) for t in (mine, x, y))


def loss_weights(alpha, q, density):
    """
    Formula (1): alpha_k / q_k, (K,), the weight of source k's tokens when sequences are drawn by q (K,); over the share
    of tokens that is learned, of which density (K,) is by source. NaN, and not used, for one neither wanted nor drawn.
    """
    return alpha / (q * (alpha * density).sum())


class FusedWeightedCrossEntropy(torch.autograd.Function):
    """
    The LM head and its loss, sum_t coef_t loss_t, in one walk over the tokens that never holds more than chunk x V
    logits. Gradients are computed on the way, while the logits are there: with the hidden state h_t, the softmax p_t
    and the one-hot target y_t, the gradient of loss_t is W^T (p_t - y_t) for h_t and (p_t - y_t) h_t^T for the head W.

    hidden (N, C), weight (V, C), targets (N,) with IGNORE where nothing is learned, coef (N,); ends (K,): where each
    source's tokens end; PG (V, C) or None, the target's gradient times P. Returns the loss; token_loss (N,), in nats;
    and parts (K,), zeros without PG: the sum over each source's tokens of coef_t <PG, (p_t - y_t) h_t^T>.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, coef, PG, ends, chunk):
        (N, C), V, device = hidden.shape, len(weight), hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)  # softmax and sums: bfloat16 has 8 significant bits
        # a chunk's logits are about as many numbers as the hidden states and the head, which are in memory anyway
        chunk = min(N, chunk or max(64 if device == "cpu" else 4096, (N + V) * C // V))
        need_h, need_W = ctx.needs_input_grad[:2]
        W = weight.to(dtype)
        logits, dW = (torch.empty(n, d, dtype=dtype, device=hidden.device) for n, d in ((chunk, V), (V, C)))
        token_loss, grad_h, grad_W, parts = (torch.zeros(shape, dtype=wide, device=hidden.device)
                                             for shape in (N, hidden.shape, weight.shape if need_W else 0, len(ends)))
        with torch.autocast(device, enabled=False):
            for i in range(0, N, chunk):
                s = slice(i, min(i + chunk, N))
                h, is_learned, y = hidden[s].to(dtype), targets[s] != IGNORE, targets[s].clamp(min=0)[:, None]
                log_p = torch.log_softmax(torch.mm(h, W.T, out=logits[: len(h)]), 1, dtype=wide)  # (n, V)
                token_loss[s] = -log_p.gather(1, y).squeeze(1) * is_learned
                if need_h or need_W:  # log p becomes p, then p - y, in place
                    p = log_p.exp_().scatter_add_(1, y, torch.full_like(log_p[:, :1], -1.0)).to(dtype)
                if need_h:
                    grad_h[s] = (p @ W) * coef[s, None]
                if need_W:
                    weighted_h = (h * coef[s, None]).to(dtype)
                    for k, (start, end) in enumerate(zip([0, *ends], ends)):
                        of_k = slice(max(start - i, 0), min(end - i, len(h)))  # the chunk's tokens from source k
                        if of_k.start < of_k.stop:
                            torch.mm(p[of_k].T, weighted_h[of_k], out=dW)  # (V, C), from tokens of source k alone
                            grad_W += dW
                            if PG is not None:
                                parts[k] += torch.dot(PG.flatten(), dW.flatten().to(wide))
        ctx.save_for_backward(grad_h.to(hidden.dtype), grad_W.to(weight.dtype), token_loss.to(coef.dtype))
        ctx.mark_non_differentiable(token_loss, parts)
        return (coef * token_loss).sum(), token_loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_h, grad_W, grad_coef = (g * grad_loss for g in ctx.saved_tensors)
        return grad_h, grad_W, None, grad_coef, None, None, None


def fused_cross_entropy(hidden, weight, targets, r=None, divisor=None, PG=None, ends=None, chunk=None):
    """
    Weighted next-token loss from hidden states, sum_t r_t loss_t / divisor. hidden (N, C), weight (V, C), targets (N,),
    r (N,) weights of the tokens (None: all 1), divisor a number (None: sum_t r_t, for the mean). Returns (loss in nats,
    token_loss (N,), parts (K,)), see above. Targets that are IGNORE count nowhere; a mean over nothing is NaN.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # tells the walk that no gradient is wanted
    r = torch.ones_like(targets, dtype=torch.promote_types(hidden.dtype, torch.float32)) if r is None else r
    r = r * (targets != IGNORE)
    coef = r / (r.sum() if divisor is None else divisor)
    return FusedWeightedCrossEntropy.apply(hidden, weight, targets, coef, PG, ends or [len(targets)], chunk)


def batch_loss(model, head, x, y, r, n_tokens, PG=None, ends=None):
    """
    A micro-batch's part of the step's loss, sum_t r_t loss_t / n_tokens. x, y (B, T); r (B,) weights of its sequences;
    n_tokens is of the whole step, learned or not; to divide by the sum of weights instead would bias the expected
    gradient away from sum_k alpha_k g_k. Returns (loss, token_loss (B, T), parts (K,)).
    """
    hidden = model(x)  # (B, T, C)
    loss, token_loss, parts = fused_cross_entropy(hidden.flatten(0, 1), head, y.flatten(),
                                                  r.repeat_interleave(x.shape[1]), n_tokens, PG, ends)
    return loss, token_loss.view_as(y), parts


# ---- (2) alignment --------------------------------------------------------------------------------------------------

def target_gradient(model, head, x, y, r, n_tokens):
    """
    Over a target batch's learned tokens, with batch_loss()'s arguments: the gradient at the head, sum_t r_t (p_t - y_t)
    h_t^T / n_tokens, (V, C); and sum_t r_t h_t h_t^T / n_tokens, (C, C). No backward pass through the model.
    """
    r = r.repeat_interleave(x.shape[1])  # (B T,)
    with torch.no_grad():
        h = model(x).flatten(0, 1).to(head.dtype)  # (B T, C)
    loss = fused_cross_entropy(h, head, y.flatten(), r, n_tokens)[0]
    with torch.autocast(x.device.type, enabled=False):
        return torch.autograd.grad(loss, head)[0], h.T @ (h * (r * (y.flatten() != IGNORE))[:, None]) / n_tokens


def inverse_curvature(G, H, head, optimizer):
    """
    P G, (V, C), for a target's gradient G (V, C). P inverts the curvature of the loss at the head by K-FAC (Martens and
    Grosse, arXiv 1503.05671), up to scale: E[(p - y)^2] by rows, as the row means of AdamW's v are, times E[h h^T], of
    which H (C, C) is the target's. A tenth of its mean is added to each, against noise.
    """
    v = optimizer.state[head].get("exp_avg_sq")  # none before the first step
    rows = torch.ones_like(G[:, :1]) if v is None else v.mean(1, keepdim=True)  # (V, 1)
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return G / (rows + 0.1 * rows.mean()) @ torch.linalg.inv_ex(damped)[0]  # inv() would wait for a GPU


# ---- (3) the mixture ------------------------------------------------------------------------------------------------

def mixture_step(z, A, present, rate):
    """
    Formula (3) as a step of mirror descent on the simplex, on logits z (K,) in place: by the gradient over alpha; the
    one over z has a factor alpha_k and would leave a source that lost its weight where it is. A (K,) alignments, in
    units of their rms, for a gradient's scale says nothing. present (K,): a source not in the batch keeps its logit.
    """
    alpha = torch.softmax(z, 0)
    share = alpha * present / (alpha * present).sum()  # (K,) among the sources present
    A = torch.where(present, A, 0.0)
    mean, rms = (share * A).sum(), (share * A**2).sum().sqrt().clamp(min=1e-18)
    z += torch.where(present, rate * (A - mean) / rms, 0.0)
    z.clamp_(min=z.max() - 18)  # alpha stays above 1e-8 of the largest: no source's part of a gradient underflows


def within_bounds(z, lower, upper):
    """
    Projects a mixture in Kullback-Leibler divergence on lower <= alpha <= upper, each (K,), on its logits z (K,) in
    place: alpha_k becomes clip(c alpha_k, lower_k, upper_k) with the c, found by bisection, that makes the sum 1.
    """
    alpha = torch.softmax(z, 0)
    if ((alpha < lower) | (alpha > upper)).any():
        low, high = 0.0, 1 / alpha.min().item()  # c with which all are at their lower bounds; at their upper ones
        for _ in range(100):
            c = (low + high) / 2
            low, high = (low, c) if (c * alpha).clamp(lower, upper).sum() > 1 else (c, high)
        z.copy_((c * alpha).clamp(lower, upper).log())


def per_drawn_token(A, alpha, density, present):
    """
    Alignments (K,) per learned token -> per token drawn, where density (K,) of the tokens is learned. Of n tokens n M
    are, M = sum_k alpha_k density_k, in shares beta_k = alpha_k density_k / M. A run is finite, and AdamW divides by
    the gradient's noise, which falls with the root of n M: so training goes along sqrt(M) sum_k beta_k g_k, the target
    falls by sqrt(M) sum_k beta_k A_k, and its derivative by alpha_k is sqrt(M) (density_k / M) (A_k - mean / 2). Half
    the mean is added to all, so that equal densities leave A as it is.
    """
    share = alpha * present / (alpha * present).sum()  # (K,) among the sources present
    M, A = (share * density).sum(), torch.where(present, A, 0.0)
    mean = (share * density / M * A).sum()
    return density / M * (A - mean / 2) + mean / 2


# ---- the loop -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, head, data, split, max_tokens, batch_size):
    """Mean loss in nats a learned token over windows spread evenly over a split: always the same, nothing is drawn."""
    rank, world = ranks()
    start, sums = data.spread(split, max_tokens)[rank::world], torch.zeros(2, device=head.device)
    batch_size = batch_size // world  # it counts all processes
    for i in range(0, len(start), batch_size):
        x, y = (torch.from_numpy(t).to(head.device) for t in data.windows(split, start[i: i + batch_size]))
        loss = fused_cross_entropy(model(x).flatten(0, 1), head, y.flatten(), divisor=1)[0]
        sums += torch.stack([loss.float(), (y != IGNORE).sum()])
    total, learned = add_up(sums).tolist()
    return total / learned if learned else math.nan


def main():
    args, ckpt = open_run(parse_args)
    sources, targets, target_weights = load_sets(args, ckpt)
    device, autocast = start_machine(args)
    out, searching, rank = Path(args.out_dir), args.mixture is None, ranks()[0]
    names, K, T = [s.name for s in sources], len(sources), args.block_size
    sets = dict.fromkeys((*sources, *targets))  # each once, in order
    n_sequences = args.batch_size * args.grad_accum
    tokens_per_step = n_sequences * T
    available = torch.tensor([s.available("train") for s in sources])  # (K,) tokens to train on
    density = torch.tensor([s.density("train") for s in sources], dtype=torch.float64)  # (K,) learned per token drawn
    lower, upper = torch.from_numpy(plan(args, sources, n_sequences))  # (K,); sets how much each source shows, too
    schedule = read_mixture("uniform" if searching or args.resume else args.mixture, names, available.tolist())

    # model, optimizer and state: with the settings, all that a checkpoint holds
    torch.manual_seed(args.seed)
    net = GPT(GPTConfig(sources[0].vocab_size, T, args.n_layer, args.n_head, args.n_embd)).to(device)
    model = torch.compile(net) if args.compile else net
    head = net.lm_head.weight  # (V, C)
    optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay, (0.9, 0.95), fused=device != "mps")
    state = SimpleNamespace(
        step=0, reported=-1, seconds=0.0,  # steps done, and when the last report was written; time taken
        z=torch.zeros(K, dtype=torch.float64),  # (K,) logits of the mixture, alpha = softmax(z)
        G=torch.zeros_like(head.data),  # (V, C) running mean of the target's gradient, up to scale
        H=torch.zeros(args.n_embd, args.n_embd, device=device),  # (C, C) running mean of its h h^T, up to scale
        schedule=torch.from_numpy(schedule),  # (P, 1 + K) fractions of the run and mixtures there; not for a search
        run_sum=torch.zeros(K, dtype=torch.float64), half_sum=torch.zeros(K, dtype=torch.float64),  # of alpha
        drawn=torch.zeros(K, dtype=torch.int64))  # tokens seen of each source
    within_bounds(state.z, lower, upper)
    if ckpt:
        restore(ckpt, net, *([optimizer, state] if args.resume else []))
    settings = {"args": vars(args), "config": vars(net.config), "tokenizer": sources[0].tokenizer,
                "digests": {s.name: s.digest for s in sets}}
    log = open_log(out, state.step if args.resume else -1, names)
    say(f"{net.num_params():,} parameters, {tokens_per_step:,} tokens a step, {device}, sources {args.sources}; "
        f"target {args.target}; {'searching' if searching else f'mixture {args.mixture}'}")

    # sums since the last report; the names on the left are rows of one tensor
    loss_sum, learned_sum = sums = torch.zeros(2, K, device=device)  # of each source, over its learned tokens
    alignment_sum, times_present = measured = torch.zeros(2, K, dtype=torch.float64)
    weighted_loss = torch.zeros((), device=device)
    clock, stop = time.time(), asked_to_stop()  # stop: a list that Ctrl-C fills
    while True:
        step, last = state.step, state.step >= args.max_steps
        alpha = torch.softmax(state.z, 0) if searching else mixture_at(state.schedule, step / args.max_steps)  # (K,)

        # ---- report: evaluate, log, save
        if (step % args.log_every == 0 or last or stop) and step > state.reported:
            with autocast:
                target_losses = {t.name: evaluate(model, head, t, "val", args.eval_tokens, args.batch_size)
                                 for t in targets}
            taken, seconds = step - max(state.reported, 0), time.time() - clock
            train_loss = add_up(weighted_loss).item() / max(taken, 1)
            target_loss = float(np.dot(target_weights, list(target_losses.values())))
            if not all(t.isfinite().all() for t in (torch.tensor(train_loss + target_loss), alpha, *net.parameters())):
                fail(f"the loss is no longer finite at step {step}; the last good checkpoint stays. Lower "
                     f"--learning_rate {args.learning_rate:g} in a new run, or --resume if it was the machine")
            state.seconds, state.reported, clock = state.seconds + seconds, step, clock + seconds
            row = append_row(
                log, names, step=step, max_steps=args.max_steps, alpha=alpha, alignment=alignment_sum / times_present,
                train_loss=train_loss if taken else None, source_loss=loss_sum / learned_sum,
                target_val_loss=target_loss, target_losses=target_losses, tokens=step * tokens_per_step,
                seconds=round(state.seconds, 3), lower=lower, upper=upper)
            say(progress(row, taken / seconds))
            for t in (sums, measured, weighted_loss):
                t.zero_()
            save_checkpoint(out / "ckpt.pt", net, optimizer, state, settings)
        if last:
            break
        if stop:
            say(f"stopped at step {step}; go on with: python fastmix.py --resume --out_dir {out}")
            raise SystemExit(130)

        # ---- outer step, first half: the target's gradient, averaged over outer steps, times P
        outer, PG = searching and step % args.outer_every == 0, None
        if outer:
            rng = np.random.default_rng((args.seed, step, 1))  # of the step, so that a run that goes on draws the same
            _, which, x, y = draw_batch(targets, "val", target_weights, args.target_batch_size, rng)
            # over its density, so that a target counts by its weight, however few of its tokens are learned
            r = torch.tensor([1 / t.density("val") for t in targets])[which]
            x, y, r = (tensor.to(device) for tensor in (x, y, r))
            with autocast:
                g_val, h_val = target_gradient(model, head, x, y, r, args.target_batch_size * T)
            add_up(g_val, h_val)
            state.G.lerp_(g_val, 1 - DECAY)
            state.H.lerp_(h_val, 1 - DECAY)
            PG = inverse_curvature(state.G, state.H, head, optimizer)

        # ---- inner step: train on sequences drawn by q, weighted by alpha / q
        eps = args.uniform_share if searching else 0.0
        q = (1 - eps) * alpha + eps / K  # (K,)
        rng = np.random.default_rng((args.seed, step, 0))
        source, mine, x, y = draw_batch(sources, "train", q, n_sequences, rng)
        weights = loss_weights(alpha, q, density)  # (K,)
        k, x, y, r = (t.to(device) for t in (mine, x, y, weights[mine].float()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        step_loss, step_learned, parts = step_sums = torch.zeros(3, K, device=device)
        for micro in range(args.grad_accum):  # every grad_accum-th sequence, so that each spans the sources
            m = slice(micro, None, args.grad_accum)
            ends = (torch.bincount(mine[m], minlength=K).cumsum(0) * T).tolist() if outer else None
            with autocast:
                loss, token_loss, part = batch_loss(model, head, x[m], y[m], r[m], tokens_per_step, PG, ends)
            loss.backward()
            step_loss.index_add_(0, k[m], token_loss.sum(1))
            step_learned.index_add_(0, k[m], (y[m] != IGNORE).float().sum(1))
            parts += part
            weighted_loss += loss.detach()
        add_up(step_sums, *(p.grad for p in net.parameters()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += step_sums[:2]

        # ---- outer step, second half: move the mixture
        if outer:
            _, learned, parts = step_sums.cpu().double()  # each (K,)
            present = learned > 0
            A = parts * tokens_per_step / (weights * learned)  # a mean over learned tokens, without the loss weight
            measured += torch.stack([torch.where(present, A, 0.0), present])
            A = per_drawn_token(A, alpha, density, present)  # the same, where no set has masks
            mixture_step(state.z, A, present, args.learning_rate_mixture)
            within_bounds(state.z, lower, upper)
        state.run_sum += alpha
        state.half_sum += alpha * (step >= args.max_steps // 2)
        state.drawn += torch.bincount(torch.from_numpy(source), minlength=K) * T
        state.step += 1

    # ---- results
    with autocast:
        val = {s.name: evaluate(model, head, s, "val", args.eval_tokens, args.batch_size) for s in sets}
        test = {t.name: evaluate(model, head, t, "test", TEST_TOKENS, args.batch_size) for t in targets}
    if rank == 0:
        bytes_per_token, tokens_per_document = torch.tensor([s.averages() for s in sources]).T  # (K,)
        result = save_result(
            out, names, searched=searching,
            targets={t.name: {"weight": weight, "val_loss": val[t.name], "test_loss": test[t.name],
                              "test_bits_per_byte": test[t.name] / math.log(2) * t.tokens_per_byte("test"),
                              "learned_only": t.masked} for t, weight in zip(targets, target_weights)},
            mixtures={"last": alpha, "last_half_average": state.half_sum, "run_average": state.run_sum},
            sources={"tokens_available": available, "tokens_seen": state.drawn, "lower": lower, "upper": upper,
                     "val_loss": torch.tensor([val[n] for n in names]),
                     "bytes_per_token": bytes_per_token, "tokens_per_document": tokens_per_document},
            tokenizer=settings["tokenizer"], seed=args.seed, steps=step, tokens=step * tokens_per_step,
            seconds=round(state.seconds, 1), torch=torch.__version__, settings=vars(args))
        say(f"\n{result_table(result)}\nwrote {out}/mixture.json, log.jsonl and ckpt.pt; draw them with: "
            f"python plot_mixture.py {out}")


if __name__ == "__main__":
    main()
