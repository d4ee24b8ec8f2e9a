"""
FastMix: find how much of each data source to train on, in one training run.

K sources, a mixture alpha on the K-simplex, a small proxy model w and a target (validation) set. Two nested problems:

    outer:  min over alpha of  L_val(w*(alpha))
    inner:  w*(alpha) = argmin over w of  sum_k alpha_k L_k(w)

Both are descended at once. The inner step is ordinary training; the outer step moves alpha = softmax(z) by the
gradient of the target loss one inner step ahead, w' = w - eta sum_k alpha_k g_k. The three formulas:

    (1) weights   draw sources from q = (1 - eps) alpha + eps / K and weight source k's loss by alpha_k / q_k;
                  the expected gradient is sum_k alpha_k g_k for every eps               -> draw(), "inner step"
    (2) alignment A_k = <g_val, g_k>, taken at the LM head, from the pass that trains     -> head_pass()
                  or, with --alignment all, over all parameters                         -> full_alignment()
    (3) mixture   dL_val(w')/dz_k = -eta alpha_k (A_k - sum_j alpha_j A_j), stepped as     -> mixture_gradient(),
                  mirror descent in relative units: z_k += rate (A_k - mean) / rms            mixture_step()

Where a set has a mask (instruction data), every mean, of a loss as of an alignment, is over the learned tokens only;
what that makes of the formulas is said in loss_weights() and mixture_gradient().

    python prepare_data.py && python fastmix.py                  search on the sample set, minutes on a 2-core CPU
    python fastmix.py --mixture out/mixture.json --out_dir out-found       train at the mixture that was found
    torchrun --nproc_per_node 8 fastmix.py --batch_size 64       several devices, sharing each batch
    python fastmix.py --init_from out/ckpt.pt --sources qa,chat --target task --out_dir out-tuned     post-training

Paper: "FastMix: Fast Data Mixture Optimization via Gradient Descent", Tan et al., ICLR 2026, arXiv 2606.14971.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from model import GPT, GPTConfig

IGNORE = -1  # targets of this value count nowhere
SHORT_ANSWER = 32  # tokens, <|endoftext|> included: the answers that --eval_accuracy takes
SAMPLE_SOURCES, SAMPLE_TARGET = "python,cpp,prose,math,legal,noise", "numpy"
SAMPLE_TASKS = "describe,implement,evaluate,declare,unicode,numpy_tasks"


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# config

def parse_args(defaults=None):
    """Flags -> namespace; `defaults` (the settings in a checkpoint) replace the built-in ones."""
    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
        return value

    def number(low, high=math.inf):
        def parse(text):
            value = float(text)
            if not low <= value <= high or value == math.inf:
                raise argparse.ArgumentTypeError(f"{text} is not a number between {low} and {high}")
            return value
        return parse

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="python fastmix.py [options]   (--help for all)")

    def group(title, *flags):
        g = p.add_argument_group(title)
        for name, kind, default, text in flags:
            kw = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
            if isinstance(kind, tuple):
                kw = {"choices": kind, "default": default}
            shown = "" if kind is bool or default is None else f" (default: {default})"
            g.add_argument("--" + name, help=text + shown, **kw)

    group("data and output",
          ("sources", str, None, f"comma-separated names of prepared sources (default: {SAMPLE_SOURCES})"),
          ("target", str, None, "set or sets to do well on, averaged equally (default: numpy for the sample, for own "
                                "sources their own val splits)"),
          ("data_dir", str, "data", "where prepare_data.py wrote"),
          ("out_dir", str, "out", "gets log.jsonl, ckpt.pt and mixture.json"),
          ("init_from", str, None, "start from the weights in this checkpoint, whose model the flags below default to"),
          ("resume", bool, False, "go on from out_dir/ckpt.pt, with the settings stored there"),
          ("overwrite", bool, False, "delete the run that out_dir holds and start anew"))
    group("mixture (the outer problem)",
          ("mixture", str, None, "train at this mixture instead of searching: mixture.json, log.jsonl (replays its "
                                 "trajectory), uniform, proportional (to tokens) or a=0.8,b=0.2"),
          ("start_mixture", str, None, "where the search starts, given as for --mixture (default: uniform)"),
          ("uniform_share", number(0, 1), None, "eps: share of sequences drawn uniformly over the sources; 1 is the "
                                                "paper's loss weights, 0 is sampling by the mixture (default: 0.25 in "
                                                "a search, 0 with --mixture, where no source needs measuring)"),
          ("alignment", ("head", "all"), "head", "parameters that alignments are taken over; an outer step over all "
                                                 "costs 0.83 of a training step at the default batch sizes, so take "
                                                 "--outer_every 4 --learning_rate_mixture 0.06 with it"),
          ("outer_every", positive, 1, "optimizer steps between two outer steps"),
          ("learning_rate_mixture", number(0), 0.02, "step on z of a source whose alignment is above the mean by the "
                                                         "alignments' rms"),
          ("entropy", number(0), 0.0, "lambda: keeps the mixture's entropy up, in units of the alignments' rms"),
          ("target_batch_size", positive, 8, "target sequences an outer step"))
    group("model",
          ("n_layer", positive, 2, "blocks"), ("n_head", positive, 4, "attention heads"),
          ("n_embd", positive, 128, "channels"), ("block_size", positive, 64, "context, in tokens"))
    group("training (the inner problem)",
          ("batch_size", positive, 16, "sequences a micro-batch"),
          ("grad_accum", positive, 1, "micro-batches an optimizer step"),
          ("max_steps", positive, 2400, "optimizer steps"),
          ("learning_rate", number(0), 4e-3, "AdamW's peak learning rate"),
          ("min_lr", number(0), 4e-4, "learning rate at the end of the cosine decay"),
          ("warmup_steps", int, 50, "steps of linear warm-up"),
          ("weight_decay", number(0), 0.1, "on matrices and embeddings"),
          ("grad_clip", number(0), 1.0, "largest norm of the gradient; 0 for none"))
    group("machine and reports",
          ("seed", int, 1337, "of initialisation, training batches and target batches"),
          ("device", ("auto", "cpu", "cuda", "mps"), "auto", "where to run"),
          ("dtype", ("auto", "float32", "bfloat16"), "auto", "autocast type; auto: bfloat16 on cuda, else float32"),
          ("compile", bool, False, "torch.compile the model"),
          ("log_every", positive, 50, "steps between two lines"),
          ("eval_every", positive, 100, "steps between two evaluations of the target, and checkpoints"),
          ("eval_tokens", positive, 16384, "tokens of each val split in an evaluation"),
          ("test_tokens", positive, 2**18, "at most so many tokens of each test split at the end"),
          ("source_losses", bool, False, "print each source's training loss as well"),
          ("eval_accuracy", bool, False, "exact matches of greedy decoding among the targets' test answers of up to "
                                         f"{SHORT_ANSWER} tokens, at the end and, with --init_from, at the start"))
    p.set_defaults(**(defaults or {}))
    return p.parse_args()


# a run may go on with these changed; everything else would make it another run
MAY_CHANGE = ("resume", "overwrite", "out_dir", "data_dir", "device", "compile", "log_every", "eval_every",
              "eval_tokens", "test_tokens", "source_losses", "eval_accuracy")


def load_checkpoint(path, mend):
    """A checkpoint that fastmix.py wrote; anything else ends the program with one line that ends in `mend`."""
    try:  # weights_only: a checkpoint from a stranger must not run code
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", "args", "config", "tokenizer", "tensors", "digests"} - ckpt.keys()
    except FileNotFoundError:
        fail(f"{path}: no checkpoint there; {mend}")
    except Exception as error:  # whatever a file that is none of ours may raise
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); {mend}")
    if missing:
        fail(f"{path} is not a checkpoint of this fastmix.py (it lacks {', '.join(sorted(missing))}); {mend}")
    return ckpt


# ---------------------------------------------------------------------------------------------------------------------
# data

class TokenSet:
    """
    A folder that prepare_data.py wrote: its meta.json and, for each split, a memory map of the tokens.

    Text is read in windows that start anywhere. Examples (a set with masks) are packed: a row holds as many whole ones
    as fit block_size + 1 tokens, and nothing behind its last one is learned. `rows[split]` is then (2, R), where rows
    start and end. An example longer than a row is cut at its end; one whose prompt alone fills the row is left out.
    """

    def __init__(self, data_dir, name, block_size):
        self.name, self.block_size, folder = name, block_size, Path(data_dir, name)
        if not (folder / "meta.json").is_file():
            there = sorted(m.parent.name for m in Path(data_dir).glob("[!.]*/meta.json"))
            of_sample = name in f"{SAMPLE_SOURCES},{SAMPLE_TARGET},{SAMPLE_TASKS}".split(",")
            mend = "python prepare_data.py" + ("" if of_sample else f" {name}=PATH")
            fail(f"no set '{name}' in {data_dir}/ (there: {', '.join(there) or 'none'}); prepare it with: {mend}")
        self.again = f"prepare '{name}' again with --overwrite"
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            dtype, packed = np.dtype(self.meta["dtype"]), self.meta.get("schema", "text") != "text"
            counts = {s: (c["tokens"], c.get("learned")) for s, c in self.meta["splits"].items()}
            self.tokens, self.masks, self.rows, self.learned = {}, {}, {}, {}
            self.cut = np.zeros(3, dtype=np.int64)  # examples; longer than a row; without a response in it
            for split in ("train", "val", "test"):
                n, learned = counts[split]
                self.tokens[split] = self.map(folder / f"{split}.bin", dtype, n)
                self.learned[split] = n
                if learned is not None:
                    mask = self.masks[split] = self.map(folder / f"{split}.mask.bin", np.dtype(np.uint8), n)
                    found = np.count_nonzero(mask), mask.max(initial=0)
                    if found != (learned, 1):
                        fail(f"{folder}/{split}.mask.bin: {found[0]} learned tokens, highest value {found[1]}, but "
                             f"meta.json says {learned} and 1; {self.again}")
                    self.learned[split] = learned
                if packed:
                    self.pack(split)
                elif n < block_size + 1:
                    fail(f"{folder}/{split}.bin: {n} tokens, too short for --block_size {block_size} (needs "
                         f"{block_size + 1}); give '{name}' more text or lower --block_size")
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{folder}/meta.json cannot be read ({error!r}); {self.again}")
        self.available = len(self.rows["train"][0]) * block_size if packed else len(self.tokens["train"])
        self.density = self.learned["train"] / self.available  # learned tokens per token drawn from train; 1 for text

    def map(self, path, dtype, n):
        size = path.stat().st_size if path.is_file() else -1
        if size != n * dtype.itemsize:
            fail(f"{path}: {'missing' if size < 0 else f'{size} bytes'}, but meta.json says {n} tokens of "
                 f"{dtype.itemsize} bytes; {self.again}")
        return np.memmap(path, dtype=dtype, mode="r") if n else np.zeros(0, dtype)

    def examples(self, split):
        """Where examples start and end, (E,) and (E,): each has one <|endoftext|>, its last token."""
        ends = np.flatnonzero(self.tokens[split] == self.meta["eot_token"]) + 1
        return np.concatenate([[0], ends[:-1]]), ends

    def pack(self, split):
        """Fills rows[split], walking over the examples in order, and sets learned[split] to what the rows show."""
        mask, room = self.masks[split], self.block_size + 1
        starts, ends = self.examples(split)
        answer = np.append(np.flatnonzero(mask), len(mask))
        answer = answer[np.searchsorted(answer, starts)]  # the first learned token of each example
        usable, rows, i = (answer < ends) & (answer - starts < room), [], 0
        while i < len(starts):
            fitting = np.searchsorted(ends, starts[i] + room, side="right")  # examples before this one fit whole
            if usable[i]:
                rows.append((starts[i], ends[fitting - 1] if fitting > i else starts[i] + room))
            i = max(fitting, i + 1) if usable[i] else i + 1
        if not rows:
            fail(f"{self.name}/{split}: no example has a response within --block_size {self.block_size}; raise it")
        self.rows[split] = np.array(rows).T
        self.learned[split] = sum(int(mask[a + 1: b].sum()) for a, b in rows)  # no row predicts its first token
        self.cut += np.array([len(starts), (ends - starts > room).sum(), (~usable).sum()])

    def window_count(self, split):
        """How many disjoint windows of block_size tokens a split has."""
        return len(self.rows[split][0]) if split in self.rows else (len(self.tokens[split]) - 1) // self.block_size

    def at_fraction(self, split, u):
        """Where windows begin, for fractions u (B,) of a split in [0, 1)."""
        if split in self.rows:
            return self.rows[split][0][(u * self.window_count(split)).astype(np.int64)]
        return (u * (len(self.tokens[split]) - self.block_size)).astype(np.int64)

    def windows(self, split, start):
        """Windows at start (B,) of a split -> inputs and next-token targets, (B, T) int64, IGNORE where not learned."""
        at, within = start[:, None] + np.arange(self.block_size + 1), True  # (B, T + 1)
        if split in self.rows:  # behind a row comes the next example, and at the end nothing: filled, never learned
            last = self.rows[split][1][np.searchsorted(self.rows[split][0], start)][:, None] - 1
            within, at = at <= last, np.minimum(at, last)
        ids = self.tokens[split][at].astype(np.int64)
        if ids.max() >= self.vocab_size:
            fail(f"{self.name}/{split}.bin holds token id {ids.max()}, outside the vocabulary of {self.vocab_size}; "
                 f"{self.again}")
        x, y = ids[:, :-1], ids[:, 1:]
        if split in self.masks:
            learned = (self.masks[split][at] > 0) & within
            y = np.where(learned[:, 1:], y, IGNORE)
        return torch.from_numpy(x), torch.from_numpy(y)


def draw(q, u):
    """
    Systematic sampling of n sequences over sources with probabilities q (K,), from uniform numbers u (n + 1,): u[0] is
    the one offset of n equally spaced points on the cumulative q. Source k gets floor(n q_k) or ceil(n q_k) sequences,
    n q_k in expectation, so none is missing by chance. Returns the source of each sequence, (n,) in ascending order.
    """
    n = len(u) - 1
    edges = np.cumsum(q)
    edges /= edges[-1]
    return np.minimum(np.searchsorted(edges, (np.arange(n) + u[0]) / n, side="right"), len(q) - 1)


def gather(sets, split, source, u):
    """
    Sequence i starts at the fraction u[i] of a split of sets[source[i]]. Returns inputs and next-token targets, both
    (B, T) int64. Loops over sources, never over tokens.
    """
    x, y = torch.empty(2, len(source), sets[0].block_size, dtype=torch.int64)
    for k in np.unique(source):
        rows = np.flatnonzero(source == k)
        x[rows], y[rows] = sets[k].windows(split, sets[k].at_fraction(split, u[rows]))
    return x, y


# ---------------------------------------------------------------------------------------------------------------------
# the fused weighted cross-entropy

def head_pass(hidden, weight, targets, coef=None, G_val=None, grad_hidden=False, grad_weight=False, chunk=None):
    """
    The LM head and its loss, forward and backward in one walk over the tokens, never holding more than chunk x V
    logits. With the final hidden state h_t, the softmax p_t and the one-hot target y_t, the gradient of token t's loss
    is (p_t - y_t) at the logits, W^T (p_t - y_t) at h_t and (p_t - y_t) h_t^T at the head W.

    hidden (N, C), weight (V, C), targets (N,) with IGNORE where nothing is learned, coef (N,) the factor of each
    token's loss in the total, G_val (V, C) the target's gradient at the head.
    Returns token_loss (N,) in nats and, where asked for (else None):
        alignment (N,)    <G_val, (p_t - y_t) h_t^T> = (p_t - y_t) . (G_val h_t), one matmul more: formula (2)
        grad_h (N, C), grad_W (V, C)    gradients of sum_t coef_t token_loss_t
    """
    N, V = len(hidden), len(weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)  # softmax and sums; bfloat16 has 8 bits, too few to add up in
    # a chunk's logits are as many numbers as the hidden states and the head, which are in memory anyway: the peak is
    # then set by the model and not by N x V, and the matmuls are as large as that allows
    chunk = chunk or max(64, (N + V) * hidden.shape[1] // V)
    W, G = weight.to(dtype), None if G_val is None else G_val.to(dtype)
    token_loss = torch.empty(N, dtype=wide, device=hidden.device)
    alignment = torch.empty_like(token_loss) if G is not None else None
    grad_h = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if grad_hidden else None
    grad_W = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if grad_weight else None
    with torch.autocast(device, enabled=False):
        for i in range(0, N, chunk):
            s = slice(i, i + chunk)
            h, learned, y = hidden[s].to(dtype), targets[s] != IGNORE, targets[s].clamp(min=0)[:, None]
            p = (h @ W.T).to(wide)  # (n, V) logits; the same memory becomes p, then p - y
            logit_y, top = p.gather(1, y), p.amax(1, keepdim=True)
            total = p.sub_(top).exp_().sum(1, keepdim=True)
            token_loss[s] = (total.log() + top - logit_y).squeeze(1) * learned
            if G is None and not grad_hidden and not grad_weight:
                continue
            p = p.div_(total).scatter_add_(1, y, torch.full_like(logit_y, -1.0)).to(dtype)
            if G is not None:
                alignment[s] = ((p @ G).to(wide) * h).sum(1) * learned
            if grad_hidden:
                grad_h[s] = (p @ W) * coef[s, None]
            if grad_weight:
                grad_W += p.T @ (h * coef[s, None]).to(dtype)
    return token_loss, alignment, grad_h, grad_W


class FusedWeightedCrossEntropy(torch.autograd.Function):
    """
    loss = sum_t coef_t token_loss_t, its gradients computed in the forward pass, while the logits are there.
    Differentiable in hidden, weight and coef, once; token_loss and alignment come out detached.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, coef, G_val, chunk, training):
        token_loss, alignment, grad_h, grad_W = head_pass(hidden, weight, targets, coef, G_val, training, training,
                                                          chunk)
        if training:
            ctx.save_for_backward(grad_h.to(hidden.dtype), grad_W.to(weight.dtype), token_loss.to(coef.dtype))
        ctx.mark_non_differentiable(*(t for t in (token_loss, alignment) if t is not None))
        return (coef * token_loss).sum(), token_loss, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_h, grad_W, grad_coef = (g * grad_loss for g in ctx.saved_tensors)
        return grad_h, grad_W, None, grad_coef, None, None, None


