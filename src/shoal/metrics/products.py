"""
Measures the rate of matrix products within a deadline.

Sizes increase. A size starts only if it would finish in time even at a tenth of the previous size's rate: products without
hardware instructions are a hundred times slower, and slower still beyond the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

import torch

SIZES: Final = (16, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE_ENOUGH: Final = 256  # from here on arithmetic dominates overhead
_TURNS: Final = 4  # measurements of each size; the best one counts, to exclude brief load of other programs
_MARGIN: Final = 10  # factor by which the next size's rate may be lower


def product_rates(
    dtypes: Sequence[torch.dtype], device: torch.device, seconds: float, *, clear: float = math.inf
) -> list[float]:
    """
    Return FLOP/s of square products in each of `dtypes`: the best over the large sizes that fit in `seconds`.

    Stops early once the first dtype is `clear` times as fast or as slow as the last one; at small sizes, 10 * `clear`
    times. Returns zeros if there was no time.
    """
    end = time.perf_counter() + seconds
    found = [0.0] * len(dtypes)
    for n, larger in zip(SIZES, (*SIZES[1:], math.inf), strict=True):
        best = _best_seconds(n, dtypes, device, end)
        if max(best) == math.inf:
            break
        rates = [2 * n**3 / each for each in best]
        found = rates if n <= LARGE_ENOUGH else [max(pair) for pair in zip(found, rates, strict=True)]
        if abs(math.log(rates[0] / rates[-1])) > math.log(clear * (1 if n >= LARGE_ENOUGH else 10)):
            break
        if time.perf_counter() + _MARGIN * (larger / n) ** 3 * sum(best) > end:
            break
    return found


def _best_seconds(n: int, dtypes: Sequence[torch.dtype], device: torch.device, end: float) -> list[float]:
    """Return the shortest seconds of an n x n product in each dtype, measured alternately; Inf if there was no time."""
    matrices = [torch.ones(n, n, device=device, dtype=dtype) for dtype in dtypes]
    best = [math.inf] * len(dtypes)
    for _ in range(_TURNS):
        for index, matrix in enumerate(matrices):
            begun = time.perf_counter()
            if begun + (best[index] if best[index] < math.inf else 0.0) > end:
                continue
            torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[index] = min(best[index], time.perf_counter() - begun)
    return best
