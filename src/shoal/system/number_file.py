"""
An array of integers in a file, read with pread(2). No torch.

A file that becomes shorter, or a disk that fails, raises an error; through a memory map it would end the process by SIGBUS.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.system.byte_file import ByteFile

Numbers = npt.NDArray[np.int64]

BLOCK_ITEMS: Final = 512
MOST_BLOCKS: Final = 512  # kept in memory: 2 MiB of int64. Searches come back to the same ones
MOST_APART: Final = 16  # numbers this far apart, on average, are cheaper to read with all between them


class NumberFile(Sequence[int]):
    """
    Integers of one type, from a byte of a file on. May be read by several threads.

    Every method raises UnreadableError if the file is now shorter or the disk fails, and DataError if it cannot be opened.
    """

    def __init__(self, file: ByteFile, dtype: str, offset: int, count: int) -> None:
        """Hold `count` numbers of `dtype` from byte `offset` on. Reads nothing."""
        self._file, self._dtype, self._offset, self._count = file, np.dtype(dtype), offset, count
        self._block = lru_cache(MOST_BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """Return one number, through the blocks in memory."""
        at = index + self._count if index < 0 else index
        if not 0 <= at < self._count:
            raise IndexError(f"number {index} of {self._count}")
        return self._block(at // BLOCK_ITEMS).item(at % BLOCK_ITEMS)

    def read(self, start: int, stop: int) -> Numbers:
        """Return the numbers [start, stop), cut to the array. Keeps nothing in memory."""
        stop = min(stop, self._count)
        if start >= stop:
            return np.zeros(0, np.int64)
        width = self._dtype.itemsize
        found = self._file.read(self._offset + start * width, self._offset + stop * width)
        return np.frombuffer(found, self._dtype).astype(np.int64, copy=False)

    def take(self, indices: Numbers) -> Numbers:
        """Return the numbers at `indices`, which ascend."""
        if not len(indices):
            return np.zeros(0, np.int64)
        first, stop = int(indices[0]), int(indices[-1]) + 1
        if stop - first <= MOST_APART * len(indices):
            return self.read(first, stop)[indices - first]
        return np.array([self[index] for index in indices.tolist()], np.int64)

    def _read_block(self, number: int) -> Numbers:
        return self.read(number * BLOCK_ITEMS, (number + 1) * BLOCK_ITEMS)


def search_near(key: Callable[[int], int], value: int, low: int, count: int) -> int:
    """Return the first index in [low, count) whose ascending key is at least `value`, else `count`. Quick if it is near `low`."""
    high, step = low, 1
    while high < count and key(high) < value:
        low, high, step = high + 1, high + step, 2 * step
    return bisect.bisect_left(range(count), value, low, min(high, count), key=key)
