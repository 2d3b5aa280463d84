"""
THE formulas: parameters and FLOPs of a shape. Whatever else in shoal needs such a number takes it from here.

A matrix product of [m, k] by [k, n] is 2 m k n FLOPs; backward does two of the same size, so training is 3 times
forward. Norms, softmax and activations are not counted (the convention of PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, which MFU is defined by).
"""

from __future__ import annotations

from typing import Literal

from shoal.config import Model
from shoal.presets import resolve_shape

Attention = Literal["causal", "full"]


def parameter_count(model: Model) -> int:
    """Trainable values; a tied head is counted once."""
    return _embedding(model) + _matrices(model) + _vectors(model)


def matmul_parameter_count(model: Model) -> int:
    """
    Weights each token is multiplied by: the blocks' matrices and the head, which costs the same when it is tied.

    The embedding is a look-up and learned positions are a sum: neither is counted.
    """
    tied_head = _vocab_size(model) * model.dim if model.tie_embeddings else 0
    return _matrices(model) + tied_head


def flops_per_token(model: Model, seq_len: int, attention: Attention = "causal") -> int:
    """
    Forward and backward of one token in a row of `seq_len` tokens, in FLOPs.

    6 N + 12 L H Q T of PaLM's appendix B (L layers, H heads, Q head_dim, T seq_len), where N is
    `matmul_parameter_count`. `full` counts every pair of tokens, `causal` the half that a causal mask leaves. What
    activation checkpointing computes again is not useful work, and not counted.
    """
    model = resolve_shape(model)
    assert model.head_dim is not None
    pairs = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return 6 * matmul_parameter_count(model) + (pairs if attention == "full" else pairs // 2)


def _embedding(model: Model) -> int:
    positions = model.max_seq_len if model.family == "gpt2" else 0
    return (_vocab_size(model) + positions) * model.dim


def _matrices(model: Model) -> int:
    """Of the blocks, and the head where it is a matrix of its own."""
    q_dim, kv_dim, ffn_dim = _widths(model)
    attention = 2 * model.dim * q_dim + 2 * model.dim * kv_dim  # q and o, k and v
    ffn = (2 if model.family == "gpt2" else 3) * model.dim * ffn_dim  # up and down; gate, up and down
    head = 0 if model.tie_embeddings else _vocab_size(model) * model.dim
    return model.num_layers * (attention + ffn) + head


def _vectors(model: Model) -> int:
    """Norms and biases."""
    q_dim, kv_dim, ffn_dim = _widths(model)
    if model.family == "gpt2":
        norm = 2 * model.dim  # weight and bias
        biases = q_dim + 2 * kv_dim + model.dim + ffn_dim + model.dim  # q, k and v, o, up, down
        return model.num_layers * (2 * norm + biases) + norm
    head_dim = q_dim // model.num_heads
    biases = (q_dim + 2 * kv_dim) * model.qkv_bias
    return model.num_layers * (2 * model.dim + biases + 2 * head_dim * model.qk_norm) + model.dim


def _widths(model: Model) -> tuple[int, int, int]:
    """(all query heads, all key heads, feed-forward), in values."""
    model = resolve_shape(model)
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    assert model.ffn_dim is not None
    return model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.ffn_dim


def _vocab_size(model: Model) -> int:
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: take it from the tokenizer before counting")
    return model.vocab_size
