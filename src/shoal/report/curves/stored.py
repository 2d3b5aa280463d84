"""
A file of arrays that is mapped into memory, written atomically, whose damage is found. No torch.

    shoal arrays 1 CHECKSUM\\n
    {"notes": ..., "arrays": {name: [dtype, shape, offset, checksum]}}\\n
    the arrays, each at a multiple of 64 bytes

An array is checked when it is first read, so a reader of one curve does not read the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAGIC: Final = b"shoal arrays 1 "
ALIGNED: Final = 64
LEFT_OVER_SECONDS: Final = 3600


class DamagedError(Exception):
    """A file of arrays that was cut, altered, or is of another version: it must be built again."""


class StoredArrays:
    """The arrays of a file, by name, mapped from it. Raises `DamagedError`, also when an array is first read."""

    def __init__(self, path: Path) -> None:
        try:
            self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
            self._read_header()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"{path}: {error}") from error

    def _read_header(self) -> None:
        first = bytes(self._bytes[:64]).partition(b"\n")[0]
        magic, checksum, length = first[: len(MAGIC)], *first[len(MAGIC) :].split()
        header = bytes(self._bytes[len(first) + 1 :][: int(length)])
        if magic != MAGIC or zlib.crc32(header) != int(checksum):
            raise ValueError("another header")
        found = json.loads(header)
        self.notes: dict[str, Any] = found["notes"]
        self._arrays: dict[str, list[Any]] = found["arrays"]
        self._start = _aligned(len(first) + 1 + len(header))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def array(self, name: str) -> NDArray[Any]:
        """Return an array, which must not be written to. Raises `DamagedError`."""
        dtype, shape, offset, checksum = self._arrays[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        part = self._bytes[self._start + offset :][:size]
        if len(part) != size or zlib.crc32(part.data) != checksum:
            raise DamagedError(f"the array {name} was altered")
        found: NDArray[Any] = np.asarray(part).view(dtype).reshape(shape)
        return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def write_arrays(path: Path, notes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """
    Write arrays to `path`, whole or not at all; of two writers, the last one wins. Raises `OSError`.

    The file is not flushed to disk: what a power cut leaves of it is recognized as damaged.
    """
    table, offset = {}, 0
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in flat.items():
        table[name] = [array.dtype.str, array.shape, offset, zlib.crc32(array.reshape(-1).view(np.uint8).data)]
        offset = _aligned(offset + array.nbytes)
    header = json.dumps({"notes": notes, "arrays": table}).encode()
    first = MAGIC + f"{zlib.crc32(header)} {len(header)}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_padded(first + header))
            for array in flat.values():
                file.write(array.data)
                file.write(b"\0" * (_aligned(array.nbytes) - array.nbytes))
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (_aligned(len(data)) - len(data))


def _remove_left_over(path: Path) -> None:
    """Remove temporary files of writers that were killed."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_OVER_SECONDS:
                left.unlink()
