"""
A GPT in the style of nanoGPT, and what a training loop needs around it: optimizer, machine, checkpoints, its sets.

The GPT differs from nanoGPT's in two points.

It stops at the final hidden state. The LM head is untied from the token embedding and is not applied here: fastmix.py
applies it inside the fused loss, which needs the hidden states and the head's weight apart. The alignment of a source
with the target is taken at the head, and with a tied head "the gradient of the head" would also be a gradient of the
embedding.

Positions are rotary (RoFormer, arXiv 2104.09864), not learned. A small model with learned positions first has to find
out which ones are neighbours, and stays at the loss of single letters for most of a short run; and without a table of
positions a checkpoint can go on with another block size.
"""
import atexit
import contextlib
import itertools
import math
import os
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from prepare_data import SAMPLE_SOURCES, SAMPLE_TARGETS, SKETCH, TokenSet, fail, save_atomically, say


@dataclass
class GPTConfig:
    vocab_size: int = 257  # 256 bytes and <|endoftext|>
    block_size: int = 64  # longest context, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128


def rotation(block_size, dim):
    """cos and sin (2, T, dim / 2) of the angles by which position t turns each pair of channels."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(block_size)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, cos, sin):
    """Turns channel pairs (i, i + D / 2) of x (B, n_head, T, D): scores q . k then depend on distances alone."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)  # q, k and v alike under autocast


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, C / n_head)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            fail(f"--n_embd {config.n_embd} must be an even multiple of --n_head {config.n_head}")
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.register_buffer("rotation", rotation(config.block_size, config.n_embd // config.n_head), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # GPT-2's initialisation: 0.02 everywhere, smaller where a block writes into the residual stream, so that the
        # stream's variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("attn.proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx):
        """Token ids (B, T), T <= block_size, to final hidden states (B, T, n_embd); logits are h @ lm_head.weight.T."""
        x = self.tok_emb(idx)  # (B, T, C)
        cos, sin = self.rotation[:, : idx.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.ln_f(x)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def configure_optimizer(self, learning_rate, weight_decay, betas, fused):
        """AdamW; matrices and embeddings decay, LayerNorm gains do not (nanoGPT's grouping)."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def learning_rate_at(step, args):
    """AdamW's learning rate at a step: linear warm-up, then cosine decay to a tenth of the peak."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


# ---- the machine ----------------------------------------------------------------------------------------------------

def start_machine(args):
    """(device, autocast context) of the flags; under torchrun this process joins the others."""
    launch = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    whole = len(launch) == 3 and all(n.isdigit() for n in launch.values()) and "MASTER_PORT" in os.environ
    if launch and not (whole and int(launch["RANK"]) < int(launch["WORLD_SIZE"])):
        given = " ".join(f"{name}={value}" for name, value in launch.items())
        fail(f"{given} in the environment is not what torchrun sets; unset it for one process, or start with torchrun")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: huge pages, fewer faults in new large tensors
    device, world = args.device, int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[device].is_available():
        fail(f"--device {device}: torch {torch.__version__} finds none here; use --device auto")
    if args.batch_size % world or args.target_batch_size < world:
        fail(f"{world} processes share a batch: --batch_size {args.batch_size} must be a multiple of {world}, and "
             f"--target_batch_size {args.target_batch_size} at least that")
    if world > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    dtype = args.dtype  # auto: bfloat16, but not on a card that only emulates it and is slower with it
    if dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = "bfloat16"
    return device, torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def ranks():
    """(number of this process, how many there are): torchrun's processes share each batch and hold equal weights."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(*tensors):
    """Sums over all processes, in place; returns the first."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
    return tensors[0]


def asked_to_stop():
    """A list that the first Ctrl-C, SIGTERM or SIGHUP fills, for the loop to look at; a second ends it at once."""
    stop = []
    if dist.is_initialized():
        return stop  # several processes would not agree on a step; torchrun ends them
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def ask(number, _):
        stop.append(number)
        for n in signals:
            signal.signal(n, signal.SIG_DFL)
    for n in signals:
        signal.signal(n, ask)
    return stop


# ---- checkpoints ----------------------------------------------------------------------------------------------------

CHECKPOINT = {"model", "optimizer", "state", "args", "config", "tokenizer", "digests"}
MODEL_FLAGS = ("n_layer", "n_head", "n_embd")
# a run may go on with these changed; everything else would make it another run
MAY_CHANGE = ("resume", "out_dir", "data_dir", "device", "compile", "log_every", "eval_tokens")


def save_checkpoint(path, model, optimizer, state, settings):
    """Writes what a run is: the settings, and what restore() puts back."""
    if ranks()[0] == 0:
        contents = settings | {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)}
        save_atomically(path, lambda f: torch.save(contents, f))


def load_checkpoint(path, mend):
    """A checkpoint that fastmix.py wrote; anything else ends the program with one line that ends in `mend`."""
    try:  # weights_only: a checkpoint from a stranger must not run code
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = CHECKPOINT - ckpt.keys() or GPTConfig.__dataclass_fields__.keys() - ckpt["config"].keys()
    except FileNotFoundError:
        fail(f"{path}: no checkpoint there; {mend}")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except Exception as error:  # whatever a file that is none of ours may raise
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); {mend}")
    if missing:
        fail(f"{path} is not a checkpoint of this fastmix.py (it lacks {', '.join(sorted(missing))}); {mend}")
    return ckpt | {"path": path}


def open_run(parse_args):
    """
    The flags of a run and the checkpoint that it starts from, if any -> (args, ckpt). With --resume the flags are those
    stored in it, with --init_from the model's are. parse_args(defaults) reads the command line. An out_dir that holds
    another run is refused.
    """
    args, ckpt = parse_args({}), None
    out = Path(args.out_dir)
    if args.resume:
        path = out / "ckpt.pt"
        ckpt = load_checkpoint(path, "leave --resume out, or correct --out_dir")
        stored = ckpt["args"]
        if not isinstance(stored, dict) or stored.keys() != vars(args).keys():
            fail(f"{path}: its settings are not those of this fastmix.py; start a new run in another --out_dir")
        args = parse_args({k: v for k, v in stored.items() if k != "resume"})
        for k, v in vars(args).items():
            if k not in MAY_CHANGE and v != stored[k]:
                fail(f"{path} was made with --{k} {stored[k]}, not {v}; resume without that flag, or start a new run "
                     "in another --out_dir")
        return args, ckpt
    if not args.out_dir or os.path.lexists(out) and not out.is_dir():
        fail(f"--out_dir '{args.out_dir}' is not the name of a folder; choose another")
    held = [str(out / f) for f in ("log.jsonl", "ckpt.pt", "mixture.json") if (out / f).exists()]
    if held:
        go_on = "add --resume to go on with it, " if (out / "ckpt.pt").exists() else ""
        fail(f"{out}/ holds another run; {go_on}choose another --out_dir, or delete it with: rm {shlex.join(held)}")
    if args.init_from:
        ckpt = load_checkpoint(args.init_from, "--init_from takes a ckpt.pt that fastmix.py wrote")
        args = parse_args({f: ckpt["config"][f] for f in (*MODEL_FLAGS, "block_size")})
        for f in MODEL_FLAGS:
            if getattr(args, f) != ckpt["config"][f]:
                fail(f"{args.init_from} has --{f} {ckpt['config'][f]}, not {getattr(args, f)}; leave the flag out")
    return args, ckpt


def restore(ckpt, model, optimizer=None, state=None):
    """Puts a checkpoint's weights into the model and, to resume, the rest into the optimizer and the loop's state."""
    def shape(name, value):  # how long a replayed schedule is only the checkpoint knows
        return (value.dtype, value.shape[name == "schedule":]) if torch.is_tensor(value) else type(value)
    try:
        model.load_state_dict(ckpt["model"])
        if state:
            stored = {k: v.to(getattr(state, k).device) if torch.is_tensor(v) else v for k, v in ckpt["state"].items()}
            optimizer.load_state_dict(ckpt["optimizer"])
            moments = [{k: m.shape for k, m in optimizer.state.get(p, {}).items()} for p in model.parameters()]
            wanted = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in model.parameters()]
            if (moments != wanted and stored["step"] > 0
                    or {k: shape(k, v) for k, v in stored.items()} != {k: shape(k, v) for k, v in vars(state).items()}):
                raise ValueError
            vars(state).update(stored)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        fail(f"{ckpt['path']}: its contents do not fit its settings; it is damaged, or not written by this fastmix.py")


