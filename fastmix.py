"""
FastMix: find how much of each data source to train on, in one training run.

K sources, a mixture alpha of them (shares that sum to 1), a small proxy model w and a target, which
is a validation set to do well on. Two nested problems:

    outer:  min over alpha of  L_val(w*(alpha))
    inner:  w*(alpha) = argmin over w of  sum_k alpha_k L_k(w)

Both are descended at once. Inner steps train w on the mixture of the moment. Outer steps move
alpha = softmax(z) by how well each source's gradient g_k agrees with the target's, g_val.

    (1) weights    draw sources from q = (1 - eps) alpha + eps / K, and weight their losses by
                   r_k = alpha_k / q_k: the expected gradient is sum_k alpha_k g_k for every eps
                   -> draw(), source_weights(), batch_loss()
    (2) alignment  A_k = <P g_val, g_k>. The paper has P = 1: how much does a step of gradient
                   descent on source k lower the target's loss? --curvature chooses P.
                   -> target_gradient(), preconditioned(), FusedWeightedCrossEntropy, alignments()
    (3) mixture    dL_val / dz_k = -alpha_k (A_k - sum_j alpha_j A_j), by the softmax; the step is
                   z_k += rate (A_k - mean) / scale, mirror descent; scale is a running rms of A
                   -> mixture_step()

The default P looks further than one step. Let H be the curvature (the Hessian) of the training loss
at the mixture. At the inner optimum the g_k balance, and the implicit function theorem says how it
moves: dw*/dalpha_k = -H^-1 g_k. By the chain rule -<g_val, H^-1 g_k> is dL_val(w*(alpha)) /
dalpha_k, the derivative of the outer problem. Hence P is about H^-1, up to a scale. It is taken at
the LM head alone, as if the rest of the model, the body, were held fixed, and at the w of the
moment. So -A_k only approximates that derivative, the better the nearer w is to w*.

The pass that trains forms the sources' gradients at the head anyway, so that an outer step costs
little more than one forward pass of a few target sequences.

    python fastmix.py                             search on the sample, minutes on a 2-core CPU
    python fastmix.py --mixture out/mixture.json --out_dir out-found    train at what was found
    python fastmix.py --curvature none --uniform_share 1 --outer_every 20      nearest to the paper

Paper: "FastMix: Fast Data Mixture Optimization via Gradient Descent", Tan et al., ICLR 2026, arXiv
2606.14971. The method's page in README.md ends with what is the paper's and what is ours.
"""
import signal

if __name__ == "__main__":
    # until main() starts, Ctrl-C ends the program at once, without a traceback from an import
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from model import GPT, GPTConfig, load_checkpoint, restore, save_checkpoint
from plot_mixture import draw_run, result_table
from prepare_data import (IGNORE, SAMPLE_TARGETS, fail, gather, load_sets, prepare_sample,
                          sample_sources, save_atomically, say)

DECAY = 0.9  # what an outer step keeps of the running means G and S, see preconditioned()
SCALE_DECAY = 0.98  # and of the running mean of the alignments' rms, see mixture_step()
DAMPING = 1.0  # added to each factor of the curvature, times the mean of its diagonal
CACHED = 2**19  # numbers of the head's gradient that fit into a CPU core's cache, with some room
TEST_TOKENS = 2**18  # at most so many tokens of each test split are evaluated at the end
# a run may be resumed with these changed; with anything else changed it would be another run
MAY_CHANGE = ("resume", "out_dir", "data_dir", "device", "compile", "log_every")
MAY_BE_ZERO = ("seed", "warmup_steps")  # all other integers are 1 or more


# ---- flags -------------------------------------------------------------------------------------

def parse_args(argv=None, defaults={}):
    """Flags -> namespace. `defaults`, such as a checkpoint's flags, replace the built-in ones."""
    p = argparse.ArgumentParser(description=__doc__, usage="python fastmix.py [options]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data and output").add_argument
    g("--sources", help="comma-separated names of prepared sets (default: the sample's)")
    g("--target", help="sets to do well on: a,b or a=2,b=1 (default: the sample's, or --sources)")
    g("--data_dir", default="data", help="where prepare_data.py wrote (data)")
    g("--out_dir", default="out", help="gets mixture.json, mixture.png, log.jsonl, ckpt.pt (out)")
    g("--init_from", help="start from the weights in this checkpoint")
    g("--resume", action="store_true", help="resume from out_dir/ckpt.pt, with its settings")
    g = p.add_argument_group("mixture (the outer problem)").add_argument
    g("--mixture", help="train at this one, without a search: a mixture.json, uniform, "
                        "proportional (to tokens) or a=0.8,b=0.2")
    g("--curvature", choices=("none", "adamw", "kfac"), default="kfac",
      help="P in A_k = <P g_val, g_k>: none is P = 1, as in the paper (kfac)")
    g("--uniform_share", type=float, default=0.25, help="of a search's draws, eps (0.25)")
    g("--outer_every", type=int, default=1, help="steps from one outer step to the next (1)")
    g("--learning_rate_mixture", type=float,
      help="first step size on z (2 / sqrt(number of outer steps), at most 0.2)")
    g("--target_batch_size", type=int, default=2, help="target sequences per outer step (2)")
    g("--train_tokens", type=float, help="of the real run: repeat text as it will")
    g("--max_epochs", type=float, help="most epochs of a source in --train_tokens (no limit)")
    g("--bounds", help="least and largest shares by name, such as web=0.1:0.5,code=:0.3")
    g = p.add_argument_group("model").add_argument
    g("--n_layer", type=int, default=2, help="blocks (2)")
    g("--n_head", type=int, default=4, help="attention heads (4)")
    g("--n_embd", type=int, default=128, help="channels (128)")
    g("--block_size", type=int, default=64, help="context, in tokens (64)")
    g = p.add_argument_group("training (the inner problem)").add_argument
    g("--batch_size", type=int, default=16, help="sequences per micro-batch, all devices (16)")
    g("--grad_accum", type=int, default=1, help="micro-batches per optimizer step (1)")
    g("--max_steps", type=int, default=2400, help="optimizer steps (2400)")
    g("--learning_rate", type=float, default=4e-3, help="peak; a cosine ends at a tenth (0.004)")
    g("--warmup_steps", type=int, default=50, help="steps of linear warm-up (50)")
    g("--weight_decay", type=float, default=0.1, help="of matrices and embeddings (0.1)")
    g("--grad_clip", type=float, default=1.0, help="largest norm of the gradient, 0: no clip (1)")
    g = p.add_argument_group("machine and reports").add_argument
    g("--seed", type=int, default=1337, help="of initialisation and draws (1337)")
    g("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
      help="auto is bfloat16 on a GPU that has it, float32 elsewhere")
    g("--compile", action="store_true", help="torch.compile the model")
    g("--log_every", type=int, default=50, help="steps between reports and checkpoints (50)")
    g("--eval_tokens", type=int, default=8192, help="of each val split per evaluation (8192)")
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = 0 if type(value) is float or name in MAY_BE_ZERO else 1
            if not least <= value < 2**63:
                fail(f"--{name} {value} is out of range; it must be {least} or more")
    for name in ("data_dir", "out_dir", "init_from", "bounds"):
        if getattr(args, name) == "":
            fail(f"--{name} is empty; leave it out, or give it a value")
    for name in ("train_tokens", "max_epochs"):
        if getattr(args, name) == 0:
            fail(f"--{name} 0 is out of range; it must be above 0")
    if args.uniform_share > 1:
        fail(f"--uniform_share {args.uniform_share} is out of range; it must be from 0 to 1")
    if args.learning_rate_mixture and args.learning_rate_mixture > 1e6:  # z would lose its digits
        fail(f"--learning_rate_mixture {args.learning_rate_mixture} is out of range; it must be "
             "at most 1e6")
    if args.max_epochs and not args.train_tokens:
        fail("--max_epochs counts epochs of the real run; give --train_tokens, too")
    if args.mixture and (args.bounds or args.max_epochs):
        fail("--bounds and --max_epochs are for a search; leave them out with --mixture")
    if args.learning_rate_mixture is None:
        # The noise of n steps of one size adds up to sqrt(n) times that size. With 1 / sqrt(n) it
        # is the same for a search of any length, while what the sources differ by adds up to more.
        n_outer = max(1, args.max_steps / args.outer_every)
        args.learning_rate_mixture = min(0.2, 2 / math.sqrt(n_outer))
    return args


