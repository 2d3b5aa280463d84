"""The model and the data of recipes/learn, in plain torch, for the two scripts beside this file."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

VOCAB, DIM, FFN, LAYERS, HEADS, SEQ_LEN = 257, 128, 384, 4, 4, 256  # VOCAB: 256 bytes, end of text
SEED, STEPS, WARMUP, PEAK = 0, 40, 10, 2e-3


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [batch, heads, time, width of a head]
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def rotate(x: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) by an angle that grows with the position."""
    half = x.shape[-1] // 2
    speeds = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2]).unsqueeze(-1) * speeds
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(DIM, FFN, bias=False), nn.Linear(DIM, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(DIM, eps=1e-5), Attention()
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(DIM, eps=1e-5), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama of 918,912 parameters, with the parameter names of exported weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM, eps=1e-5)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def load_model(exported: Path) -> Llama:
    """Return the model with the weights that `shoal export` wrote."""
    model = Llama()
    weights = load_file(exported / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return model


def load_rows(prepared: Path) -> Tensor:
    """Return the rows of a folder that `shoal prepare` wrote: int64 [rows, SEQ_LEN + 1]; neighboring rows share a token."""
    shards = [load_file(path)["tokens"].long() for path in sorted(prepared.glob("train-*.safetensors"))]
    return torch.cat(shards).unfold(0, SEQ_LEN + 1, SEQ_LEN)


def learning_rate(step: int) -> float:
    """Return the learning rate of `step`, 1 to STEPS: a linear warmup, then half a cosine down to 0."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)


def shuffled(position: int, rows: int) -> int:
    """
    Return the row at a position of the endless sequence of samples; each epoch has an order of its own.

    The order is computed, not stored: a bijection on the next power of four, made of rounds that each mix one half of the
    bits into the other (a Feistel network), applied again until the result is below `rows`. So every process can compute
    the row at any position.
    """
    epoch, x = divmod(position, rows)
    key = mix(mix(SEED) + epoch)
    bits = max(1, ((rows - 1).bit_length() + 1) // 2)
    while True:
        left, right = x >> bits, x & (1 << bits) - 1
        for turn in range(6):
            left, right = right, left ^ mix(right ^ mix(key + turn)) & (1 << bits) - 1
        if (x := left << bits | right) < rows:
            return x


def mix(x: int) -> int:
    """Return 64 bits that each depend on every bit of x (splitmix64)."""
    mask = (1 << 64) - 1
    x = x + 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