def fused_cross_entropy(hidden, weight, targets, r=None, G_val=None, chunk=None, divisor=None):
    """
    Weighted next-token loss from hidden states, sum_t r_t token_loss_t / divisor. hidden (N, C), weight (V, C), targets
    (N,), r (N,) weights of the tokens (None: all 1), G_val (V, C) or None, divisor a number (None: sum_t r_t, for the
    mean). Returns (loss in nats, token_loss (N,), alignment (N,) or None). Tokens with target IGNORE count nowhere;
    a mean over nothing is NaN, as F.cross_entropy's is.
    """
    r = torch.ones_like(targets, dtype=torch.promote_types(hidden.dtype, torch.float32)) if r is None else r
    r = r * (targets != IGNORE)
    coef = r / (r.sum() if divisor is None else divisor)
    return FusedWeightedCrossEntropy.apply(hidden, weight, targets, coef, G_val, chunk, torch.is_grad_enabled())


@torch.no_grad()
def target_gradient(model, weight, x, y, n_learned):
    """
    G_val (V, C), the mean over a target batch's n_learned learned tokens of (p_t - y_t) h_t^T, or the part of it that
    the sequences x, y (B, T) contribute. One forward pass, no autograd.
    """
    hidden = model(x).flatten(0, 1)
    learned = (y.flatten() != IGNORE).to(torch.float32)
    return head_pass(hidden, weight, y.flatten(), learned / n_learned, grad_weight=True)[3]


