"""
The config.json of any transformers model, read into the values of our `Model` that other modules use.

Only keys that mean the same in all configs are read, under any of their usual names. transformers does the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shoal.errors import ModelError
from shoal.hub.values import Kind, kind_of_option, wrong_values

Json = Mapping[str, Any]

# our option -> its names in configs
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
UNBOUNDED: Final = 1_048_576  # tokens, for a config without a maximum context
_KINDS: Final = {"model_type": Kind(str), "tie_word_embeddings": Kind(bool)}
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_any_shape(config: Json, where: str) -> dict[str, Any]:
    """
    Return the values of `Model` with `family: hf`.

    Raises `ModelError`, which lists every such value, if values are unsupported or missing.
    """
    keys = {ours: key for ours in NAMES if (key := _key_of(config, ours))}
    values: dict[str, Any] = {"family": "hf", **{ours: config[keys[ours]] if ours in keys else None for ours in NAMES}}
    problems = [f"{' or '.join(NAMES[k])} is missing" for k in _NEEDED if values[k] is None]
    checked = {key: kind_of_option(ours) for ours, key in keys.items() if ours != "max_seq_len"}
    problems += wrong_values(config, checked | _KINDS)
    problems += wrong_values(drop_rates(config), {key: kind_of_option("dropout") for key in drop_rates(config)})
    problems += _refused(config)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ModelError(f"{where} cannot be trained through transformers:\n{lines}")
    longest = values["max_seq_len"] or 0
    values["max_seq_len"] = longest if longest > 0 else UNBOUNDED  # some configs use 0 or -1 for no maximum
    values["dropout"] = max(drop_rates(config).values(), default=0.0)
    if isinstance(config.get("tie_word_embeddings"), bool):
        values["tie_embeddings"] = config["tie_word_embeddings"]
    return values


def _key_of(config: Json, ours: str) -> str | None:
    """Return the first key for our option that has an integer: some models have a list there, with one entry per block."""
    return next((key for key in NAMES[ours] if type(config.get(key)) is int), None)


def drop_rates(config: Json) -> dict[str, float]:
    """Return a config's nonzero dropout rates, by its own keys."""
    said = re.compile(r"(dropout|pdrop|drop_rate|_drop)($|_)")  # the keys of classifier heads do not count
    rates = {k: v for k, v in config.items() if said.search(k) and not re.search("classifier|summary|cls", k)}
    return {k: float(v) for k, v in rates.items() if Kind(float).takes(v) and v}


def _refused(config: Json) -> Iterator[str]:
    if config.get("quantization_config"):
        yield "quantization_config: weights must be float32, bfloat16 or float16 in files"
    for key in _EXPERTS:
        count = config.get(key)
        if isinstance(count, int) and count > 1:
            yield f"{key} {count}: a mixture of experts needs an extra loss for its router, which shoal does not implement"
            break
    if config.get("is_encoder_decoder"):
        yield "is_encoder_decoder: only decoders are supported"
    if "text_config" in config:
        yield "text_config: a multimodal model; use the folder of its language model alone"
    if config.get("layerdrop"):
        yield f"layerdrop {config['layerdrop']}: shoal skips no block; set it to 0 in the config"
