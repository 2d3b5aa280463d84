"""
A config.json of any model of transformers -> the values of our `Model` that other rooms ask for.

Only what has a common meaning is read, by the names that configs use for it. The arithmetic is transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shoal.errors import ModelError
from shoal.hub.values import Kind, kind_of_option, wrong_values

Json = Mapping[str, Any]

# ours -> what configs call it
NAMES: Final = {
    "vocab_size": ("vocab_size",),
    "dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn_dim": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_seq_len": ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "seq_length"),
}
_NEEDED: Final = ("vocab_size", "dim", "num_layers", "num_heads")
UNBOUNDED: Final = 1_048_576  # tokens, of a config that names no longest context
_KINDS: Final = {"model_type": Kind(str), "tie_word_embeddings": Kind(bool)}
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_any_shape(config: Json, where: str) -> dict[str, Any]:
    """
    The values of `Model` with `family: hf`. Raises `ModelError` with all that cannot be honoured, or is not said.
    """
    keys = {ours: key for ours in NAMES if (key := _key_of(config, ours))}
    values: dict[str, Any] = {"family": "hf", **{ours: config[keys[ours]] if ours in keys else None for ours in NAMES}}
    problems = [f"it does not say {' or '.join(NAMES[k])}" for k in _NEEDED if values[k] is None]
    checked = {key: kind_of_option(ours) for ours, key in keys.items() if ours != "max_seq_len"}
    problems += wrong_values(config, checked | _KINDS)
    problems += wrong_values(drop_rates(config), {key: kind_of_option("dropout") for key in drop_rates(config)})
    problems += _refused(config)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ModelError(f"{where} cannot be trained through transformers here:\n{lines}")
    longest = values["max_seq_len"] or 0
    values["max_seq_len"] = longest if longest > 0 else UNBOUNDED  # 0 and -1 are how some say that there is none
    values["dropout"] = max(drop_rates(config).values(), default=0.0)
    if isinstance(config.get("tie_word_embeddings"), bool):
        values["tie_embeddings"] = config["tie_word_embeddings"]
    return values


def _key_of(config: Json, ours: str) -> str | None:
    """The first of its names that has a whole number: some models have a list there, one for each block."""
    return next((key for key in NAMES[ours] if type(config.get(key)) is int), None)


def drop_rates(config: Json) -> dict[str, float]:
    """What a config says of dropout, by its own keys; those that are zero are left out."""
    said = re.compile(r"(dropout|pdrop|drop_rate|_drop)($|_)")  # those of heads that are not built do not count
    rates = {k: v for k, v in config.items() if said.search(k) and not re.search("classifier|summary|cls", k)}
    return {k: float(v) for k, v in rates.items() if Kind(float).takes(v) and v}


def _refused(config: Json) -> Iterator[str]:
    if config.get("quantization_config"):
        yield "quantization_config: weights that are trained are float32, bfloat16 or float16 in files"
    for key in _EXPERTS:
        count = config.get(key)
        if isinstance(count, int) and count > 1:
            yield f"{key} {count}: a mixture of experts trains its router with a loss of its own, which is not built here"
            break
    if config.get("is_encoder_decoder"):
        yield "is_encoder_decoder: only decoders are trained here"
    if "text_config" in config:
        yield "text_config: a model of more than text; take the folder of its language model alone"
    if config.get("layerdrop"):
        yield f"layerdrop {config['layerdrop']}: no block is left out here; set it to 0 there"