def full_target_gradient(net, x, y, n_learned):
    """
    The target's gradient over all parameters, {name: gradient}, or the part of it that the sequences x, y (B, T)
    contribute: the mean over the batch's n_learned learned tokens. One forward and one backward pass.
    """
    loss = fused_cross_entropy(net(x).flatten(0, 1), net.lm_head.weight, y.flatten(), divisor=n_learned)[0]
    names, parameters = zip(*net.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@torch.no_grad()
def full_alignment(net, x, y, token_loss, g_val, shift=1e-4):
    """
    Alignments (B, T) over all parameters. <g_val, g_t> is the derivative of token t's loss along g_val, so that one
    forward pass at weights moved against g_val, by `shift` of their norm, gives every token's by a finite difference.
    x, y (B, T); token_loss (B, T) at the weights as they are; g_val as full_target_gradient() returns it.
    """
    weights = dict(net.named_parameters())
    norm, size = (torch.stack([t.norm() for t in tensors.values()]).norm() for tensors in (g_val, weights))
    distance = shift * size / norm.clamp(min=1e-30)
    moved = {name: w - distance * g_val[name] for name, w in weights.items()}
    hidden = torch.func.functional_call(net, moved, (x,))  # (B, T, C)
    after = fused_cross_entropy(hidden.flatten(0, 1), moved["lm_head.weight"], y.flatten(), divisor=1)[1]
    return (token_loss - after.view_as(y)) / distance


def batch_loss(model, head, x, y, r, n_tokens, G_val=None):
    """
    A micro-batch's part of the step's loss, sum_t r_t token_loss_t / n_tokens. x, y (B, T); r (B,) weights of its
    sequences; n_tokens the step has in all, learned or not. Dividing by their number and not by the sum of the weights
    keeps the expected gradient exactly sum_k alpha_k g_k. Returns (loss, token_loss (B, T), alignment (B, T) or None).
    """
    hidden = model(x)  # (B, T, C)
    loss, token_loss, alignment = fused_cross_entropy(hidden.flatten(0, 1), head, y.flatten(),
                                                      r.repeat_interleave(x.shape[1]), G_val, divisor=n_tokens)
    return loss, token_loss.view_as(y), None if G_val is None else alignment.view_as(y)


def loss_weights(alpha, q, density):
    """
    Formula (1): the weight (K,) of source k's tokens when sequences are drawn with probabilities q (K,), any q that is
    nowhere 0 where alpha is not. alpha_k is a share of tokens, of which density_k are learned, so the mean loss over
    the learned tokens of a stream mixed by alpha is sum_k beta_k L_k, beta_k in proportion to alpha_k density_k. For
    text the weight is alpha_k / q_k. It is 0 / 0, and not used, where a source is neither wanted nor drawn.
    """
    return alpha / (q * (alpha * density).sum())


# ---------------------------------------------------------------------------------------------------------------------
# the mixture

def mixture_gradient(alpha, alignment, present, eta=1.0, density=1.0):
    """
    Gradient on z of L_val(w - eta sum_k alpha_k g_k), alpha = softmax(z), to first order in eta: formula (3). alpha,
    alignment and present (a mask) are (K,). A source absent from the batch has no alignment: it stays out of the
    centring and gets 0, for a missing measurement is no evidence.

    density (K,) is the learned share of each source's tokens. Where they differ the loss is sum_k beta_k L_k (see
    loss_weights()), and a batch of n tokens learns from n M of them, M = sum_k alpha_k density_k. The step is then taken
    as eta sqrt(M) sum_k beta_k g_k: AdamW divides by the gradient's noise, which falls with the root of that number.
    So the mixture also leans to sources that teach more per token; without it, long prompts are taken to be free.
    """
    def share(weight):  # among the sources present
        return weight * present / (weight * present).sum()
    alpha_, beta = share(alpha), share(alpha * density)
    alignment = torch.where(present, alignment, 0.0)
    mean = (beta * alignment).sum()
    return -eta * (alpha * present).sum() * (beta * (alignment - mean) + 0.5 * mean * (beta - alpha_))


def alignment_scale(weight, alignment, present):
    """
    The root mean square of the alignments (K,), sources weighted by weight (K,): the unit that they are compared in. A
    gradient's scale says nothing about mixtures, falls as training goes on, and differs from model to model.
    """
    return ((weight * present * alignment**2).sum() / (weight * present).sum()).sqrt().clamp(min=1e-18)


def entropy_gradient(alpha, present):
    """Gradient on z of sum_k alpha_k log alpha_k, alpha = softmax(z): descending it evens the mixture out. (K,)"""
    share = alpha * present / (alpha * present).sum()
    return torch.where(present, alpha * (alpha.log() - (share * torch.where(present, alpha.log(), 0)).sum()), 0.0)


def mixture_step(z, gradient, alpha, present, learning_rate):
    """
    Natural-gradient step on z (K,), in place: the gradient on softmax's logits over alpha (K,), which is mirror descent
    on the simplex (alpha_k is multiplied by exp(learning_rate eta (A_k - mean)), whatever alpha_k is). Formula (3) by
    itself would leave a source that has lost its weight where it is. Present sources only.
    """
    z -= learning_rate * torch.where(present, gradient / alpha.clamp(min=1e-30), 0.0)


def read_mixture(flag, text, names, tokens):
    """
    What --mixture or --start_mixture names -> a schedule: fractions of training (P,) and the mixture at each (P, K). P
    is 1 for a constant one. Weights need not sum to 1; a source that the text does not name gets 0.
    """
    if text == "uniform":
        rows = [dict.fromkeys(names, 1.0)]
    elif text == "proportional":
        rows = [dict(zip(names, tokens))]
    elif text.endswith((".json", ".jsonl")):
        try:
            lines = Path(text).read_text().splitlines(keepends=True)
            if text.endswith(".json"):
                rows = [json.loads("".join(lines))["mixture"]]
            else:  # a run in progress may be in the middle of its last line
                log = [json.loads(line) for line in lines if line.endswith("\n")]
                rows = [row["alpha"] for row in log]
        except OSError as error:
            fail(f"{flag} {text}: {error.strerror}; a search writes it to its out_dir")
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{flag} {text}: not a mixture that fastmix wrote ({error!r})")
    else:
        try:
            pairs = [(name.strip(), float(value)) for name, value in (pair.split("=") for pair in text.split(","))]
        except ValueError:
            fail(f"{flag} {text}: not a .json or .jsonl file, uniform, proportional, or a=0.8,b=0.2")
        if len(dict(pairs)) < len(pairs):
            fail(f"{flag} {text}: a name is given twice")
        rows = [dict(pairs)]
    for row in rows:
        if not isinstance(row, dict) or not row.keys() <= set(names):
            fail(f"{flag} {text} names {', '.join(map(str, row))}, but --sources are {', '.join(names)}")
        bad = [f"{k}={v}" for k, v in row.items() if not (isinstance(v, (int, float)) and 0 <= v < math.inf)]
        if bad or not sum(row.values()) > 0:
            fail(f"{flag} {text}: {bad[0] if bad else 'all weights are 0'}; weights must be numbers from 0 up, one "
                 "of them above 0")
    if not rows:
        fail(f"{flag} {text}: empty")
    alphas = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)
    steps = torch.tensor([row["step"] for row in log] if text.endswith(".jsonl") else [0.0], dtype=torch.float64)
    return steps / max(steps.max().item(), 1), alphas / alphas.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# helpers of the loop