def parse_pairs(flag, text):
    """The lists of --sources, --target, --mixture, --bounds: "a=1,b" -> {"a": "1", "b": ""}."""
    pairs = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        name = name.strip()
        if not name:
            fail(f"{flag} '{text}' has an empty name; give names separated by commas")
        if name in pairs:
            fail(f"{flag} '{text}' names {name} twice")
        pairs[name] = value.strip()
    return pairs


def parse_weights(flag, text):
    """a=2,b=1 -> {name: weight}; a name alone weighs 1."""
    weights = {}
    for name, value in parse_pairs(flag, text).items():
        try:
            weights[name] = float(value or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            fail(f"{flag} '{text}': the weight of {name}, '{value}', is no number from 0 up")
    if not 0 < sum(weights.values()) < math.inf:
        fail(f"{flag} '{text}': the weights sum to {sum(weights.values())}, so they give no shares")
    return weights


def open_run(argv):
    """
    The flags of a run, and the checkpoint that it starts from or None -> (args, ckpt). --resume
    takes all flags from out_dir/ckpt.pt, --init_from the model's from another run's. An out_dir
    that holds another run is refused.
    """
    args = parse_args(argv)
    out = Path(args.out_dir)
    if args.resume:
        path = out / "ckpt.pt"
        ckpt = load_checkpoint(path, "leave --resume out, or correct --out_dir")
        stored = ckpt["args"]
        if stored.keys() != vars(args).keys():
            fail(f"{path} has other settings than this fastmix.py; start a new run elsewhere")
        # stored flags become the defaults; those given again must agree with them
        # (but where the checkpoint lies is said now: the folder may have been moved or copied)
        args = parse_args(argv, {flag: stored[flag] for flag in stored
                                 if flag not in ("resume", "out_dir")})
        for flag, value in vars(args).items():
            if flag not in MAY_CHANGE and value != stored[flag]:
                fail(f"{path} was made with --{flag} {stored[flag]}, not {value}; resume without "
                     "that flag, or start a new run in another --out_dir")
        return args, ckpt

    held = [name for name in ("log.jsonl", "ckpt.pt", "mixture.json") if (out / name).exists()]
    if held:
        resume = "add --resume to resume it, " if "ckpt.pt" in held else ""
        fail(f"{out}/ holds another run ({', '.join(held)}); {resume}choose another --out_dir, or "
             "delete those files")
    ckpt = None
    if args.init_from:
        ckpt = load_checkpoint(args.init_from, "--init_from takes a ckpt.pt of fastmix.py")
        config = ckpt["config"]
        flags = ("n_layer", "n_head", "n_embd")
        args = parse_args(argv, {flag: config[flag] for flag in (*flags, "block_size")})
        for flag in flags:
            if getattr(args, flag) != config[flag]:
                fail(f"{args.init_from} has --{flag} {config[flag]}, not {getattr(args, flag)}; "
                     "leave the flag out")
    return args, ckpt


# ---- (1) draws, weights and the loss -----------------------------------------------------------
# (the loss also forms the parts of the head's gradient that (2) needs, so it stands here)

def draw(q, n, offset, order):
    """
    Systematic sampling of n sequences over sources with probabilities q (K,): n equally spaced
    points, moved by one offset in [0, 1), on the cumulative q. Source k gets floor(n q_k) or
    ceil(n q_k) of them, n q_k on average: less noise than n independent draws. A source with
    n q_k < 1 is missing in some batches. order is how the sources lie along that line, a
    permutation new at each step: in a fixed order two neighbours with small q would never share a
    batch. Returns the sequences' sources, (n,) ascending.
    """
    edges = np.cumsum(q[order])
    points = (np.arange(n) + offset) / n
    place = np.searchsorted(edges / edges[-1], points, side="right")
    place = np.minimum(place, len(q) - 1)  # the last point may be rounded up to 1
    return np.sort(order[place])


def draw_batch(sets, split, q, n, rng):
    """
    n sequences of a split, drawn over the sets by q (K,); each process takes its part of them.
    Returns tensors: the sequences' sources (B,), ascending, and their inputs and labels (the next
    tokens), each (B, T).
    """
    source = draw(np.asarray(q), n, rng.random(), rng.permutation(len(q)))
    u = rng.random(n)  # where in its source each sequence begins, as a fraction
    rank, world = ranks()
    source = source[rank::world]  # every world-th, so that each process gets a bit of each source
    x, y = gather(sets, split, source, u[rank::world])
    return torch.from_numpy(source), torch.from_numpy(x), torch.from_numpy(y)


def source_weights(alpha, q, density):
    """
    Formula (1): r (K,), the loss weight of each source when tokens are drawn by q (K,). Without
    masks that is alpha_k / q_k. With masks only a share density_k of source k's tokens is learned.
    At the mixture alpha a share M = sum_k alpha_k density_k of all tokens is, and source k has
    beta_k = alpha_k density_k / M of those. Training then minimises sum_k beta_k L_k, so that
    r_k = beta_k / (q_k density_k) = alpha_k / (q_k M). NaN, and never used, for a source that is
    neither wanted nor drawn.
    """
    M = (alpha * density).sum()
    return alpha / (q * M)


def pieces(start, end, ends):
    """
    The tokens from start to end (a chunk) cut by source: yields (source, slice of the chunk). The
    tokens lie in order of their sources, and ends (K,) are the positions where each source ends.

        sources   |-------- 0 --------|--- 1 ---|---------- 2 ----------|
        chunks    |------------|------------|------------|--------------|
        pieces    |---- 0 -----|-- 0 -|- 1 -|- 1 -|-- 2 -|----- 2 ------|
    """
    source_start = 0
    for k, source_end in enumerate(ends):
        low = max(start, source_start)
        high = min(end, source_end)
        if low < high:
            yield k, slice(low - start, high - start)
        source_start = source_end


def add_head_gradient(grad_head, parts, p_minus_y, weighted_h, PG, chunk_pieces):
    """
    Adds to grad_head (V, C), in place, what a chunk of n tokens contributes to the head's gradient:
    the sum of (p_t - y_t) (weight_t h_t)^T over its tokens. With PG (V, C) the sum is formed source
    by source, as dW_k, and <PG, dW_k> is added to parts (K,). p_minus_y is (n, V), weighted_h is
    (n, C), and chunk_pieces is a list of what pieces() yields for the chunk.
    """
    if PG is None:  # nobody asks for the sources: one product
        if p_minus_y.dtype == grad_head.dtype:
            grad_head.addmm_(p_minus_y.T, weighted_h)
        else:  # addmm_ cannot add a product in bfloat16 to a sum in float32
            grad_head += p_minus_y.T @ weighted_h
        return
    V, C = PG.shape
    block_rows = V
    if PG.device.type == "cpu":
        # so few that a block is still in the cache when it is added up and compared with PG
        block_rows = max(1, CACHED // C)
    for row in range(0, V, block_rows):
        block = slice(row, row + block_rows)
        for k, piece in chunk_pieces:
            dW = p_minus_y[piece, block].T @ weighted_h[piece]  # (block_rows, C)
            grad_head[block].add_(dW)
            parts[k] += torch.dot(PG[block].flatten(), dW.flatten().to(PG.dtype))


class FusedWeightedCrossEntropy(torch.autograd.Function):
    """
    The LM head and its loss, sum_t weight_t loss_t, in one walk over the tokens that never holds
    more than a chunk's logits. Gradients are formed on the way, while the logits are there. With
    the hidden state h_t, the softmax p_t and the one-hot label y_t, the gradient of loss_t is
    head^T (p_t - y_t) for h_t, and (p_t - y_t) h_t^T for the head. The latter is summed source by
    source, into parts dW_k = sum of weight_t (p_t - y_t) h_t^T over source k's tokens. Their sum is
    the head's gradient, and <PG, dW_k> is what (2) needs: add_head_gradient() forms both.

    hidden (N, C), head (V, C), labels (N,), IGNORE where nothing is learned, token_weight (N,),
    PG (V, C) or None, ends (K,), chunk in tokens or None. Returns the loss, token_loss (N,) in
    nats, and parts (K,) = <PG, dW_k>, zeros without PG.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, token_weight, PG, ends, chunk):
        N, C = hidden.shape
        V = len(head)
        device = hidden.device
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        wide = torch.promote_types(dtype, torch.float32)  # for sums: bfloat16 keeps 3 digits
        if chunk is None:
            # a chunk's logits are about as many numbers as hidden and head, which are held anyway
            chunk = max(64 if device.type == "cpu" else 4096, (N + V) * C // V)
            chunk -= chunk % 64  # whole sequences, mostly, and so fewer pieces
        chunk = min(N, chunk)
        hidden_needs_grad, head_needs_grad = ctx.needs_input_grad[:2]

        W = head.to(dtype)
        token_weight = token_weight * (labels != IGNORE)
        buffer = torch.empty(chunk, V, dtype=dtype, device=device)  # one for all chunks
        token_loss = torch.zeros(N, dtype=wide, device=device)
        grad_hidden = torch.zeros(N, C, dtype=wide, device=device)
        grad_head = torch.zeros_like(head, dtype=wide) if head_needs_grad else None
        parts = torch.zeros(len(ends), dtype=wide, device=device)

        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, chunk):
                end = min(start + chunk, N)
                h = hidden[start:end].to(dtype)  # (n, C)
                learned = labels[start:end] != IGNORE
                y = labels[start:end].clamp(min=0)[:, None]  # (n, 1); IGNORE, -1, is read as id 0
                logits = torch.mm(h, W.T, out=buffer[: end - start])  # (n, V)
                # From here on all is in place, in the buffer unless it is bfloat16: the largest
                # tensors are held once. The logits become log p, and then p - y.
                log_p = logits.to(wide)
                if device.type == "mps":  # nothing has shown yet that it may be in place there
                    log_p = torch.log_softmax(log_p, 1)
                else:
                    torch.log_softmax(log_p, 1, out=log_p)
                log_p_y = log_p.gather(1, y)  # (n, 1)
                token_loss[start:end] = -log_p_y.squeeze(1) * learned
                if not (hidden_needs_grad or head_needs_grad):
                    continue  # an evaluation
                p_minus_y = torch.exp(log_p, out=logits)
                p_minus_y.scatter_(1, y, torch.expm1(log_p_y).to(dtype))  # p_y - 1, to all digits
                if hidden_needs_grad:
                    grad_hidden[start:end] = (p_minus_y @ W) * token_weight[start:end, None]
                if head_needs_grad:
                    weighted_h = (h * token_weight[start:end, None]).to(dtype)
                    add_head_gradient(grad_head, parts, p_minus_y, weighted_h, PG,
                                      list(pieces(start, end, ends)))

        if head_needs_grad:
            grad_head = grad_head.to(head.dtype)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_head)
        ctx.mark_non_differentiable(token_loss, parts)
        return (token_weight * token_loss).sum(), token_loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # forward formed the gradients of the loss; here they meet the gradient from above, a 1
        grad_hidden, grad_head = ctx.saved_tensors
        grad_hidden = grad_hidden * grad_loss
        if grad_head is not None:
            grad_head = grad_head * grad_loss
        return grad_hidden, grad_head, None, None, None, None, None


def fused_cross_entropy(hidden, head, labels, token_weight, PG=None, ends=None, chunk=None):
    """
    Weighted next-token loss from hidden states -> (loss, token_loss (N,), parts), see the class
    above. Without ends all tokens are taken as one source's, and parts is (1,).
    """
    if not torch.is_grad_enabled():
        # the walk looks at requires_grad, which no_grad() leaves as it is
        hidden = hidden.detach()
        head = head.detach()
    if ends is None:
        ends = [len(labels)]
    return FusedWeightedCrossEntropy.apply(hidden, head, labels, token_weight, PG, ends, chunk)


def batch_loss(model, head, x, y, sequence_weight, n_tokens, PG=None, ends=None):
    """
    A micro-batch's part of a step's loss, sum_t weight_t loss_t / n_tokens. x and y are (B, T), the
    weights of the sequences (B,), and n_tokens is how many tokens, learned or not, a whole step has
    on average. (To divide by the sum of the weights instead would bias the expected gradient.) If
    the weights are r, that gradient is sum_k beta_k g_k; without masks it is sum_k alpha_k g_k.
    Returns (loss, token_loss (B, T), parts (K,)).
    """
    hidden = model(x).flatten(0, 1)  # (B T, C)
    token_weight = sequence_weight.repeat_interleave(x.shape[1]) / n_tokens  # (B T,)
    loss, token_loss, parts = fused_cross_entropy(hidden, head, y.flatten(), token_weight, PG, ends)
    return loss, token_loss.view_as(y), parts


# ---- (2) alignment -----------------------------------------------------------------------------

def target_gradient(model, head, x, y, sequence_weight, n_tokens):
    """
    Two sums over the learned tokens of a target batch. The arguments are those of batch_loss().
    The target's gradient at the head is g_val = sum_t weight_t (p_t - y_t) h_t^T / n_tokens,
    (V, C). The second moment of its hidden states is s_val = sum_t weight_t h_t h_t^T / n_tokens,
    (C, C). There is no backward pass through the model.
    """
    token_weight = sequence_weight.repeat_interleave(x.shape[1])  # (B T,)
    labels = y.flatten()
    with torch.no_grad():
        h = model(x).flatten(0, 1).to(head.dtype)  # (B T, C)
    loss, _, _ = fused_cross_entropy(h, head, labels, token_weight / n_tokens)
    with torch.autocast(x.device.type, enabled=False):
        g_val = torch.autograd.grad(loss, head)[0]
        token_weight = token_weight * (labels != IGNORE)
        s_val = h.T @ (h * token_weight[:, None]) / n_tokens
    return g_val, s_val


def preconditioned(curvature, G, S, v):
    """
    P G, (V, C), up to scale, of the target's gradient G (V, C): what the sources' gradients are
    compared with.

    none   P = 1, the paper's: how much does a step of plain gradient descent on source k help?
    adamw  the same for a step of AdamW, which divides by the root of v (V, C), its running mean of
           squared gradients
    kfac   P = H^-1, about: how much does it help the trained model? See inverse_curvature().
    """
    if curvature == "none":
        return G
    if curvature == "adamw":
        root = v.sqrt()
        # the root spreads less than v does, and needs less damping than the curvature
        return G / (root + 0.1 * root.mean())
    return inverse_curvature(G, S, v)


def inverse_curvature(G, S, v):
    """
    P G, (V, C): a target's gradient G (V, C) times an approximate inverse of the loss's curvature
    at the head, up to scale. K-FAC (Martens and Grosse, arXiv 1503.05671) writes the curvature of a
    linear layer as a product of two factors, one for its outputs and one for its inputs, as if the
    two were independent.

    The outputs' factor is E[(p - y) (p - y)^T], of which only the diagonal is kept, a number for
    each row of the head. It is read off v (V, C), AdamW's running mean of squared gradients: the
    mean of v over row i is about E[(p_i - y_i)^2] times the same constant for all rows. So this
    factor is that of training's tokens, weighted by r^2. The inputs' factor is S = E[h h^T],
    (C, C), of the target's hidden states, which are at hand, in place of training's.

    The inverse of the product multiplies G by the inverse of the first factor from the left and by
    that of the second from the right. To each factor the mean of its diagonal is added (damping),
    so that directions that the data hardly shows do not rule. The larger the damping, the nearer
    is P to 1.
    """
    out_factor = v.mean(1, keepdim=True)  # (V, 1)
    out_factor = out_factor + DAMPING * out_factor.mean()
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    in_factor = S + DAMPING * S.diagonal().mean() * identity  # (C, C)
    inverse, _ = torch.linalg.inv_ex(in_factor)  # inv() would make a GPU wait for its check
    return (G / out_factor) @ inverse


def alignments(parts, r, learned, n_tokens):
    """
    Formula (2): A (K,), each source's alignment per learned token. parts_k = <PG, dW_k>, where dW_k
    is r_k / n_tokens times the sum of (p_t - y_t) h_t^T over source k's learned tokens. To divide
    it by r_k / n_tokens and by learned_k, the number of those tokens, leaves their mean, g_k. A
    source that is not in the batch gets 0, which is no measurement.
    """
    return torch.where(learned > 0, parts * n_tokens / (r * learned), 0.0)


# ---- (3) the mixture ---------------------------------------------------------------------------

def mixture_step(z, scale, A, present, density, rate, n_before):
    """
    A step of the mixture, on its logits z (K,) in place, by alignments A (K,) per learned token.

    The gradient (3) over z has a factor alpha_k, with which a source near 0 could never come back.
    Mirror descent on the simplex leaves it out: z_k += rate (A_k - mean) / scale, where the mean is
    weighted by alpha.

    The unit of A means nothing, hence the scale, a scalar tensor: the running mean, over the outer
    steps, of the rms of A (weighted by alpha). It is changed in place; n_before counts the outer
    steps before this one. To divide by the rms of the step itself would bias the sum of the steps:
    a source whose alignment is large in few of them, and small in all others, makes the rms large
    in just those few, so that they count for less.

    With masks source k counts by its share of the learned tokens, beta_k = alpha_k density_k / M
    with M = sum_j alpha_j density_j, and beta takes the place of alpha in (3) and in the mean and
    the rms. What remains of (3) without the factor alpha_k is

        -dL_val / dalpha_k = (density_k / M) (A_k - sum_j beta_j A_j),

    with a mean because beta is normalised.

    present (K,), bool: has the source learned tokens in the batch? All sums are over those that
    have. The others keep their logits and, to first order, their shares.
    """
    alpha = torch.softmax(z, 0)
    A = torch.where(present, A, 0.0)
    share = alpha * present / (alpha * present).sum()  # (K,) among the sources present
    M = (share * density).sum()
    beta = share * density / M
    mean = (beta * A).sum()
    rms = (beta * A**2).sum().sqrt()
    # At first AdamW's v is 1, and then far too small, so that the first A are far too small or too
    # large. None of them alone may set the scale: it is the mean of all, until there are 50.
    scale.lerp_(rms, max(1 - SCALE_DECAY, 1 / (n_before + 1)))
    step = density / M * (A - mean) / scale.clamp(min=1e-18)
    z += torch.where(present, rate * step, 0.0)
    # alpha stays above 1e-8 of the largest, so that no source's part of a gradient underflows
    z.clamp_(min=z.max() - 18)


def search_bounds(args, names, available):
    """
    Least and largest shares of a search, each (K,), from --bounds and --max_epochs; 0 and 1 where
    neither says anything. available (K,) are the sources' tokens.
    """
    lower = torch.zeros(len(names), dtype=torch.float64)
    upper = torch.ones(len(names), dtype=torch.float64)
    if args.bounds:
        for name, span in parse_pairs("--bounds", args.bounds).items():
            least, _, largest = span.partition(":")
            try:
                k = names.index(name)
                lower[k] = float(least or 0)
                upper[k] = float(largest or 1)
            except ValueError:
                fail(f"--bounds '{args.bounds}': '{name}={span}' is not NAME=LEAST:LARGEST with "
                     f"one of {', '.join(names)}")
            if ":" not in span or not (0 <= lower[k] <= upper[k] <= 1 and upper[k] > 0):
                fail(f"--bounds '{args.bounds}': '{name}={span}' is no range of shares, "
                     "LEAST:LARGEST between 0 and 1; to leave a source out, do not name it in "
                     "--sources")
    if args.max_epochs:
        upper = torch.minimum(upper, args.max_epochs * available.double() / args.train_tokens)
    if lower.sum() > 1 + 1e-9 or upper.sum() < 1 - 1e-9 or (lower > upper).any():
        fail(f"no mixture is within these bounds: the least shares sum to {lower.sum():.3g}, the "
             f"largest to {upper.sum():.3g} (--bounds {args.bounds}, --max_epochs "
             f"{args.max_epochs} in --train_tokens {args.train_tokens})")
    return lower, upper


def within_bounds(z, lower, upper):
    """
    Projects a mixture in Kullback-Leibler divergence on lower <= alpha <= upper, each (K,), on its
    logits z (K,) in place: alpha_k becomes clip(c alpha_k, lower_k, upper_k) with the c, found by
    bisection, for which the sum is 1.
    """
    alpha = torch.softmax(z, 0)
    if (lower <= alpha).all() and (alpha <= upper).all():
        return
    low = 0.0  # a c with which all are at their lower bounds
    high = 1 / alpha.min().item()  # and one with which all are at their upper ones
    for _ in range(100):
        c = (low + high) / 2
        if (c * alpha).clamp(lower, upper).sum() > 1:
            high = c
        else:
            low = c
    z.copy_((c * alpha).clamp(lower, upper).log())


def read_mixture(text, names, available, tokenizer=None):
    """
    What --mixture says -> shares (K,) of the sources `names`. available (K,) is how many tokens
    each of them has. Weights need not sum to 1; a source that is not named gets 0.
    """
    listed = text
    if text == "uniform":
        listed = ",".join(names)
    elif text == "proportional":
        listed = ",".join(f"{name}={n}" for name, n in zip(names, available.tolist()))
    elif text.endswith(".json"):
        try:
            result = json.loads(Path(text).read_text())
            mixture = result["mixture"]
            listed = ",".join(f"{name}={share}" for name, share in mixture.items())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fail(f"--mixture {text} is not what a search writes ({type(error).__name__})")
        found = result.get("tokenizer")
        if tokenizer and found and found != tokenizer:
            fail(f"--mixture {text} has shares of tokens of the tokenizer {found}, but the sets "
                 f"have {tokenizer}; prepare the sets with the same one, or give a=0.8,b=0.2")
    weights = parse_weights("--mixture", listed)
    unknown = weights.keys() - set(names)
    if unknown:
        fail(f"--mixture {text} names {', '.join(unknown)}, but --sources are {', '.join(names)}")
    alpha = torch.tensor([weights.get(name, 0.0) for name in names], dtype=torch.float64)
    return alpha / alpha.sum()


# ---- training ----------------------------------------------------------------------------------

def start_machine(args):
    """
    The device and dtype of the flags -> (device, autocast context). Started by torchrun, this
    process joins the others, and only the first of them prints.
    """
    # Two settings for Linux, against page faults. Torch's allocator takes huge pages for large
    # tensors. And glibc, which would give memory back after each step and get it again in the next,
    # keeps it from now on: the first large tensor that is freed raises its threshold.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.empty(24 * 2**20, dtype=torch.uint8)
    found = torch.accelerator.current_accelerator(check_available=True)
    device = args.device
    if device == "auto":
        device = "cpu"
        if found and found.type in ("cuda", "mps"):
            device = found.type
    elif device != "cpu" and not (found and found.type == device):
        fail(f"--device {device}: torch {torch.__version__} finds none here; use --device auto")
    if dist.is_torchelastic_launched():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    rank, world = ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if args.batch_size % world or args.target_batch_size < world:
        fail(f"{world} processes share a batch: --batch_size {args.batch_size} must be a multiple "
             f"of {world}, and --target_batch_size {args.target_batch_size} at least {world}")
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    dtype = args.dtype
    if dtype == "auto" and device == "cuda":
        # not on a card that only emulates bfloat16, for it is slower with it
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "bfloat16"
    if dtype == "bfloat16":
        return device, torch.autocast(device, torch.bfloat16)
    return device, contextlib.nullcontext()


def ranks():
    """(this process's number, how many there are). All share each batch and hold equal weights."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(*tensors):
    """Sums each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def learning_rate_at(step, args):
    """The learning rate at a step: linear warm-up, then cosine decay to a tenth of the peak."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model, head, sets, split, max_tokens, batch_size):
    """
    {set's name: mean loss per learned token, in nats}, over windows spread evenly over a split.
    They are always the same ones: nothing is drawn, so that looking more often changes no result.
    """
    rank, world = ranks()
    batch_size = batch_size // world  # the flag counts all processes
    losses = {}
    for s in sets:
        starts = s.spread(split, max_tokens)[rank::world]
        total = torch.zeros((), device=head.device)
        learned = torch.zeros((), device=head.device)
        for i in range(0, len(starts), batch_size):
            x, y = s.windows(split, starts[i: i + batch_size])
            x = torch.from_numpy(x).to(head.device)
            y = torch.from_numpy(y).to(head.device)
            ones = torch.ones(len(x), device=head.device)
            loss, _, _ = batch_loss(model, head, x, y, ones, n_tokens=1)  # the sum over tokens
            total += loss.float()
            learned += (y != IGNORE).sum()
        add_up(total, learned)
        losses[s.name] = total.item() / learned.item() if learned else math.nan
    return losses


# ---- what a run writes -------------------------------------------------------------------------

def open_log(path, rows):
    """log.jsonl, open to append: a new file, or a resumed run's, with its checkpoint's rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows == 0:
        return open(path, "x")  # refuses the second of two runs that start at once
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if len(lines) < rows:
        fail(f"{path} has {len(lines)} rows, but the run in ckpt.pt wrote {rows}; put it right, or "
             "start a new run in another --out_dir")
    save_atomically(path, lambda file: file.write("".join(lines[:rows]).encode()))
    return open(path, "a")


def discard_log(log):
    """Closes and deletes a log.jsonl that no checkpoint goes with: it holds no run to resume."""
    with contextlib.suppress(OSError):  # a full disk may have left a rest that was not written
        log.close()
    os.unlink(log.name)


def by_name(names, values):
    """(K,) -> {name: value}; None in place of NaN, which JSON does not know."""
    return {name: None if math.isnan(value) else value
            for name, value in zip(names, values.tolist())}


def tokens_seen(state, fill, block_size):
    """(K,) tokens drawn of each source so far, by the sequences drawn and what fills one."""
    return (state.drawn * block_size * fill).round().long()


def progress(row, steps_per_second):
    """A row of the log as a line on the screen; the largest shares have bars: python ▆ 0.71"""
    step = row["step"]
    line = f"step {step:5d} {step / row['max_steps']:4.0%} | target {row['target_val_loss']:.3f} | "
    if row["train_loss"] is not None:
        tokens_per_second = row["tokens"] / step * steps_per_second
        seconds_left = (row["max_steps"] - step) / steps_per_second
        line += f"train {row['train_loss']:.3f} | {tokens_per_second:,.0f} tok/s | "
        line += f"{seconds_left:.0f} s left | "
    alpha = row["alpha"]
    largest = sorted(alpha, key=alpha.get, reverse=True)[:8]
    for name in alpha:
        if name in largest:
            bar = "▁▂▃▄▅▆▇█"[min(7, int(alpha[name] * 8))]
            line += f"{name} {bar} {alpha[name]:.2f}  "
    return line.rstrip()


def bound_reached(share, lower, upper):
    """Which bound of the search a share is at: "cap", "floor" or ""; 0 and 1 are no bounds."""
    for name, bound in (("cap", upper), ("floor", lower)):
        if 0 < bound < 1 and abs(share - bound) <= max(0.005 * bound, 1e-4):
            return name
    return ""


# ---- the run -----------------------------------------------------------------------------------

def open_sets(args, ckpt):
    """
    The prepared sets that --sources and --target name -> (sources, targets, the targets' weights,
    which sum to 1), lists of TokenSets and of floats. A checkpoint must be of the same vocabulary
    and, on --resume, of the same data.
    """
    pairs = parse_pairs("--sources", args.sources)
    if any(pairs.values()):
        fail(f"--sources '{args.sources}' must be names alone; for shares there is --mixture")
    names = list(pairs)
    weights = parse_weights("--target", args.target)
    if 0 in weights.values():
        fail(f"--target '{args.target}': leave out a target that weighs nothing")
    sets = load_sets(args.data_dir, names, list(weights), args.block_size)
    first = sets[names[0]]
    if args.resume:
        if ckpt["digests"] != {name: s.digest for name, s in sets.items()}:
            fail(f"the data in {args.data_dir}/ is not what {args.out_dir}/ckpt.pt was trained on; "
                 "name the right folder with --data_dir, prepare the data as it was, or start a "
                 "new run in another --out_dir")
    elif ckpt and (ckpt["tokenizer"], ckpt["config"]["vocab_size"]) != (first.tokenizer,
                                                                        first.vocab_size):
        fail(f"{args.init_from} was made with the tokenizer {ckpt['tokenizer']}, '{first.name}' "
             f"with {first.tokenizer}; prepare the sets with the checkpoint's")
    total = sum(weights.values())
    return ([sets[name] for name in names], [sets[name] for name in weights],
            [weight / total for weight in weights.values()])


def main(argv=None):
    args, ckpt = open_run(argv)
    device, autocast = start_machine(args)
    rank, _ = ranks()
    out = Path(args.out_dir)
    searching = args.mixture is None

    # the sets: without --sources the sample, which is prepared if there is none yet
    if args.sources is None:
        if rank == 0:
            prepare_sample(args.data_dir)
        add_up(torch.zeros(1, device=device))  # the other processes wait here for the first one
        args.sources = ",".join(sample_sources(args.data_dir))
        if args.target is None:
            args.target = SAMPLE_TARGETS[0]
    if args.target is None:
        args.target = args.sources
    sources, targets, target_weights = open_sets(args, ckpt)
    names = [s.name for s in sources]
    K = len(sources)
    T = args.block_size
    n_sequences = args.batch_size * args.grad_accum  # per step
    available = torch.tensor([s.available("train") for s in sources])  # (K,) tokens, all there are
    # Instruction data: the share of the tokens that is learned, and tokens per position of a
    # sequence, for examples do not fill it. Both are 1 for text.
    density = torch.tensor([s.density("train") for s in sources], dtype=torch.float64)  # (K,)
    fill = torch.tensor([s.fill("train") for s in sources], dtype=torch.float64)  # (K,)
    if args.train_tokens:
        # A run shorter than the real one is shown as much less text, and so repeats it as often.
        # (How much this run reads is taken at equal shares.)
        run_tokens = args.max_steps * n_sequences * T / (1 / fill).mean().item()
        for s in sources:
            s.visible = min(1.0, run_tokens / args.train_tokens)
    target_learned = torch.tensor([t.density("val") * t.fill("val") for t in targets],
                                  dtype=torch.float32)  # learned tokens per position
    lower, upper = search_bounds(args, names, available)
    if searching and n_sequences < 2:
        fail("a search compares the sources in a step: --batch_size times --grad_accum must be at "
             "least 2")
    if searching and n_sequences < K:
        say(f"warning: with {n_sequences} sequences per step for {K} sources, each step compares "
            "only some of them")

    # model and optimizer
    torch.manual_seed(args.seed)
    config = GPTConfig(vocab_size=sources[0].vocab_size, block_size=T, n_layer=args.n_layer,
                       n_head=args.n_head, n_embd=args.n_embd)
    net = GPT(config).to(device)
    model = torch.compile(net) if args.compile else net
    head = net.lm_head.weight  # (V, C)
    optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay,
                                        fused=device != "mps")

    # the loop's state; a checkpoint holds it, the weights, the optimizer and the settings
    state = SimpleNamespace(
        step=0,  # optimizer steps done
        rows=0,  # reports in log.jsonl
        seconds=0.0,  # time taken, up to the last report
        z=torch.zeros(K, dtype=torch.float64),  # logits of the mixture, alpha = softmax(z)
        scale=torch.zeros((), dtype=torch.float64),  # running mean of the alignments' rms
        G=torch.zeros_like(head.data),  # (V, C) running mean of g_val, up to scale: it starts at 0
        S=torch.zeros(head.shape[1], head.shape[1], device=device),  # (C, C) and of s_val
        start=torch.zeros(K, dtype=torch.float64),  # the first mixture
        before={},  # the targets' val losses before training
        lowest={"step": 0, "val_loss": math.inf},  # the report with the targets' lowest val loss
        run_sum=torch.zeros(K, dtype=torch.float64),  # of the mixture over all steps
        half_sum=torch.zeros(K, dtype=torch.float64),  # and over those of the last half
        drawn=torch.zeros(K, dtype=torch.int64))  # sequences seen of each source
    if args.resume:
        restore(ckpt, out / "ckpt.pt", net, optimizer, state)
    elif searching:
        within_bounds(state.z, lower, upper)
    else:
        state.z.copy_(read_mixture(args.mixture, names, available,
                                   sources[0].tokenizer).log())
    if args.init_from and not args.resume:
        restore(ckpt, args.init_from, net)
    settings = {"args": vars(args), "config": vars(config), "tokenizer": sources[0].tokenizer,
                "digests": {s.name: s.digest for s in (*sources, *targets)}}
    # a resumed run wrote the report of its first step before it was stopped
    resumed_at = state.step if args.resume else None
    if rank == 0 and args.resume:
        log = open_log(out / "log.jsonl", state.rows)
    n_params = sum(p.numel() for p in net.parameters())
    say(f"{n_params:,} parameters, {n_sequences * T:,} tokens per step, {device}; sources "
        f"{args.sources}; target {args.target}; "
        + ("searching" if searching else f"mixture {args.mixture}"))

    # sums since the last report
    steps_taken = 0
    train_loss_sum = torch.zeros((), device=device)
    loss_sum = torch.zeros(K, device=device)  # of each source's learned tokens
    learned_sum = torch.zeros(K, device=device)  # and how many they are
    alignment_sum = torch.zeros(K, dtype=torch.float64)
    alignment_count = torch.zeros(K, dtype=torch.float64)  # outer steps with the source present
    clock = time.perf_counter()

    while True:
        step = state.step
        last = step >= args.max_steps
        alpha = torch.softmax(state.z, 0)  # (K,)

        # ---- report: evaluate, log, save
        if (step % args.log_every == 0 or last) and step != resumed_at:
            with autocast:
                target_losses = evaluate(model, head, targets, "val", args.eval_tokens,
                                         args.batch_size)
            target_loss = float(np.dot(target_weights, list(target_losses.values())))
            add_up(train_loss_sum)
            train_loss = train_loss_sum.item() / max(steps_taken, 1)
            numbers = (torch.tensor([train_loss, target_loss]), *net.parameters())
            if not all(tensor.isfinite().all() for tensor in numbers):
                fail(f"the loss is no longer finite at step {step}; the last good checkpoint "
                     f"stays. Lower --learning_rate {args.learning_rate:g} in a new run, or "
                     "--resume if it was the machine")
            if not alpha.isfinite().all():
                fail(f"the mixture is no longer finite at step {step}; the last good checkpoint "
                     f"stays. Lower --learning_rate_mixture {args.learning_rate_mixture:g}")
            if step == 0:
                state.start.copy_(alpha)
                state.before = target_losses
            if target_loss < state.lowest["val_loss"]:
                state.lowest = {"step": step, "val_loss": target_loss}
            seconds = time.perf_counter() - clock
            clock += seconds
            state.seconds += seconds
            state.rows += 1
            if rank == 0:
                row = {"step": step, "max_steps": args.max_steps, "alpha": by_name(names, alpha),
                       "alignment": by_name(names, alignment_sum / alignment_count),
                       "train_loss": train_loss if steps_taken else None,
                       "source_loss": by_name(names, loss_sum / learned_sum),
                       "target_val_loss": target_loss, "target_losses": target_losses,
                       "tokens": tokens_seen(state, fill, T).sum().item(),
                       "seconds": round(state.seconds, 3)}
                if step == 0:  # not before: a run that fails earlier leaves its out_dir free
                    log = open_log(out / "log.jsonl", 0)
                elif not os.path.samestat(os.fstat(log.fileno()), os.stat(log.name)):
                    fail(f"another program resumed the run in {out}/; this one ends here")
                try:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    say(progress(row, steps_taken / seconds))
                    save_checkpoint(out / "ckpt.pt", net, optimizer, state, settings)
                finally:
                    if not (out / "ckpt.pt").exists():  # nor does one that fails here keep it
                        discard_log(log)
            steps_taken = 0
            for t in (train_loss_sum, loss_sum, learned_sum, alignment_sum, alignment_count):
                t.zero_()
        if last:
            break

        # ---- outer step, first half: the target's gradient, times P
        outer = searching and step % args.outer_every == 0
        PG = None
        if outer:
            # a generator per step and purpose: a resumed run draws what it would have drawn
            rng = np.random.default_rng((args.seed, step, 1))
            which, x, y = draw_batch(targets, "val", target_weights, args.target_batch_size, rng)
            # Targets are drawn by their weights. Each is divided by its learned tokens per
            # position, so that it counts by its weight, however few of its tokens are learned.
            # (Sources count by tokens.)
            weight = 1 / target_learned[which]  # (B,)
            with autocast:
                g_val, s_val = target_gradient(model, head, x.to(device), y.to(device),
                                               weight.to(device), args.target_batch_size * T)
            add_up(g_val, s_val)
            state.G.lerp_(g_val, 1 - DECAY)
            state.S.lerp_(s_val, 1 - DECAY)
            if step > 0 and args.curvature != "none":
                v = optimizer.state[head]["exp_avg_sq"]  # another optimizer: see Fork it, README
            else:
                v = torch.ones_like(head)  # before the first step AdamW has none; P = 1 needs none
            PG = preconditioned(args.curvature, state.G, state.S, v)

        # ---- inner step: train on sequences drawn by q, weighted by r
        eps = args.uniform_share if searching else 0.0
        q = (1 - eps) * alpha + eps / K  # (K,) shares of tokens
        # shares of sequences: a source that fills half of each needs twice as many of them
        q_sequences = q / fill
        q_sequences = q_sequences / q_sequences.sum()
        n_tokens = n_sequences * T * (q_sequences * fill).sum().item()  # per step, on average
        rng = np.random.default_rng((args.seed, step, 0))
        source, x, y = draw_batch(sources, "train", q_sequences, n_sequences, rng)
        r = source_weights(alpha, q, density)  # (K,)
        step_drawn = torch.bincount(source, minlength=K).to(device)  # (K,) sequences
        weight = r.float()[source].to(device)  # (B,)
        x = x.to(device)
        y = y.to(device)
        step_loss = torch.zeros(K, device=device)
        step_learned = torch.zeros(K, device=device)
        step_parts = torch.zeros(K, device=device)  # <PG, dW_k>
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        for micro in range(args.grad_accum):
            # every grad_accum-th sequence: each micro-batch spans the sources, still in order
            m = slice(micro, None, args.grad_accum)
            ends = None
            if outer:  # where each source's tokens end in the micro-batch
                ends = (torch.bincount(source[m], minlength=K).cumsum(0) * T).tolist()
            with autocast:
                loss, token_loss, parts = batch_loss(model, head, x[m], y[m], weight[m],
                                                     n_tokens, PG, ends)
            loss.backward()
            train_loss_sum += loss.detach()
            of_sequence = source[m].to(device)
            step_loss.index_add_(0, of_sequence, token_loss.sum(1))
            step_learned.index_add_(0, of_sequence, (y[m] != IGNORE).float().sum(1))
            if outer:
                step_parts += parts
        add_up(step_drawn, step_loss, step_learned, step_parts,
               *(p.grad for p in net.parameters() if p.grad is not None))
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += step_loss
        learned_sum += step_learned

        # ---- outer step, second half: move the mixture
        if outer:
            learned = step_learned.double().cpu()
            present = learned > 0
            A = alignments(step_parts.double().cpu(), r, learned, n_tokens)  # (K,)
            alignment_sum += A
            alignment_count += present
            # the rate falls to 0, so that the noise of single steps averages out
            rate = args.learning_rate_mixture * (1 - step / args.max_steps)
            mixture_step(state.z, state.scale, A, present, density, rate, step // args.outer_every)
            within_bounds(state.z, lower, upper)
        state.run_sum += alpha
        if step >= args.max_steps // 2:
            state.half_sum += alpha
        state.drawn += step_drawn.cpu()
        state.step += 1
        steps_taken += 1

    # ---- results
    with autocast:
        val = evaluate(model, head, dict.fromkeys((*sources, *targets)), "val", args.eval_tokens,
                       args.batch_size)
        test = evaluate(model, head, targets, "test", TEST_TOKENS, args.batch_size)
    if rank > 0:
        return
    found = alpha  # (K,) the mixture to use: the rate fell to 0, so that this is an average already
    seen = tokens_seen(state, fill, T)  # (K,)
    real_run = args.train_tokens or seen.sum().item()  # tokens
    averages = torch.tensor([s.averages() for s in sources], dtype=torch.float64)
    bytes_per_token, tokens_per_document = averages.T  # (K,)
    size = found * bytes_per_token
    result = {
        "mixture": by_name(names, found),
        "recommended": "last",
        "unit": "tokens",
        "bytes": by_name(names, size / size.sum()),  # these shares hold for any tokenizer
        "mixtures": {
            "last": by_name(names, alpha),
            "last_half_average": by_name(names, state.half_sum / state.half_sum.sum()),
            "run_average": by_name(names, state.run_sum / state.run_sum.sum())},
        "target": [t.name for t in targets],
        "test_loss": 0.0,
        "test_bits_per_byte": 0.0,
        "before": state.before,
        "val_loss": 0.0,
        "lowest": state.lowest,
        "targets": {},
        "sources": {},
        "searched": searching,
        "tokenizer": sources[0].tokenizer,
        "seed": args.seed,
        "steps": step,
        "tokens": seen.sum().item(),
        "seconds": round(state.seconds, 1),
        "torch": torch.__version__,
        "settings": vars(args)}
    for t, weight in zip(targets, target_weights):
        bits_per_byte = test[t.name] / math.log(2) * t.tokens_per_byte("test")
        result["val_loss"] += weight * val[t.name]
        result["test_loss"] += weight * test[t.name]
        result["test_bits_per_byte"] += weight * bits_per_byte
        result["targets"][t.name] = {
            "weight": weight, "val_loss": val[t.name], "test_loss": test[t.name],
            "test_bits_per_byte": bits_per_byte, "learned_only": t.masked}
    columns = {  # each (K,)
        "tokens_available": available,
        "tokens_seen": seen,
        "epochs_seen": seen.double() / available,  # of its whole text, in this run
        "epochs": found * real_run / available,  # in the real run, at the mixture found
        "start": state.start,
        "lower": lower,
        "upper": upper,
        "bytes_per_token": bytes_per_token,
        "tokens_per_document": tokens_per_document}
    for k, name in enumerate(names):
        row = {what: column[k].item() for what, column in columns.items()}
        row["val_loss"] = val[name]
        row["bound"] = bound_reached(found[k].item(), row["lower"], row["upper"])
        result["sources"][name] = row
    text = json.dumps(result, indent=1) + "\n"
    save_atomically(out / "mixture.json", lambda file: file.write(text.encode()))
    say(f"\n{result_table(result)}\nwrote {out}/mixture.json, log.jsonl and ckpt.pt")
    try:
        say(f"drew {draw_run(out)}")
    except (ImportError, ValueError) as error:  # no matplotlib; a log.jsonl that is damaged
        say(f"drew no picture: {error}")


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, on_ctrl_c)
        main()
    except KeyboardInterrupt:
        say("\nstopped; to resume from the last report, if there is one, repeat the command with "
            "--resume")
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written, a file that is gone
        fail(error)
    except RuntimeError as error:
        # Without a C++ compiler, of which torch.compile knows when the model first runs. The module
        # is there once it was called. To import it here would take a second at each --help.
        dynamo = sys.modules.get("torch._dynamo.exc")
        if dynamo is None or not isinstance(error, dynamo.BackendCompilerFailed):
            raise
        reason = " ".join(str(error).split())[:200]
        fail(f"--compile: {reason}; mend that, or leave --compile out")