# ---- the run's sets -------------------------------------------------------------------------------------------------

def overlap(some, others):
    """
    About the share of one split's documents that another holds too, from the sketches in their meta.json. A sketch has
    all hashes up to its last; where it is not cut off, all there are.
    """
    a, b = (counts.get("sketch", "").split() for counts in (some, others))
    known = min((sketch[-1] for sketch in (a, b) if len(sketch) == SKETCH), default="g")  # "g" is beyond any hash
    seen = [hashed for hashed in a if hashed <= known]
    return len(set(seen) & set(b)) / max(len(seen), 1)


def parse_names(flag, text):
    """a,b or, for a target, a=2,b=1 -> {name: weight}, 1 where none is given."""
    weights = {}
    for item in text.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if not name:
            fail(f"{flag} '{text}' has an empty name; give names separated by commas")
        if name in weights:
            fail(f"{flag} names {name} twice")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf or equals and flag == "--sources":
            kind = "a name or NAME=WEIGHT, a weight above 0" if flag == "--target" else "a name"
            fail(f"{flag} '{text}': '{item}' is not {kind}")
    return weights


def load_sets(args, ckpt=None):
    """
    The sets that --sources and --target name -> (sources, targets, the targets' weights, which sum to 1), TokenSets and
    floats; args.sources and args.target then say what was used. ckpt is the checkpoint that training starts from.
    Whatever is wrong with the data ends here, or is said.
    """
    if args.sources is None:  # the sample: go on with what this machine has
        there = [n for n in SAMPLE_SOURCES if Path(args.data_dir, n, "meta.json").is_file()]
        args.sources = ",".join(there or SAMPLE_SOURCES)
        args.target = SAMPLE_TARGETS[0] if args.target is None else args.target
    args.target = args.sources if args.target is None else args.target
    sources, targets = parse_names("--sources", args.sources), parse_names("--target", args.target)
    loaded = {n: TokenSet(args.data_dir, n, args.block_size) for n in sources | targets}
    if args.resume and ckpt["digests"] != {n: s.digest for n, s in loaded.items()}:
        fail(f"the data in {args.data_dir}/ is not what {args.out_dir}/ckpt.pt was trained on; prepare it as it was, "
             "or start a new run in another --out_dir")
    made_with = {f"'{s.name}'": (s.tokenizer, s.vocab_size) for s in loaded.values()}
    if ckpt:
        made_with[ckpt["path"]] = ckpt["tokenizer"], ckpt["config"]["vocab_size"]
    (first, (tokenizer, size)), *others = made_with.items()
    for other, found in others:
        if found != (tokenizer, size):
            fail(f"{other} was made with the tokenizer {found[0]} ({found[1]} ids), {first} with {tokenizer} ({size}); "
                 "prepare all with the same --tokenizer")
    for s in loaded.values():
        examples, long, left_out = s.cut
        if long:
            say(f"{s.name}: of {examples:,} examples {long:,} are longer than --block_size {args.block_size} and "
                f"lose their end; {left_out:,} of these have a prompt as long and are left out")
    for t, s, split in itertools.product(targets, sources, ("val", "test")):
        share = overlap(loaded[t].meta["splits"][split], loaded[s].meta["splits"]["train"])
        if share >= 0.005:
            say(f"warning: about {share:.0%} of the {split} split of target {t} is in the train split of source {s}")
    total = sum(targets.values())
    return [loaded[n] for n in sources], [loaded[n] for n in targets], [w / total for w in targets.values()]


