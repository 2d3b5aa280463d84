"""What `train.dtype: auto` comes to on a CPU, and what is said of a dtype that is slow there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from shoal.launch.place import Place
from shoal.parallel.mesh import Mesh
from shoal.train import settle
from shoal.train.settle import describe_slow_bfloat16, settle_dtype
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("wanted", "rates", "settled"),
    [
        ("auto", None, "float32"),  # no instructions: nothing is measured
        ("auto", [2.0, 1.0], "bfloat16"),
        ("auto", [1.0, 2.0], "float32"),
        ("auto", [0.0, 0.0], "float32"),  # there was no time
        ("bfloat16", None, "bfloat16"),
        ("float32", None, "float32"),
    ],
)
def test_auto_is_float32_unless_bfloat16_was_seen_to_be_faster(
    wanted: str, rates: list[float] | None, settled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object, **options: object) -> list[float]:
        assert rates is not None, "measured where nothing was to be"
        return rates

    monkeypatch.setattr(settle, "product_rates", measured)
    monkeypatch.setattr(settle, "multiplies_bfloat16", lambda: rates is not None)
    assert settle_dtype(wanted, ALONE) == settled


def settle_with(mesh: Mesh, ratios: list[float]) -> str:
    """On a rank that sees bfloat16 so many times as fast as float32; 0: one without the instructions."""
    ratio = ratios[mesh.place.rank]
    before = settle.multiplies_bfloat16, settle.product_rates
    settle.multiplies_bfloat16, settle.product_rates = lambda: ratio > 0, lambda *a, **o: [ratio, 1.0]  # type: ignore[assignment]
    try:
        return settle_dtype("auto", mesh)
    finally:
        settle.multiplies_bfloat16, settle.product_rates = before


@pytest.mark.parametrize(
    ("ratios", "settled"), [([3.0, 0.5], "bfloat16"), ([1.5, 0.5], "float32"), ([9.0, 0.0], "float32")]
)
def test_all_ranks_settle_on_the_same(ratios: list[float], settled: str, world: Callable[[int], World]) -> None:
    assert world(2).run(settle_with, ratios) == [settled, settled]


def test_slow_bfloat16_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "product_rates", lambda *args, **options: [1.0, 97.0])
    assert re.search(r"\b97 times", describe_slow_bfloat16(ALONE.device))
    monkeypatch.setattr(settle, "product_rates", lambda *args, **options: [0.0, 0.0])
    assert math.isfinite(len(describe_slow_bfloat16(ALONE.device)))
