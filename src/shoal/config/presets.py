"""
Named model shapes, the widths derived from a shape, and the consistency checks of a shape.

Each preset holds values of the model's public Hugging Face `config.json` (repository named beside it), under our names.
It lists only values that differ from `Model`'s defaults, and those that make it recognizable.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Final

from shoal.config.families import FAMILIES, ROPE_SCALING, Family
from shoal.config.options import Model

GPT2_VOCAB: Final = 50_257
LLAMA3_VOCAB: Final = 128_256


def _gpt2(dim: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """Return the shape of openai-community/gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    return {
        "family": "gpt2", "vocab_size": GPT2_VOCAB, "dim": dim, "num_layers": num_layers, "num_heads": num_heads,
        "max_seq_len": 1024, "norm_eps": 1e-5, "tie_embeddings": True, "init_std": 0.02,
    }  # fmt: skip


PRESETS: Final[dict[str, dict[str, Any]]] = {
    # shoal's own, for experiments: about a million parameters without the embedding. vocab_size is the tokenizer's.
    "tiny": {
        "family": "llama", "dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 448,
        "max_seq_len": 512, "tie_embeddings": True,
    },
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        "family": "llama", "vocab_size": 49_152, "dim": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
        "head_dim": 64, "ffn_dim": 1536, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 100_000.0,
        "tie_embeddings": True, "init_std": 1 / 24,  # 0.041666666666666664 = 1 / sqrt(576)
    },
    # Qwen/Qwen3-0.6B: heads are wider than dim / num_heads
    "qwen3-0.6b": {
        "family": "llama", "vocab_size": 151_936, "dim": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8,
        "head_dim": 128, "ffn_dim": 3072, "max_seq_len": 40_960, "norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "qk_norm": True, "tie_embeddings": True, "init_std": 0.02,
    },
    # meta-llama/Llama-3.2-1B
    "llama-3.2-1b": {
        "family": "llama", "vocab_size": LLAMA3_VOCAB, "dim": 2048, "num_layers": 16, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 64, "ffn_dim": 8192, "max_seq_len": 131_072, "norm_eps": 1e-5,
        "rope_theta": 500_000.0, "rope_factor": 32.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "rope_original_seq_len": 8192, "tie_embeddings": True, "init_std": 0.02,
    },
    # meta-llama/Llama-3.1-8B
    "llama-3.1-8b": {
        "family": "llama", "vocab_size": LLAMA3_VOCAB, "dim": 4096, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "ffn_dim": 14_336, "max_seq_len": 131_072, "norm_eps": 1e-5,
        "rope_theta": 500_000.0, "rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "rope_original_seq_len": 8192, "tie_embeddings": False, "init_std": 0.02,
    },
}  # fmt: skip


def resolve_shape(model: Model) -> Model:
    """Return `model` with every derived width filled in; `vocab_size` is left to the tokenizer."""
    family = FAMILIES[model.family]
    return dataclasses.replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.dim // model.num_heads,
        ffn_dim=model.ffn_dim or (_ffn_dim(model.dim, family) if family.native else None),
    )


def _ffn_dim(dim: int, family: Family) -> int:
    """
    Return 4 dim, or with a gate 8/3 dim rounded up to a multiple of 64, which matrix units prefer.

    Three matrices of 8/3 dim cost the same as two of 4 dim (Shazeer 2020, arXiv:2002.05202, section 3).
    """
    return -(-dim * 8 // (3 * 64)) * 64 if family.gated else 4 * dim


def shape_problems(model: Model) -> list[tuple[str, str]]:
    """Return the problems of a shape: (option's name in `Model`, message with valid values)."""
    family = FAMILIES[model.family]
    if not family.native:
        return [*_folder_problems(model)]
    problems = (_head_problems, _unused_problems, _rope_problems, _fixed_head_problems)
    return [problem for find in problems for problem in find(model, family)]


def _folder_problems(model: Model) -> Iterator[tuple[str, str]]:
    if model.from_ is None:
        yield (
            "family",
            f"{model.family} takes its shape from a folder; set model.from to one with config.json and weights, or "
            "model.family to llama",
        )


def _head_problems(model: Model, family: Family) -> Iterator[tuple[str, str]]:
    uneven = model.head_dim is None and model.dim % model.num_heads
    if uneven:
        fits = ", ".join(map(str, _divisors_near(model.dim, model.num_heads)))
        yield (
            "num_heads",
            f"{model.num_heads} heads do not divide dim {model.dim}; set model.num_heads to a divisor ({fits}), or set "
            "model.head_dim",
        )
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        fits = ", ".join(map(str, _divisors_near(model.num_heads, model.num_kv_heads)))
        yield (
            "num_kv_heads",
            f"{model.num_kv_heads} key heads cannot be shared evenly by {model.num_heads} query heads; set "
            f"model.num_kv_heads to a divisor of num_heads ({fits})",
        )
    head_dim = model.head_dim or model.dim // model.num_heads
    if family.rotary and head_dim % 2 and not uneven:
        key = "head_dim" if model.head_dim else "num_heads"
        yield key, f"RoPE rotates pairs, and a head is {head_dim} wide; set model.head_dim to an even number"


def _divisors_near(number: int, wanted: int) -> list[int]:
    """Return the four divisors of `number` nearest to `wanted`, ascending."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:4])


def _unused_problems(model: Model, family: Family) -> Iterator[tuple[str, str]]:
    for key, default in _not_default(model, family.unused):
        others = " or ".join(name for name, other in FAMILIES.items() if other.native and key not in other.unused)
        yield key, f"the {model.family} family has no {key}; set model.{key} to {default}, or model.family to {others}"


def _rope_problems(model: Model, family: Family) -> Iterator[tuple[str, str]]:
    if not family.rotary:
        return
    if model.qk_norm and model.qkv_bias:
        yield (
            "qkv_bias",
            "no transformers model has both model.qk_norm and model.qkv_bias, so it could not be exported; set one of the two "
            "to false",
        )
    if model.rope_factor is None:
        for key, default in _not_default(model, ROPE_SCALING):
            yield key, f"model.{key} has no effect without model.rope_factor; set that, or model.{key} to {default}"
    elif model.rope_low_freq_factor >= model.rope_high_freq_factor:
        yield (
            "rope_low_freq_factor",
            f"{model.rope_low_freq_factor:g} is not below model.rope_high_freq_factor {model.rope_high_freq_factor:g}; "
            "Llama 3 uses 1 and 4",
        )


def _fixed_head_problems(model: Model, family: Family) -> Iterator[tuple[str, str]]:
    if family.free_heads:
        return
    if model.num_kv_heads not in (None, model.num_heads):
        yield (
            "num_kv_heads",
            f"{model.family} has a key head for each of its {model.num_heads} query heads; set model.num_kv_heads to "
            "null, or model.family to llama",
        )
    if model.head_dim is not None and model.head_dim * model.num_heads != model.dim:
        yield (
            "head_dim",
            f"{model.family} heads are dim / num_heads wide; set model.head_dim to null (not {model.head_dim})",
        )


def _not_default(model: Model, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield each of `keys` that differs from its default, with that default as a recipe spells it."""
    defaults = Model()
    for key in keys:
        default = getattr(defaults, key)
        if getattr(model, key) != default:
            yield key, json.dumps(default)
