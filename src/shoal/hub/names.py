"""
Our parameters' names <-> those in Hugging Face's files: a table a family.

A parameter of ours lies in one tensor of theirs, perhaps transposed (GPT-2 keeps its matrices as [in, out]), perhaps
as one of several parts side by side (GPT-2's query, key and value).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple


class Place(NamedTuple):
    """Where a parameter lies in their files."""

    name: str
    transposed: bool = False
    part: int = 0  # of `parts` equal ones along our rows
    parts: int = 1


# `N` stands for a block's number.
_LLAMA: Final = {
    "embed.weight": Place("model.embed_tokens.weight"),
    "norm.weight": Place("model.norm.weight"),
    "head.weight": Place("lm_head.weight"),
    "blocks.N.attention_norm.weight": Place("model.layers.N.input_layernorm.weight"),
    "blocks.N.ffn_norm.weight": Place("model.layers.N.post_attention_layernorm.weight"),
    **{f"blocks.N.attention.{x}.{y}": Place(f"model.layers.N.self_attn.{x}_proj.{y}")
       for x in "qkvo" for y in ("weight", "bias")},
    **{f"blocks.N.attention.{x}_norm.weight": Place(f"model.layers.N.self_attn.{x}_norm.weight") for x in "qk"},
    **{f"blocks.N.ffn.{x}.weight": Place(f"model.layers.N.mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
}  # fmt: skip
_GPT2: Final = {
    "embed.weight": Place("transformer.wte.weight"),
    "position.weight": Place("transformer.wpe.weight"),
    "head.weight": Place("lm_head.weight"),
    **{f"{ours}.{x}": Place(f"transformer.{theirs}.{x}")
       for ours, theirs in (("norm", "ln_f"), ("blocks.N.attention_norm", "h.N.ln_1"), ("blocks.N.ffn_norm", "h.N.ln_2"))
       for x in ("weight", "bias")},
    **{f"blocks.N.attention.{x}.weight": Place("transformer.h.N.attn.c_attn.weight", True, part, 3)
       for part, x in enumerate("qkv")},
    **{f"blocks.N.attention.{x}.bias": Place("transformer.h.N.attn.c_attn.bias", False, part, 3)
       for part, x in enumerate("qkv")},
    **{f"blocks.N.{ours}.{x}": Place(f"transformer.h.N.{theirs}.{x}", x == "weight")
       for ours, theirs in (("attention.o", "attn.c_proj"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj"))
       for x in ("weight", "bias")},
}  # fmt: skip
_TABLES: Final[dict[str, Mapping[str, Place]]] = {"llama": _LLAMA, "gpt2": _GPT2}

# What some files hold beside the weights: masks and frequencies, which are computed.
_COMPUTED: Final = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def place(family: str, name: str) -> Place:
    """Where the parameter that we call `name` lies. KeyError for a name that the family does not have."""
    if family == "hf":
        return Place(name)  # transformers' own names
    number = re.match(r"blocks\.(\d+)\.", name)
    if number is None:
        return _TABLES[family][name]
    found = _TABLES[family][re.sub(r"^blocks\.\d+\.", "blocks.N.", name)]
    return found._replace(name=found.name.replace(".N.", f".{number[1]}."))


def spellings(name: str) -> tuple[str, ...]:
    """A tensor's name as files have it: some leave out what comes before the base model's own names."""
    return (name, re.sub(r"^(model|transformer)\.", "", name))


def is_computed(name: str) -> bool:
    """Whether a tensor of theirs holds no weights."""
    return _COMPUTED.search(name) is not None
