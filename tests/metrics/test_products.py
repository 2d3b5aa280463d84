"""Rates of matrix products within a deadline, on a clock that only products advance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from shoal.metrics import products
from shoal.metrics.products import SIZES, product_rates

CPU = torch.device("cpu")
PAIR = (torch.bfloat16, torch.float32)


class Machine:
    """A fake machine. `rate`: its FLOP/s by dtype and size of a product; `taken`: the products requested so far."""

    def __init__(self, rate: Callable[[torch.dtype, int], float]) -> None:
        self.now, self.rate = 0.0, rate
        self.taken: list[tuple[torch.dtype, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def mm(self, a: torch.Tensor, b: torch.Tensor) -> None:
        n = a.shape[0]
        self.taken.append((a.dtype, n))
        self.now += 2 * n**3 / self.rate(a.dtype, n)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.dtype, int], float]], Machine]:
    def make(rate: Callable[[torch.dtype, int], float]) -> Machine:
        made = Machine(rate)
        monkeypatch.setattr("shoal.metrics.products.time.perf_counter", made.perf_counter)
        monkeypatch.setattr("shoal.metrics.products.torch.mm", made.mm)
        return made

    return make


@pytest.mark.parametrize("float32", [1e9, 6e10, 2e11, 1e13])
@pytest.mark.parametrize("slower", [0.5, 1, 20, 100, 1000])
@pytest.mark.parametrize("beyond_the_cache", [1, 10])
@pytest.mark.parametrize("clear", [1.25, math.inf])
def test_no_product_outlasts_the_deadline(
    float32: float, slower: float, beyond_the_cache: float, clear: float, machine: Callable[..., Machine]
) -> None:
    def rate(dtype: torch.dtype, n: int) -> float:
        if dtype == torch.float32:
            return float32
        return float32 / slower / (beyond_the_cache if n >= 256 else 1)

    made = machine(rate)
    bfloat16, single = product_rates(PAIR, CPU, 0.4, clear=clear)
    assert made.now <= 0.4
    if bfloat16:
        assert single == pytest.approx(float32)
        assert bfloat16 in (pytest.approx(rate(torch.bfloat16, 64)), pytest.approx(rate(torch.bfloat16, 256)))


def test_it_stops_when_the_answer_is_clear(machine: Callable[..., Machine]) -> None:
    slow = machine(lambda dtype, n: 1e9 if dtype == torch.bfloat16 else 1e11)
    product_rates(PAIR, CPU, 0.4, clear=1.25)
    assert {n for _, n in slow.taken} == {SIZES[0]}  # at a hundredth of the rate, the smallest size decides
    # a ratio of two decides only at sizes where arithmetic dominates overhead
    half = machine(lambda dtype, n: 1e11 if dtype == torch.bfloat16 else 2e11)
    product_rates(PAIR, CPU, 0.4, clear=1.25)
    assert max(n for _, n in half.taken) == products.LARGE_ENOUGH
    near = machine(lambda dtype, n: 1e11 if dtype == torch.bfloat16 else 1.1e11)
    product_rates(PAIR, CPU, 0.4, clear=1.25)
    assert max(n for _, n in near.taken) > products.LARGE_ENOUGH


def test_without_time_nothing_is_known(machine: Callable[..., Machine]) -> None:
    machine(lambda dtype, n: 1e3)
    assert product_rates(PAIR, CPU, 0.4) == [0.0, 0.0]
