"""
One process's part of a checkpoint: a safetensors file, hashed while it is written.

A tensor of it is a region of a whole one. Where a region begins is in the header, in the words that
torch.distributed.checkpoint's reader of safetensors knows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from shoal.hub.header import DTYPE_NAMES, header_bytes

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_PIECE_BYTES: Final = 16 * 2**20
_KINDS: Final = {getattr(torch, name): kind for kind, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Item:
    """A region of the tensor `name`, that begins at `offsets`."""

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor  # on the CPU


@dataclass(frozen=True)
class Digest:
    """What a file is known by."""

    bytes: int
    sha256: str


def write_shard(
    path: Path,
    items: Sequence[Item],
    *,
    durable: bool = True,
    read_back: bool = True,
    at: Callable[[str], None] = lambda phase: None,
) -> Digest:
    """
    Write `items` to `path`; its size and SHA-256, of what was meant to be written.

    durable: flushed to the disk; read_back: and read from it: a disk that says "written" is not taken at its word.
    `at("write")` is called in the middle. Raises `OSError`.
    """
    at("write")
    hashed, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as other_thread:
        for piece in _pieces(items):
            hashing = other_thread.submit(hashed.update, piece)
            written = 0
            while written < len(piece):  # a raw write may take less than it is given
                written += file.write(piece[written:])
            hashing.result()
            if durable and hasattr(os, "posix_fadvise"):  # the disk begins now, and not when all is there
                os.posix_fadvise(file.fileno(), size, len(piece), os.POSIX_FADV_DONTNEED)
            size += len(piece)
        if durable:
            os.fsync(file.fileno())
    digest = Digest(size, hashed.hexdigest())
    if read_back and (found := _read_back(path)) != digest:
        raise OSError(f"{path} reads otherwise than it was written: {found.bytes} bytes of {digest.bytes}")
    return digest


def pieces_of(tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a contiguous tensor on the CPU, in its own memory, so many at a time that another thread has its turn."""
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES]


def _pieces(items: Sequence[Item]) -> Iterator[memoryview]:
    yield memoryview(_header(items))
    for item in items:
        for piece in pieces_of(item.tensor.contiguous()):
            yield piece.data


def _header(items: Sequence[Item]) -> bytes:
    begins = {item.name: {"saved_offsets": list(item.offsets)} for item in items}
    described = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(begins)}
    return header_bytes({item.name: (_KINDS[item.tensor.dtype], tuple(item.tensor.shape)) for item in items}, described)


def places(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Where each tensor of a shard begins in the whole one, from what the shard says of itself."""
    begins = json.loads(metadata["DCP_SHARDING_INFO"])
    return {name: tuple(begin["saved_offsets"]) for name, begin in begins.items()}


def _read_back(path: Path) -> Digest:
    """From the disk, as far as the system can be told to forget what it remembers of the file."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        piece = bytearray(_PIECE_BYTES)
        while count := file.readinto(piece):
            hashed.update(memoryview(piece)[:count])
            size += count
    return Digest(size, hashed.hexdigest())
