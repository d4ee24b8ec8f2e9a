"""
What a fork replaces: a GPT in the style of nanoGPT, its initialisation, optimizer and checkpoints.

The GPT differs from nanoGPT's in two points.

It stops at the final hidden state. The LM head is not tied to the token embedding and is not
applied here: fastmix.py applies it inside the fused loss, which needs the hidden states and the
head's weight apart. A source's alignment with the target is taken at the head, and with a tied
head "the head's gradient" would also be the embedding's.

Positions are rotary (RoFormer, arXiv 2104.09864), not learned. A small model with learned positions
first has to find out which ones are neighbours, and stays at the loss of single letters for most of
a short run. And without a table of positions a checkpoint can be trained further with another block
size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare_data import fail, save_atomically


# ---- the model ---------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int = 257  # 256 bytes and <|endoftext|>
    block_size: int = 64  # longest context, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128


def rotation(block_size, dim):
    """cos and sin, (2, T, dim / 2), of the angles by which position t turns each channel pair."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(block_size)[:, None] * frequency  # (T, dim / 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, cos, sin):
    """
    Turns the channel pairs (i, i + D / 2) of x (B, n_head, T, D). A score q . k then depends on
    the distance between two positions alone.
    """
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.type_as(x)  # under autocast q and k must have the dtype of v


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
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
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
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        angles = rotation(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotation", angles, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # GPT-2's initialisation: 0.02 everywhere, less where a block writes into the residual
        # stream, so that the stream's variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue  # LayerNorm gains stay at 1
            std = 0.02
            if name.endswith(("attn.proj.weight", "down.weight")):
                std /= math.sqrt(2 * config.n_layer)
            nn.init.normal_(p, std=std)

    def forward(self, idx):
        """
        Token ids (B, T), T <= block_size, to final hidden states h (B, T, n_embd). The logits are
        h @ lm_head.weight.T, (B, T, vocab_size).
        """
        x = self.tok_emb(idx)  # (B, T, C)
        cos, sin = self.rotation[:, : idx.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.ln_f(x)

    def configure_optimizer(self, learning_rate, weight_decay, fused):
        """AdamW. Matrices and embeddings decay, LayerNorm gains do not (nanoGPT's grouping)."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay},
                  {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


# ---- checkpoints -------------------------------------------------------------------------------

# beside these a checkpoint holds the run's settings: args, config, tokenizer, digests
CHECKPOINT = {"model", "optimizer", "state", "args", "config", "tokenizer", "digests"}


def save_checkpoint(path, model, optimizer, state, settings):
    """Writes all that a run is: its settings (a dict), and what restore() puts back."""
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "state": vars(state), **settings}
    save_atomically(path, lambda file: torch.save(contents, file))


def load_checkpoint(path, mend):
    """
    The dict that save_checkpoint() wrote. Any other file ends the program with one line, which
    closes with `mend`: what the user can do.
    """
    try:
        # weights_only: a stranger's checkpoint must not run code
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = CHECKPOINT - ckpt.keys()
    except FileNotFoundError:
        fail(f"{path}: no checkpoint there; {mend}")
    except Exception as error:  # there is no telling what a file that is none of ours raises
        fail(f"{path} cannot be read as a checkpoint ({type(error).__name__}); {mend}")
    if missing:
        fail(f"{path} is not a checkpoint of this fastmix.py; {mend}")
    return ckpt


def restore(ckpt, path, model, optimizer=None, state=None):
    """
    Puts a checkpoint's weights into the model and, to resume, the rest into the optimizer and the
    loop's state (a namespace; tensors keep their device). Ends the program if anything differs.
    """
    try:
        model.load_state_dict(ckpt["model"])
        if optimizer is not None:
            optimizer.load_state_dict(ckpt["optimizer"])
            # which compares the number of tensors, and not their shapes
            for p, moments in optimizer.state.items():
                for moment in moments.values():
                    if moment.dim() > 0 and moment.shape != p.shape:
                        raise ValueError("another model's optimizer")
        if state is not None:
            for name, value in vars(state).items():
                stored = ckpt["state"][name]
                if not torch.is_tensor(value):
                    setattr(state, name, stored)
                elif value.shape != stored.shape:
                    raise ValueError(f"{name} has another shape")
                else:
                    value.copy_(stored)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path} does not fit this model and its settings ({type(error).__name__}); it is "
             "damaged, or another version wrote it")