def learning_rate_at(step, args):
    """Linear warm-up, then cosine decay to min_lr."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (args.learning_rate - args.min_lr)


@torch.no_grad()
def evaluate(model, weight, tokens, split, max_tokens, batch_size, device):
    """Mean loss in nats a learned token over windows spread evenly over a split: always the same, nothing is drawn."""
    n = tokens.window_count(split)
    pick = np.unique(np.linspace(0, n - 1, max(1, min(n, max_tokens // tokens.block_size))).round().astype(np.int64))
    start = tokens.rows[split][0][pick] if split in tokens.rows else pick * tokens.block_size
    total = learned = 0
    for at in np.array_split(start, math.ceil(len(pick) / batch_size)):
        x, y = (t.to(device) for t in tokens.windows(split, at))
        total += fused_cross_entropy(model(x).flatten(0, 1), weight, y.flatten(), divisor=1)[0].item()
        learned += (y != IGNORE).sum().item()
    return total / learned if learned else math.nan


@torch.no_grad()
def accuracy(model, weight, tokens, max_tokens, batch_size, device):
    """
    Share of a test split's short answers that greedy decoding gives exactly, and their number (0 for plain text). Each
    example stands alone, its prompt first; a conversation's last answer counts. Greedy decoding repeats an answer if,
    and only if, the likeliest token after every true prefix is the true one, so one forward pass tells.
    """
    if "test" not in tokens.rows:
        return 0.0, 0
    ids, mask = tokens.tokens["test"], tokens.masks["test"]
    pairs = []  # where an example starts, where its answer does, where both end
    for start, end in zip(*tokens.examples("test")):
        read = np.flatnonzero(mask[start:end] == 0)
        answer = start + (read[-1] + 1 if len(read) else 1)
        if 0 < end - answer <= SHORT_ANSWER and end - start <= tokens.block_size + 1:
            pairs.append((start, answer, end))
    pairs, right = pairs[:: math.ceil(len(pairs) * tokens.block_size / max_tokens) or 1], 0
    for i in range(0, len(pairs), batch_size):
        rows = pairs[i: i + batch_size]
        x = torch.zeros(len(rows), tokens.block_size, dtype=torch.int64)
        y = torch.full_like(x, IGNORE)
        for j, (start, answer, end) in enumerate(rows):
            example = torch.from_numpy(ids[start:end].astype(np.int64))
            x[j, : len(example) - 1] = example[:-1]
            y[j, answer - start - 1: len(example) - 1] = example[answer - start:]
        hidden, asked = model(x.to(device)), (y != IGNORE).to(device)
        wrong = torch.zeros(y.shape, dtype=torch.bool, device=device)
        wrong[asked] = (hidden[asked] @ weight.to(hidden.dtype).T).argmax(1) != y.to(device)[asked]
        right += (~wrong.any(1)).sum().item()
    return right / max(1, len(pairs)), len(pairs)


def save_atomically(path, write):
    """write(file) into a temporary name, then rename: path holds the old content or the new, never a part."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); what was there before is unharmed. Make room and go "
             "on with --resume")


