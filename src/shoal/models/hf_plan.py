"""
Translate the tensor-parallel plan of a transformers config into the table that `parallel/tensor.py` reads.

A plan gives some layers a style. All others are replicated: embeddings, norms, the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from shoal.models.family import TensorParallelStyle

STYLES: Final[Mapping[str, TensorParallelStyle]] = {
    "colwise": "colwise_grad_allreduce",
    "rowwise": "rowwise_allreduce",
    "colwise_gather_output": "colwise_gather_output",
    "rowwise_split_input": "rowwise_split_input",
    "replicated_with_grad_allreduce": "replicated_with_grad_allreduce",
    "embedding_rowwise": "replicated",  # an unsharded lookup gives the same numbers
    "replicate": "replicated",
}


def read_plan(causal_lm: Any) -> tuple[dict[str, TensorParallelStyle], str | None]:
    """Return the style of each module that has parameters, by name; and why the plan cannot be used, or None."""
    config = causal_lm.config
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    owners = {n: m for n, m in causal_lm.named_modules() if any(True for _ in m.parameters(recurse=False))}
    table: dict[str, TensorParallelStyle] = dict.fromkeys(owners, "replicated")
    if not plan:
        return table, f"the config of a {config.model_type} has no tensor-parallel plan"
    if strange := sorted({style for style in plan.values() if style not in STYLES}):
        return table, f"the plan of a {config.model_type} has {', '.join(strange)}, which shoal does not support"
    for pattern, theirs in plan.items():
        style = STYLES[theirs]
        for name in _matches(pattern, causal_lm.base_model_prefix, owners):
            if not style.startswith("replicated") and not isinstance(owners[name], nn.Linear):
                kind = type(owners[name]).__name__
                return (
                    table,
                    f"the plan of a {config.model_type} shards {name}, a {kind}; shoal shards Linear layers only",
                )
            table[name] = style
    return table, None


def _matches(pattern: str, prefix: str, names: Mapping[str, object]) -> list[str]:
    """Return the names in the whole model that match a pattern for the base model; a star is a block's index."""
    wanted = re.compile(rf"({re.escape(prefix)}\.)?" + re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if wanted.fullmatch(name)]
