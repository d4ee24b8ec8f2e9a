"""
A GPT in the style of nanoGPT, with two differences.

It stops at the final hidden state. The LM head is untied from the token embedding and is not applied here: fastmix.py
applies it inside the fused loss, which needs the hidden states and the head's weight apart. The alignment of a source
with the target is taken at the head, and with a tied head "the gradient of the head" would also be a gradient of the
embedding.

Positions are rotary (RoFormer, arXiv 2104.09864), not learned. A small model with learned positions first has to find
out which ones are neighbours, and stays at the loss of single letters for most of a short run; and without a table of
positions a checkpoint can go on with another block size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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
        assert config.n_embd % config.n_head == 0
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