def read_bounds(text, names):
    """web=0.1:0.5,code=:0.3 -> least and largest shares, (2, K), 0 and 1 where nothing is said."""
    bounds, left = np.array([[0.0], [1.0]]).repeat(len(names), 1), list(names)
    for item in text.split(",") if text else ():
        name, _, span = (part.strip() for part in item.partition("="))
        try:
            left.remove(name)
            low, high = (float(end or default) for end, default in zip(span.split(":"), (0, 1), strict=True))
        except ValueError:
            fail(f"--bounds '{text}': '{item}' is not NAME=LEAST:LARGEST with one of {', '.join(names)}, each once")
        if not 0 <= low <= high <= 1 or high == 0:
            fail(f"--bounds '{text}': {low:g}:{high:g} is no range of shares above 0 and up to 1; to leave {name} out, "
                 "leave it out of --sources")
        bounds[:, names.index(name)] = low, high
    if bounds[0].sum() > 1 + 1e-9 or bounds[1].sum() < 1 - 1e-9:
        fail(f"--bounds '{text}': the least shares add up to {bounds[0].sum():g}, the largest to {bounds[1].sum():g}; "
             "1 must lie between them")
    return bounds


def plan(args, sources, n_sequences):
    """
    Least and largest shares (2, K) for a search over the sources, by --bounds and by what --train_tokens, the length of
    the run that the mixture is for, allows in --max_epochs. Also for --mixture: each source shows only the fraction
    this run's tokens / --train_tokens of its train split, so that the proxy sees that run's repetition. n_sequences: of
    a step.
    """
    names = [s.name for s in sources]
    lower, upper = read_bounds(args.bounds, names)
    for s in sources if args.train_tokens else ():
        s.visible = min(1.0, args.max_steps * n_sequences * args.block_size / args.train_tokens)
    if args.mixture is not None:
        return read_bounds(None, names)
    if n_sequences < 2:
        fail("a search compares sources within a step: --batch_size times --grad_accum must be at least 2")
    if n_sequences < len(sources):
        say(f"warning: with {n_sequences} sequences a step for {len(sources)} sources, each step compares only some of "
            "them")
    if args.train_tokens:
        epoch = np.array([s.available("train") for s in sources])

        def capped(tokens):
            return np.minimum(upper, args.max_epochs * epoch / tokens)

        def can_be_had(tokens):
            return capped(tokens).sum() >= 1 - 1e-9 and (capped(tokens) >= lower).all()
        if not can_be_had(args.train_tokens):
            low, high = 0.0, args.train_tokens
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if can_be_had(middle) else (low, middle)
            fail(f"--train_tokens {args.train_tokens:g} takes more than --max_epochs {args.max_epochs:g} of these "
                 f"sources{' within --bounds' * bool(args.bounds)}; at most {int(low)} can be had")
        upper = capped(args.train_tokens)
    return np.stack([lower, upper])
