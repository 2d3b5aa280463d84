"""
Parameters and FLOPs of a shape: the only formulas for them in shoal.

A matrix product of [m, k] by [k, n] takes 2 m k n FLOPs. Backward has two products of that size, so training takes 3
times forward. Norms, softmax and activations are not counted: the convention of PaLM (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), which defines MFU.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from shoal.config.families import FAMILIES
from shoal.config.options import Model
from shoal.config.presets import resolve_shape
from shoal.hub.find import find_model
from shoal.hub.folder import ModelFolder
from shoal.hub.names import is_computed

Attention = Literal["causal", "full"]


def parameter_count(model: Model) -> int:
    """Return the number of parameters, with a tied head counted once; with `family: hf`, by the tensor shapes in its folder."""
    if not FAMILIES[model.family].native:
        return sum(map(prod, folder_shapes(model).values()))
    return _embedding(model) + _matrices(model) + _vectors(model)


def matmul_parameter_count(model: Model) -> int:
    """
    Return the number of weights that multiply each token: the blocks' matrices and the head, tied or not.

    Token and learned position embeddings are not counted: their rows are looked up, not multiplied.
    """
    if not FAMILIES[model.family].native:
        return _folder_matrices(model)
    tied_head = _vocab_size(model) * model.dim if model.tie_embeddings else 0
    return _matrices(model) + tied_head


def flops_per_token(model: Model, seq_len: int, attention: Attention = "causal") -> int:
    """
    Return the FLOPs of forward and backward for one token in a row of `seq_len` tokens.

    6 N + 12 L H Q T of PaLM's appendix B (L layers, H heads, Q head_dim, T seq_len), where N is `matmul_parameter_count`.
    `full` counts every pair of tokens, `causal` half of them. Recomputation by activation checkpointing is not useful
    work, and is not counted.
    """
    if not FAMILIES[model.family].native:
        return 6 * _folder_matrices(model) + _folder_pairs(model, seq_len, attention)
    model = resolve_shape(model)
    assert model.head_dim is not None
    pairs = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return 6 * matmul_parameter_count(model) + (pairs if attention == "full" else pairs // 2)


def _embedding(model: Model) -> int:
    positions = 0 if FAMILIES[model.family].rotary else model.max_seq_len
    return (_vocab_size(model) + positions) * model.dim


def _matrices(model: Model) -> int:
    """Count the blocks' matrices, and the head unless it is tied."""
    q_dim, kv_dim, ffn_dim = _widths(model)
    attention = 2 * model.dim * q_dim + 2 * model.dim * kv_dim  # q and o, k and v
    ffn = (3 if FAMILIES[model.family].gated else 2) * model.dim * ffn_dim
    head = 0 if model.tie_embeddings else _vocab_size(model) * model.dim
    return model.num_layers * (attention + ffn) + head


def _vectors(model: Model) -> int:
    """Count norms and biases."""
    family, (q_dim, kv_dim, ffn_dim) = FAMILIES[model.family], _widths(model)
    norm = (1 + family.biases) * model.dim
    biases = (q_dim + 2 * kv_dim) * (family.biases or model.qkv_bias)
    if family.biases:
        biases += model.dim + (1 + family.gated) * ffn_dim + model.dim  # o, up (and gate), down
    qk_norms = 2 * (q_dim // model.num_heads) * model.qk_norm
    return model.num_layers * (2 * norm + biases + qk_norms) + norm


def _widths(model: Model) -> tuple[int, int, int]:
    """Return the widths of (all query heads, all key heads, the feed-forward)."""
    model = resolve_shape(model)
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    assert model.ffn_dim is not None
    return model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.ffn_dim


def _vocab_size(model: Model) -> int:
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null; set it to the tokenizer's before counting")
    return model.vocab_size


# --- models of transformers, counted from their folder ------------------------------------------------------------------


def why_no_flops(model: Model, seq_len: int) -> str | None:
    """Return the reason why `flops_per_token` would be a guess; None if it is exact."""
    if FAMILIES[model.family].native:
        return None
    config = _folder(model).config
    strange = {t for t in config.get("layer_types") or () if t not in ("full_attention", "sliding_attention")}
    if strange:
        return f"shoal has no FLOPs formula for {', '.join(sorted(strange))}"
    if any(len(shape) > 2 for shape in folder_shapes(model).values()):
        return "shoal has no FLOPs formula for weights with more than two dims"
    return None


def _folder(model: Model) -> ModelFolder:
    assert model.from_ is not None
    return ModelFolder.open(find_model(model.from_, model.kept))


def folder_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the folder's parameters, without the second copy of a tied embedding that some files have."""
    shapes = {name: entry.shape for name, entry in _folder(model).tensors.items() if not is_computed(name)}
    tables = [name for name, shape in shapes.items() if _is_table(shape, model)]
    if model.tie_embeddings and len(tables) > 1:
        del shapes[tables[-1]]
    return shapes


def _is_table(shape: tuple[int, ...], model: Model) -> bool:
    """Return whether a tensor has a row per token of the vocabulary: an embedding or a head."""
    return len(shape) == 2 and shape[0] == model.vocab_size


def _folder_matrices(model: Model) -> int:
    """
    Count all matrices that multiply a token.

    Of two matrices with a row per token of the vocabulary, one is the embedding, a lookup, and is not counted. A single such
    matrix is also the head, and is counted. A table of learned position embeddings is not counted either: its rows are looked
    up. It has one row per position of the longest context (OPT has two more rows).
    """
    shapes = folder_shapes(model).values()
    tables = [prod(shape) for shape in shapes if _is_table(shape, model)]
    positions = range(model.max_seq_len, model.max_seq_len + 3)
    others = [s for s in shapes if len(s) == 2 and not _is_table(s, model)]
    looked_up = [s for s in others if s[0] in positions and s[1] == model.dim]
    return sum(map(prod, others)) - (prod(looked_up[0]) if len(looked_up) == 1 else 0) + max(tables, default=0)


def _folder_pairs(model: Model, seq_len: int, attention: Attention) -> int:
    """Sum 12 H Q times the number of tokens that attention sees, over the layers: those of the row, or of a sliding window."""
    model = resolve_shape(model)
    assert model.head_dim is not None
    seen = 0.0
    for window in _windows(_folder(model).config, model.num_layers):
        span = min(seq_len, window or seq_len)
        # with a causal mask, the first `span` tokens of a row see half of `span` on average
        seen += span if attention == "full" else span - span**2 / (2 * seq_len)
    return int(12 * model.num_heads * model.head_dim * seen)


def _windows(config: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """Return the sliding window of each layer, in tokens; None: unlimited."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