def bars(names, alpha):
    """The largest weights as small bars: python ▆ 0.71  math ▂ 0.20"""
    order = sorted(range(len(names)), key=lambda k: -alpha[k])[:8]
    return "  ".join(f"{names[k]} {'▁▂▃▄▅▆▇█'[min(7, int(alpha[k] * 8))]} {alpha[k]:.2f}" for k in sorted(order))


def by_name(names, values):
    """(K,) -> {name: value}, None where there is none (NaN), for JSON knows no NaN."""
    return {n: None if math.isnan(v) else v for n, v in zip(names, values.tolist())}


# ---------------------------------------------------------------------------------------------------------------------

def main():
    sys.stdout.reconfigure(errors="replace")  # a terminal without the bars' glyphs must not stop a run
    args = parse_args()
    out = Path(args.out_dir)
    held = [f for f in ("log.jsonl", "ckpt.pt", "mixture.json") if (out / f).exists()]
    if args.resume and args.overwrite:
        fail("--resume goes on with a run and --overwrite deletes it; give one of them")
    if held and not args.resume and not args.overwrite:
        fail(f"{out}/ holds another run ({', '.join(held)}); add --resume to go on with it, --overwrite to replace it, "
             "or choose another --out_dir")
    ckpt = None
    if args.resume:
        ckpt = load_checkpoint(out / "ckpt.pt", "start anew with --overwrite")
        stored = ckpt["args"]
        args = parse_args({k: v for k, v in stored.items() if k not in ("resume", "overwrite")})
        changed = [k for k, v in vars(args).items() if k not in MAY_CHANGE and v != stored[k]]
        if changed:
            fail(f"{out}/ckpt.pt was made with --{changed[0]} {stored[changed[0]]}, not {getattr(args, changed[0])}; "
                 "resume without that flag, or start a new run in another --out_dir")
    init = None
    if args.init_from and not ckpt:
        init = load_checkpoint(args.init_from, "--init_from takes a ckpt.pt that fastmix.py wrote")
        model_flags = ("n_layer", "n_head", "n_embd")
        args = parse_args({f: init["config"][f] for f in (*model_flags, "block_size")})
        for f in model_flags:
            if getattr(args, f) != init["config"][f]:
                fail(f"{args.init_from} has --{f} {init['config'][f]}, not {getattr(args, f)}; leave the flag out")

    # device
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[device].is_available():
        fail(f"--device {device}: torch {torch.__version__} finds none here; use --device auto")
    # torchrun starts `world` processes. They share each batch, and hold the same weights and the same mixture
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *_, **__: None
    if world > 1:
        if args.batch_size % world or args.target_batch_size < world:
            fail(f"{world} processes share a batch: --batch_size {args.batch_size} must be a multiple of {world}, and "
                 f"--target_batch_size {args.target_batch_size} at least that")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    searching = args.mixture is None
    differences = searching and args.alignment == "all"  # of losses, which rounding would drown
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and not differences else "float32"
    autocast = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    if differences and dtype != "float32":
        fail("--dtype bfloat16 rounds away the differences of losses that --alignment all takes; use --dtype float32")
    torch.set_float32_matmul_precision("highest" if differences else "high")  # high: TF32 on CUDA

    # data
    sample = args.sources is None
    names = [n.strip() for n in (args.sources or SAMPLE_SOURCES).split(",")]
    if sample:  # go on with what this machine has
        names = [n for n in names if Path(args.data_dir, n, "meta.json").is_file()] or names
    target_names = [n.strip() for n in args.target.split(",")] if args.target else [SAMPLE_TARGET] if sample else names
    note = "" if args.target or sample else " (the sources' own val splits in equal parts)"
    for flag, given in (("--sources", names), ("--target", target_names)):
        twice = [n for n in given if given.count(n) > 1]
        if twice:
            fail(f"{flag} names {twice[0]} twice")
    loaded = {n: TokenSet(args.data_dir, n, args.block_size) for n in dict.fromkeys(names + target_names)}
    sources, targets = [loaded[n] for n in names], [loaded[n] for n in target_names]
    vocab_size, tokenizer, K = sources[0].vocab_size, sources[0].tokenizer, len(names)
    for s in loaded.values():
        if (s.tokenizer, s.vocab_size) != (tokenizer, vocab_size):
            fail(f"'{s.name}' was prepared with the tokenizer {s.tokenizer} ({s.vocab_size} ids), '{names[0]}' with "
                 f"{tokenizer} ({vocab_size}); prepare both with the same --tokenizer")
    if init and (init["tokenizer"], init["config"]["vocab_size"]) != (tokenizer, vocab_size):
        fail(f"{args.init_from} was trained with the tokenizer {init['tokenizer']} ({init['config']['vocab_size']} "
             f"ids), '{names[0]}' was prepared with {tokenizer} ({vocab_size}); prepare it with the same --tokenizer")
    digests = {n: [s.meta["splits"]["train"].get(key) for key in ("sha256", "mask_sha256")] for n, s in loaded.items()}
    available = [s.available for s in sources]  # tokens to train on, for packed examples with what fills the rows
    if ckpt and ckpt["digests"] != digests:
        fail(f"the data in {args.data_dir}/ is not what {out}/ckpt.pt was trained on; prepare it as it was, or start a "
             "new run in another --out_dir")
    if args.start_mixture and not searching:
        fail("--start_mixture is where a search starts, and with --mixture nothing is searched; give one of them")
    given = ("--start_mixture", args.start_mixture or "uniform") if searching else ("--mixture", args.mixture)
    schedule = ckpt["schedule"] if ckpt else read_mixture(*given, names, available)
    first = schedule[1][-1 if searching else 0]  # (K,) the mixture of the first step
    if searching and first.min() <= 0:
        fail(f"--start_mixture {args.start_mixture} gives {names[first.argmin()]} no weight, and a search cannot raise "
             "it from 0; give every source some")
    if args.entropy * args.learning_rate_mixture >= 1:  # a step of this term takes log alpha times 1 - the product
        fail(f"--entropy {args.entropy:g} times --learning_rate_mixture {args.learning_rate_mixture:g} must be below 1, "
             "or the mixture overshoots; 10 already holds it near uniform")
    if args.uniform_share is None:
        args.uniform_share = 0.25 if searching else 0.0
    args.sources, args.target = ",".join(names), ",".join(target_names)  # what is saved says what was used

    # model
    if args.n_embd % (2 * args.n_head):
        fail(f"--n_embd {args.n_embd} must be an even multiple of --n_head {args.n_head}")
    torch.manual_seed(args.seed)
    net = GPT(GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd)).to(device)
    model, head = torch.compile(net) if args.compile else net, net.lm_head.weight
    if init or ckpt:
        try:
            net.load_state_dict((init or ckpt)["model"])
        except (RuntimeError, TypeError, AttributeError):
            fail(f"{args.init_from if init else out / 'ckpt.pt'}: its weights do not fit its settings; it was not "
                 "written by this fastmix.py")
    # for training only: its backward pass averages the gradients over the processes
    shared = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay, (0.9, 0.95), fused=device != "mps")

    # all state of the loop; what a checkpoint holds
    train_rng, target_rng = torch.Generator().manual_seed(args.seed), torch.Generator().manual_seed(args.seed + 1)
    start, seconds = 0, 0.0
    z = (first / first.max()).log().float().to(device)  # (K,) logits of the mixture; 0 where it starts uniform
    wide = torch.float32 if device == "mps" else torch.float64
    alpha_sum, alpha_sum_half = torch.zeros(2, K, dtype=wide, device=device)  # over all steps, over the last half
    drawn = torch.zeros(K, dtype=torch.int64)  # tokens seen of each source
    meter = torch.zeros(4, K, device=device)  # since the last line: loss sum, tokens, alignment sum, outer steps
    known = first.float()  # (K,) the mixture that sequences are drawn by: the host's copy, one step old
    density = torch.tensor([s.density for s in sources], device=device)  # (K,) learned tokens per token drawn
    losses = []  # of each step since the last line
    before = {}  # test results of --init_from
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
        for mine, stored in zip((z, alpha_sum, alpha_sum_half, drawn, meter, known), ckpt["tensors"]):
            mine.copy_(stored)
        train_rng.set_state(ckpt["train_rng"])
        target_rng.set_state(ckpt["target_rng"])
        start, seconds, losses = ckpt["step"], ckpt["seconds"], list(ckpt["losses"].to(device))
        before = ckpt["before"]

    def save_checkpoint(step):
        if rank > 0:
            return
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args), "step": step,
                 "seconds": seconds, "tensors": [z, alpha_sum, alpha_sum_half, drawn, meter, known],
                 "losses": torch.stack(losses) if losses else torch.zeros(0), "train_rng": train_rng.get_state(),
                 "target_rng": target_rng.get_state(), "schedule": schedule, "digests": digests,
                 "config": vars(net.config), "tokenizer": tokenizer, "before": before}
        save_atomically(out / "ckpt.pt", lambda f: torch.save(state, f))

    if world > 1:
        dist.barrier()  # all have looked at out_dir before it is written to
    try:
        rows = (out / "log.jsonl").read_text().splitlines(keepends=True) if ckpt and rank == 0 else []
        rows = [r for r in rows if r.endswith("\n") and json.loads(r)["step"] <= start]  # cut back to the checkpoint
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            for f in held if args.overwrite else []:
                (out / f).unlink()
            save_atomically(out / "log.jsonl", lambda f: f.write("".join(rows).encode()))
        log = open(out / "log.jsonl" if rank == 0 else os.devnull, "a")
    except OSError as error:
        fail(f"cannot write to {out}/: {error.strerror}")
    tokens_per_step = args.batch_size * args.grad_accum * args.block_size
    say(f"{net.num_params():,} parameters, {tokens_per_step:,} tokens a step, {device}, {dtype}")
    say(f"sources {', '.join(names)}; target {', '.join(target_names)}"
        + f"{note}; {'searching' if searching else f'mixture {args.mixture}'}")
    for s in loaded.values():
        if s.cut[1]:
            say(f"{s.name}: of {s.cut[0]:,} examples {s.cut[1]:,} are longer than --block_size {args.block_size} and "
                  f"lose their end; {s.cut[2]:,} of these have a prompt as long and are left out")

    stop = []  # the first Ctrl-C or SIGTERM ends the run after the step, the second at once; processes would not agree

    def ask_to_stop(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM) if world == 1 else ():
        signal.signal(number, ask_to_stop)

    def test_results():
        """{target: its test loss in nats a learned token and in bits a byte and, if asked for, its accuracy}."""
        results = {}
        with autocast:
            for t in targets:
                counts = t.meta["splits"]["test"]
                loss = evaluate(model, head, t, "test", args.test_tokens, args.batch_size, device)
                bits = loss / math.log(2) * (counts.get("learned", counts["tokens"])
                                             / counts.get("learned_bytes", counts["bytes"]))
                results[t.name] = {"test_loss": loss, "test_bits_per_byte": bits}
                if args.eval_accuracy:
                    share, n = accuracy(model, head, t, args.test_tokens, args.batch_size, device)
                    results[t.name] |= {"accuracy": share, "answers": n} if n else {}
        return results

    def alpha_at(step):
        if searching:
            return torch.softmax(z, 0).clamp(min=1e-30)  # from 0 no step could bring a source back
        fraction, rows = step / args.max_steps, schedule[1].numpy()
        return torch.tensor([np.interp(fraction, schedule[0].numpy(), rows[:, k]) for k in range(K)],
                            dtype=torch.float32, device=device)

    def uniform_numbers(n, generator):
        return torch.rand(n, generator=generator, dtype=torch.float64).numpy()

    def report(results, when):
        for name, r in results.items():
            say(f"target {name}{when}: test loss {r['test_loss']:.4f} nats a "
                f"{'learned ' if loaded[name].masks else ''}token, {r['test_bits_per_byte']:.4f} bits a byte"
                + (f", {r['accuracy']:.1%} of {r['answers']:,} short answers right" if "accuracy" in r else ""))

    def to_device(*tensors):  # from pinned memory, so that the copies do not make the host wait for the GPU
        if device == "cuda":
            return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return [t.to(device) for t in tensors]

    if init:
        before = test_results()
        report(before, " before training")
    copied = torch.cuda.Event() if device == "cuda" else None
    member_of, n_sequences = torch.arange(K, device=device)[:, None], args.batch_size * args.grad_accum
    clock, line_seconds, line_step = time.time(), seconds, start
    val_loss, step = math.nan, start
    while True:
        # ---- report: evaluate, log, save
        last = step == args.max_steps
        seconds += time.time() - clock
        clock = time.time()
        reported = ckpt is not None and step == start  # by the run that saved this checkpoint
        evaluating = (step % args.eval_every == 0 or last) and not reported
        if evaluating:
            with autocast:
                val_loss = np.mean([evaluate(model, head, t, "val", args.eval_tokens, args.batch_size, device)
                                    for t in targets])
        logging = (step % args.log_every == 0 or evaluating) and not reported
        if logging or stop:  # before anything is saved
            values = torch.stack(losses).tolist() if losses else []
            bad = [i for i, loss in enumerate(values) if not math.isfinite(loss)]
            at = step - len(losses) + 1 + bad[0] if bad else step
            finite = all(p.isfinite().all() for p in net.parameters())
            if bad or not finite or (evaluating and not math.isfinite(val_loss)):
                fail(f"the loss is no longer finite at step {at}; stopped, the last good checkpoint stays. Lower "
                     f"--learning_rate {args.learning_rate:g} in a new run, or --resume if it was the machine")
        if logging:
            alpha = alpha_at(step).cpu().double()
            train_loss = sum(values) / len(values) if values else math.nan
            source_loss, alignment = (meter[0] / meter[1]).cpu(), (meter[2] / meter[3]).cpu()
            row = {"step": step, "alpha": by_name(names, alpha), "alignment": by_name(names, alignment),
                   "train_loss": None if math.isnan(train_loss) else train_loss,
                   "source_loss": by_name(names, source_loss),
                   "target_val_loss": float(val_loss) if evaluating else None,
                   "tokens": step * tokens_per_step, "seconds": round(seconds, 3)}
            try:
                log.write(json.dumps(row) + "\n")
                log.flush()
            except OSError as error:
                fail(f"cannot write {out}/log.jsonl: {error.strerror}; make room and go on with --resume")
            rate = (step - line_step) / max(seconds - line_seconds, 1e-9)
            eta = (args.max_steps - step) / rate if rate else 0
            say(f"step {step:5d} {100 * step / args.max_steps:3.0f}% | "
                + (f"train {train_loss:.3f} | " if rate else "") + f"target {val_loss:.3f} | "
                + (f"{rate * tokens_per_step:,.0f} tok/s | {eta:.0f} s left | " if rate else "")
                + bars(names, alpha), flush=True)
            if args.source_losses:
                say("      " + "  ".join(f"{n} {v:.3f}" for n, v in zip(names, source_loss.tolist())))
            meter.zero_()
            losses = []
            line_seconds, line_step = seconds, step
        if stop or (evaluating and step > 0):
            save_checkpoint(step)
        if stop and not last:
            say(f"stopped at step {step}; go on with: python fastmix.py --resume --out_dir {out}")
            sys.exit(130)
        if last:
            break

        # ---- outer step, first half: the target's gradient, at the head or over all parameters
        outer = searching and step % args.outer_every == 0
        G_val = g_val = None
        if outer:
            u = uniform_numbers(args.target_batch_size + 1, target_rng)
            x, y = gather(targets, "val", draw(np.ones(len(targets)), u), u[1:])
            n_learned = (y != IGNORE).sum()
            x, y = to_device(x[rank::world], y[rank::world])
            if args.alignment == "all":
                g_val = full_target_gradient(net, x, y, n_learned)
            else:
                with autocast:
                    G_val = target_gradient(model, head, x, y, n_learned)
            if world > 1:
                for part in g_val.values() if g_val else [G_val]:
                    dist.all_reduce(part)

        # ---- inner step: weighted loss of sequences drawn from q
        alpha = alpha_at(step)  # (K,)
        if copied:
            copied.synchronize()  # the host reads the last step's copy, and so is never more than a step ahead
        if not searching:
            known = alpha.cpu()
        q = (1 - args.uniform_share) * known.double() + args.uniform_share / K  # (K,) on the host
        u = uniform_numbers(n_sequences + 1, train_rng)
        source = draw(q.numpy(), u)  # (n_sequences,)
        mine = source[rank::world]
        X, Y, S, q = to_device(*gather(sources, "train", mine, u[1:][rank::world]), torch.from_numpy(mine), q.float())
        weights = loss_weights(alpha, q, density)  # (K,)
        known = alpha.to("cpu", non_blocking=device == "cuda")
        if copied:
            copied.record()
        lr = learning_rate_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seen = torch.zeros(3, K, device=device)  # of this step: sums of losses and alignments, learned tokens
        step_loss = torch.zeros((), device=device)
        for micro in range(args.grad_accum):  # every grad_accum-th sequence, so that each holds all sources
            x, y, k = (t[micro::args.grad_accum] for t in (X, Y, S))
            last_micro = micro == args.grad_accum - 1
            with autocast:
                loss, token_loss, alignment = batch_loss(shared, head, x, y, weights[k], n_sequences * args.block_size,
                                                         G_val)
            with contextlib.nullcontext() if world == 1 or last_micro else shared.no_sync():
                (loss * world).backward()
            if g_val:
                alignment = full_alignment(net, x, y, token_loss, g_val)
            member = (k == member_of).float()  # (K, B) one-hot: a matmul adds up by source, in a fixed order
            seen[0] += member @ token_loss.sum(1)
            seen[1] += member @ alignment.sum(1) if outer else 0.0
            seen[2] += member @ (y != IGNORE).float().sum(1)
            step_loss += loss.detach()
        if world > 1:
            dist.all_reduce(seen)
            dist.all_reduce(step_loss)
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- outer step, second half: move the mixture
        if outer:
            present = seen[2] > 0
            A = torch.where(present, seen[1] / seen[2], 0.0)  # (K,)
            gradient = mixture_gradient(alpha, A, present, 1 / alignment_scale(alpha * density, A, present), density)
            gradient += args.entropy * entropy_gradient(alpha, present)
            mixture_step(z, gradient, alpha, present, args.learning_rate_mixture)
            meter[2] += A
            meter[3] += present

        meter[:2] += seen[[0, 2]]
        losses.append(step_loss)
        drawn += torch.from_numpy(np.bincount(source, minlength=K)) * args.block_size
        alpha_sum += alpha
        if step >= args.max_steps // 2:
            alpha_sum_half += alpha
        step += 1

    # ---- results
    with autocast:
        final_loss = [evaluate(model, head, s, "val", args.eval_tokens, args.batch_size, device) for s in sources]
    test = test_results()
    test_loss, bits = (float(np.mean([t[key] for t in test.values()])) for key in ("test_loss", "test_bits_per_byte"))
    mixtures = {"last": alpha_at(step), "last_half_average": alpha_sum_half, "run_average": alpha_sum}
    mixtures = {n: (m.cpu().double() / m.cpu().double().sum()).tolist() for n, m in mixtures.items()}
    final, tokens = mixtures["last_half_average"], step * tokens_per_step

    say(f"\n{'source':12s} {'tokens':>12s} {'start':>7s} {'final':>7s} {'epochs':>7s} {'val loss':>9s}")
    for k, name in enumerate(names):
        say(f"{name:12s} {available[k]:12,d} {first[k]:7.3f} {final[k]:7.3f} "
            f"{final[k] * tokens / available[k]:7.2f} {final_loss[k]:9.3f}")
    say(f"final: average of the last half; epochs: of {tokens:,} tokens drawn by it; loss: nats a token")
    report(test, "")
    if len(test) > 1:
        say(f"mean of the targets: test loss {test_loss:.4f} nats a token, {bits:.4f} bits a byte")

    result = {
        "mixture": dict(zip(names, final)), "recommended": "last_half_average", "unit": "tokens",
        "mixtures": {n: dict(zip(names, m)) for n, m in mixtures.items()},
        "searched": searching, "target": target_names, "test_loss": test_loss, "test_bits_per_byte": bits,
        "targets": test, "before": before, "tokenizer": tokenizer, "seed": args.seed, "steps": step, "tokens": tokens,
        "sources": {n: {"tokens_available": available[k], "tokens_seen": int(drawn[k]),
                        "epochs": drawn[k].item() / available[k], "val_loss": final_loss[k]}
                    for k, n in enumerate(names)},
        "seconds": round(seconds, 1), "torch": torch.__version__, "settings": vars(args)}
    if rank == 0:
        save_atomically(out / "mixture.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    if world > 1:
        dist.destroy_process_group()
    say(f"wrote {out}/mixture.json, log.jsonl and ckpt.pt; draw them with: python plot_mixture.py {out}")


if __name__ == "__main__":
    main()
