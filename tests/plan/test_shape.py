"""Derived widths of a shape, and its problems."""

from __future__ import annotations

import pytest

from shoal.config.options import Model
from shoal.config.presets import PRESETS, resolve_shape, shape_problems

from ..models.shapes import SHAPES


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        (Model(dim=256, num_heads=4), {"num_kv_heads": 4, "head_dim": 64, "ffn_dim": 704}),
        (Model(dim=768, num_heads=12, family="gpt2"), {"num_kv_heads": 12, "head_dim": 64, "ffn_dim": 3072}),
        (Model(dim=4096, num_heads=32), {"ffn_dim": 10_944}),  # 8/3 dim, up to a multiple of 64
        (Model(dim=384, num_heads=6), {"ffn_dim": 1024}),  # 8/3 dim is already a multiple of 64
        (Model(num_kv_heads=2, head_dim=48, ffn_dim=100), {"num_kv_heads": 2, "head_dim": 48, "ffn_dim": 100}),
    ],
)
def test_resolve_shape(given: Model, derived: dict[str, int]) -> None:
    resolved = resolve_shape(given)
    assert {key: getattr(resolved, key) for key in derived} == derived
    assert resolve_shape(resolved) == resolved


@pytest.mark.parametrize("name", [*PRESETS, *SHAPES])
def test_good_shapes_have_no_problems(name: str) -> None:
    model = Model(**PRESETS[name]) if name in PRESETS else SHAPES[name]
    assert shape_problems(model) == []
    assert shape_problems(resolve_shape(model)) == []


@pytest.mark.parametrize(
    ("model", "key", "says"),
    [
        (Model(dim=100, num_heads=3), "num_heads", "1, 2, 4, 5"),
        (Model(num_heads=6, num_kv_heads=4, dim=384), "num_kv_heads", "1, 2, 3, 6"),
        (Model(num_heads=4, num_kv_heads=8), "num_kv_heads", "4"),
        (Model(head_dim=33), "head_dim", "even"),
        (Model(dim=60, num_heads=4), "num_heads", "15 wide"),
        (Model(dropout=0.1), "dropout", "gpt2"),
        (Model(rope_original_seq_len=4096), "rope_original_seq_len", "model.rope_factor"),
        (Model(rope_factor=8.0, rope_low_freq_factor=4.0), "rope_low_freq_factor", "1 and 4"),
        (Model(family="gpt2", qk_norm=True), "qk_norm", "set model.qk_norm to false"),
        (Model(family="gpt2", rope_theta=5e5), "rope_theta", "model.family"),
        (Model(family="gpt2", rope_factor=8.0), "rope_factor", "null"),
        (Model(family="gpt2", num_kv_heads=2), "num_kv_heads", "null"),
        (Model(family="gpt2", head_dim=32), "head_dim", "null"),
    ],
)
def test_problems_name_the_option_and_what_would_do(model: Model, key: str, says: str) -> None:
    ((found, message),) = shape_problems(model)
    assert found == key
    assert says in message


def test_all_problems_are_found_at_once() -> None:
    model = Model(family="gpt2", dim=100, num_heads=3, num_kv_heads=2, qk_norm=True)
    assert [key for key, _ in shape_problems(model)] == ["num_heads", "num_kv_heads", "qk_norm", "num_kv_heads"]
