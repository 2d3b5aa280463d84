"""
How fast matrix products are here, measured within a deadline.

Sizes go up, and a size is begun only if there would be time for it were it ten times slower than the last one: products
without instructions of their own take a hundred times as long, and longer where they leave the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

import torch

SIZES: Final = (16, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE_ENOUGH: Final = 256  # from here on a product's own arithmetic decides, and not what surrounds it
_TURNS: Final = 4  # of each size: the best counts, so that a neighbour who is busy for a moment does not
_MARGIN: Final = 10  # how many times slower the next size may be than this one


def product_rates(
    dtypes: Sequence[torch.dtype], device: torch.device, seconds: float, *, clear: float = math.inf
) -> list[float]:
    """
    Return FLOP/s of square products in each of `dtypes`: the best of several, at the largest sizes there was time for.

    It ends earlier where the first dtype is `clear` times as fast or as slow as the last one: ten times that while
    products are small. All zeros where there was no time.
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
    """Return the best time of each, in turn; infinite for one that had no turn before the end."""
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
