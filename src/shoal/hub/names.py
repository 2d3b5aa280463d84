"""
Our parameters' names and those in Hugging Face's files, by the tables of `config/families.py`.

Each parameter is in one tensor of theirs, perhaps transposed (GPT-2 keeps its matrices as [in, out]), perhaps as one
of several parts side by side (GPT-2's query, key and value).
"""

from __future__ import annotations

import re
from typing import Final

from shoal.config.families import FAMILIES, Stored

# Tensors that some files hold beside the weights: masks and frequencies, which are computed.
_COMPUTED: Final = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def stored_as(family: str, name: str) -> Stored:
    """Return where the files hold our parameter `name`. Raises `KeyError` if the family lacks it."""
    if not FAMILIES[family].native:
        return Stored(name)  # transformers' own names
    found = FAMILIES[family].tensors[re.sub(r"^blocks\.\d+\.", "blocks.N.", name)]
    number = re.match(r"blocks\.(\d+)\.", name)
    return found._replace(name=found.name.replace(".N.", f".{number[1]}.")) if number else found


def spellings(name: str) -> tuple[str, ...]:
    """Return the names a tensor may have in files: some omit the prefix before the base model's own names."""
    return (name, re.sub(r"^(model|transformer)\.", "", name))


def is_computed(name: str) -> bool:
    """Return whether a tensor of theirs is computed, rather than a weight."""
    return _COMPUTED.search(name) is not None
