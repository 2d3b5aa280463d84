"""What a recipe may leave to shoal with the word `auto`: the section `parallel` as a whole, and `train.micro_batch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shoal.config.options import Train

AUTO: Final = "auto"
LAYOUT: Final = "parallel"
MICRO_BATCH: Final = "train.micro_batch"
ABOUT_LAYOUT: Final = (
    "auto, in place of the section: shoal train plans the layouts of this machine, tries the best few and keeps the fastest "
    "that fits; a run chooses once"
)
LARGEST_MICRO_BATCH: Final = 1024


def usual_micro_batch(global_batch: int) -> int:
    """Return the largest divisor of the global batch up to the default of `train.micro_batch`."""
    return max(size for size in range(1, Train().micro_batch + 1) if global_batch % size == 0)


def micro_batches(global_batch: int) -> list[int]:
    """Return the sizes to choose from, the smallest first: divisors, by doubling from one and from the usual size, and its halves."""
    usual = usual_micro_batch(global_batch)
    while usual % 2 == 0:
        usual //= 2
    return sorted({*_doubles(1, global_batch), *_doubles(usual, global_batch)})


def _doubles(size: int, global_batch: int) -> Iterator[int]:
    while global_batch % size == 0 and size <= LARGEST_MICRO_BATCH:
        yield size
        size *= 2
