"""Shapes: what follows from them, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from shoal.config import Model
from shoal.presets import PRESETS, resolve_shape, shape_problems


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name: str) -> None:
    assert set(PRESETS[name]) <= {field.name for field in dataclasses.fields(Model)}
    model = Model(**PRESETS[name])
    assert shape_problems(model) == []
    resolved = resolve_shape(model)
    assert None not in (resolved.num_kv_heads, resolved.head_dim, resolved.ffn_dim)
    assert resolve_shape(resolved) == resolved
    assert shape_problems(resolved) == []


def test_derived() -> None:
    llama = resolve_shape(Model(dim=256, num_heads=4))
    assert (llama.num_kv_heads, llama.head_dim, llama.ffn_dim) == (4, 64, 704)
    assert resolve_shape(Model(family="gpt2", dim=256)).ffn_dim == 1024
    assert resolve_shape(Model(dim=384)).ffn_dim == 1024  # exactly 8/3 dim is not rounded up


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"dim": 256, "num_heads": 3}, "num_heads", r"divisor \(1, 2, 4, 8\)"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads", r"\(1, 2, 4, 8\)"),
        ({"head_dim": 33}, "head_dim", "even"),
        ({"dim": 60, "num_heads": 4}, "num_heads", "even"),
        ({"dropout": 0.1}, "dropout", "gpt2"),
        ({"rope_original_seq_len": 4096}, "rope_original_seq_len", "rope_factor"),
        ({"rope_factor": 8, "rope_low_freq_factor": 4}, "rope_low_freq_factor", "not below"),
        ({"family": "gpt2", "qk_norm": True}, "qk_norm", "leave it at false"),
        ({"family": "gpt2", "rope_theta": 5e5}, "rope_theta", "leave it at 10000"),
        ({"family": "gpt2", "rope_factor": 8}, "rope_factor", "leave it at null"),
        ({"family": "gpt2", "num_kv_heads": 2}, "num_kv_heads", "null"),
        ({"family": "gpt2", "head_dim": 32}, "head_dim", "null"),
    ],
)
def test_problems(values: dict[str, Any], key: str, says: str) -> None:
    [(found, message)] = shape_problems(Model(**values))
    assert found == key
    assert re.search(says, message), message


def test_wide_heads_need_not_divide_dim() -> None:
    assert shape_problems(Model(dim=100, num_heads=3, head_dim=32)) == []
