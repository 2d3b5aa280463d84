"""
The names of shoal's parameters and of the tensors in a Hugging Face checkpoint, by the tables of `config/families.py`.

Each parameter is stored in one tensor of the checkpoint: perhaps transposed (GPT-2 stores matrices as [in, out]), perhaps
as one of several concatenated parts (GPT-2's query, key and value).
"""

from __future__ import annotations

import re
from typing import Final

from shoal.config.families import FAMILIES, Stored

# Computed buffers that some checkpoints contain in addition to the weights: masks and rotary frequencies.
_COMPUTED: Final = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def stored_as(family: str, name: str) -> Stored:
    """Return the location of shoal's parameter `name` in a Hugging Face checkpoint. Raises `KeyError` if the family lacks it."""
    if not FAMILIES[family].native:
        return Stored(name)  # transformers' own names
    found = FAMILIES[family].tensors[re.sub(r"^blocks\.\d+\.", "blocks.N.", name)]
    number = re.match(r"blocks\.(\d+)\.", name)
    return found._replace(name=found.name.replace(".N.", f".{number[1]}.")) if number else found


def spellings(name: str) -> tuple[str, ...]:
    """Return the names that a tensor may have: some checkpoints omit the base model's prefix, `model.` or `transformer.`."""
    return (name, re.sub(r"^(model|transformer)\.", "", name))


def is_computed(name: str) -> bool:
    """Return whether this tensor of a Hugging Face checkpoint is a computed buffer rather than a weight."""
    return _COMPUTED.search(name) is not None
