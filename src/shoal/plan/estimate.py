"""
THE formulas: parameters and FLOPs of a shape. Whatever else in shoal needs such a number takes it from here.

A matrix product of [m, k] by [k, n] is 2 m k n FLOPs; backward does two of the same size, so training is 3 times
forward. Norms, softmax and activations are not counted (the convention of PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, which MFU is defined by).
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
    """Trainable values; a tied head is counted once. With `family: hf`, what the folder's files hold."""
    if not FAMILIES[model.family].native:
        return sum(map(prod, _folder_tensors(model).values()))
    return _embedding(model) + _matrices(model) + _vectors(model)


def matmul_parameter_count(model: Model) -> int:
    """
    Weights each token is multiplied by: the blocks' matrices and the head, which costs the same when it is tied.

    The embedding is a look-up and learned positions are a sum: neither is counted.
    """
    if not FAMILIES[model.family].native:
        return _folder_matrices(model)
    tied_head = _vocab_size(model) * model.dim if model.tie_embeddings else 0
    return _matrices(model) + tied_head


def flops_per_token(model: Model, seq_len: int, attention: Attention = "causal") -> int:
    """
    Forward and backward of one token in a row of `seq_len` tokens, in FLOPs.

    6 N + 12 L H Q T of PaLM's appendix B (L layers, H heads, Q head_dim, T seq_len), where N is
    `matmul_parameter_count`. `full` counts every pair of tokens, `causal` the half that a causal mask leaves. What
    activation checkpointing computes again is not useful work, and not counted.
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
    """Of the blocks, and the head where it is a matrix of its own."""
    q_dim, kv_dim, ffn_dim = _widths(model)
    attention = 2 * model.dim * q_dim + 2 * model.dim * kv_dim  # q and o, k and v
    ffn = (3 if FAMILIES[model.family].gated else 2) * model.dim * ffn_dim
    head = 0 if model.tie_embeddings else _vocab_size(model) * model.dim
    return model.num_layers * (attention + ffn) + head


def _vectors(model: Model) -> int:
    """Norms and biases."""
    family, (q_dim, kv_dim, ffn_dim) = FAMILIES[model.family], _widths(model)
    norm = (1 + family.biases) * model.dim
    biases = (q_dim + 2 * kv_dim) * (family.biases or model.qkv_bias)
    if family.biases:
        biases += model.dim + (1 + family.gated) * ffn_dim + model.dim  # o, up (and gate), down
    qk_norms = 2 * (q_dim // model.num_heads) * model.qk_norm
    return model.num_layers * (2 * norm + biases + qk_norms) + norm


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


# --- a model of transformers, by its folder ------------------------------------------------------------------


def why_no_flops(model: Model, seq_len: int) -> str | None:
    """Why `flops_per_token` would be a guess; None where it is none."""
    if FAMILIES[model.family].native:
        return None
    config = _folder(model).config
    strange = {t for t in config.get("layer_types") or () if t not in ("full_attention", "sliding_attention")}
    if strange:
        return f"nobody here has counted what {', '.join(sorted(strange))} costs"
    if any(len(shape) > 2 for shape in _folder_tensors(model).values()):
        return "its weights are more than vectors and matrices, and nobody here has counted what they cost"
    return None


def _folder(model: Model) -> ModelFolder:
    assert model.from_ is not None
    return ModelFolder.open(find_model(model.from_, model.kept))


def _folder_tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of its parameters; a tied head that the files hold, too, is left out."""
    shapes = {name: entry.shape for name, entry in _folder(model).tensors.items() if not is_computed(name)}
    tables = [name for name, shape in shapes.items() if _is_table(shape, model)]
    if model.tie_embeddings and len(tables) > 1:
        del shapes[tables[-1]]
    return shapes


def _is_table(shape: tuple[int, ...], model: Model) -> bool:
    """Whether a tensor has a row for each token: an embedding, or a head."""
    return len(shape) == 2 and shape[0] == model.vocab_size


def _folder_matrices(model: Model) -> int:
    """
    Of all matrices; of two with a row for each token one is looked up, and one alone is the head, too.

    Learned positions, as many as the longest context (OPT keeps two more), are looked up.
    """
    shapes = _folder_tensors(model).values()
    tables = [prod(shape) for shape in shapes if _is_table(shape, model)]
    positions = range(model.max_seq_len, model.max_seq_len + 3)
    others = [s for s in shapes if len(s) == 2 and not _is_table(s, model)]
    looked_up = [s for s in others if s[0] in positions and s[1] == model.dim]
    return sum(map(prod, others)) - (prod(looked_up[0]) if len(looked_up) == 1 else 0) + max(tables, default=0)


def _folder_pairs(model: Model, seq_len: int, attention: Attention) -> int:
    """12 H Q of each layer for each token that another sees: as many as the row has, or its window."""
    model = resolve_shape(model)
    assert model.head_dim is not None
    seen = 0.0
    for window in _windows(_folder(model).config, model.num_layers):
        span = min(seq_len, window or seq_len)
        # behind a causal mask the first tokens of a row, or of a window, see half of it on average
        seen += span if attention == "full" else span - span**2 / (2 * seq_len)
    return int(12 * model.num_heads * model.head_dim * seen)


def _windows(config: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """How far each layer looks back; None: all the way."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
