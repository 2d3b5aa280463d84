"""A plain torch loop, in one file as nanoGPT's: a compact Llama, torch's fused AdamW, autocast for bfloat16, no torch.compile."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from scripts.peers.contract import Recorder, Spec, adamw, answer, batches, load, read_weights, steps
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention of H heads with one projection for queries, keys and values."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.qkv = nn.Linear(spec.dim, 3 * spec.dim, bias=False)
        self.o = nn.Linear(spec.dim, spec.dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        q_BHTd, k_BHTd, v_BHTd = heads
        q_BHTd, k_BHTd = rotated(q_BHTd, cos_Td, sin_Td), rotated(k_BHTd, cos_Td, sin_Td)
        out = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


def rotated(x_BHTd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Return queries or keys turned by their position; a pair is element i of each half."""
    left, right = x_BHTd.chunk(2, dim=-1)
    return (x_BHTd * cos_Td + torch.cat((-right, left), dim=-1) * sin_Td).type_as(x_BHTd)


class Block(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(spec.dim, spec.norm_eps) for _ in range(2))
        self.attention = Attention(spec)
        self.gate, self.up = (nn.Linear(spec.dim, spec.ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(spec.ffn_dim, spec.dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD), cos_Td, sin_Td)
        normed = self.norm_2(x_BTD)
        out: Tensor = x_BTD + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out


class GPT(nn.Module):
    """Embedding, blocks, norm, head; the loss is the mean over all tokens."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.dim, spec.norm_eps)
        self.lm_head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        width = spec.dim // spec.num_heads
        angles = torch.outer(torch.arange(spec.seq_len), spec.rope_theta ** -(torch.arange(0, width, 2) / width))
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        logits_BTV = self.lm_head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def named_here(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return the weights under the names of `GPT`."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    parts = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attention.o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    found = {ours: theirs[name] for ours, name in names.items()}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        found |= {f"blocks.{layer}.{ours}.weight": theirs[f"{prefix}{part}.weight"] for ours, part in parts.items()}
        found[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(
            [theirs[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"]
        )
    if "lm_head.weight" in theirs:
        found["lm_head.weight"] = theirs["lm_head.weight"]
    return found


def model_of(spec: Spec) -> GPT:
    """Return the model with the spec's weights."""
    model = GPT(spec)
    load(model, named_here(read_weights(spec.weights), spec.num_layers))
    return model


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    model = model_of(spec)
    optimizer = adamw(model, spec)
    mixed = torch.autocast("cpu", torch.bfloat16) if spec.dtype == "bfloat16" else contextlib.nullcontext()
    for batch in steps(spec, recorder, batches(spec)):
        with mixed:
            loss = model(batch["input_ids"], batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss.detach())
    return model


if __name__ == "__main__":
    answer(train, [])
