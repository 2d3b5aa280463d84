"""
One rank's shard of a checkpoint: a safetensors file, hashed while it is written.

Each of its tensors is a region of a whole tensor. The header holds the regions' offsets in the format that
torch.distributed.checkpoint's safetensors reader expects.
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
class ShardItem:
    """A region of the tensor `name` at `offsets`."""

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor  # on the CPU


@dataclass(frozen=True)
class Digest:
    """The size and SHA-256 of a file."""

    bytes: int
    sha256: str


def write_shard(
    path: Path,
    items: Sequence[ShardItem],
    *,
    durable: bool = True,
    read_back: bool = True,
    at: Callable[[str], None] = lambda phase: None,
) -> Digest:
    """
    Write `items` to `path`; return the size and SHA-256 of the bytes given to the disk.

    durable: whether to flush to the disk. read_back: whether to read the file again and compare hashes, in case the disk lost
    data. at: a function called with "write" before writing. Raises `OSError` if writing fails or the hashes differ.
    """
    at("write")
    hashed, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as other_thread:
        for piece in _pieces(items):
            hashing = other_thread.submit(hashed.update, piece)
            written = 0
            while written < len(piece):  # a raw write may be partial
                written += file.write(piece[written:])
            hashing.result()
            if durable and hasattr(os, "posix_fadvise"):  # start writing to the disk now, not at the end
                os.posix_fadvise(file.fileno(), size, len(piece), os.POSIX_FADV_DONTNEED)
            size += len(piece)
        if durable:
            os.fsync(file.fileno())
    digest = Digest(size, hashed.hexdigest())
    if read_back and (found := _read_back(path)) != digest:
        raise OSError(f"{path} differs from what was written: read {found.bytes} bytes, wrote {digest.bytes}")
    return digest


def pieces_of(tensor: Tensor) -> Iterator[Bytes]:
    """Yield views of a contiguous CPU tensor's bytes, in pieces small enough to overlap writing and hashing."""
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES]


def _pieces(items: Sequence[ShardItem]) -> Iterator[memoryview]:
    yield memoryview(_header(items))
    for item in items:
        for piece in pieces_of(item.tensor.contiguous()):
            yield piece.data


def _header(items: Sequence[ShardItem]) -> bytes:
    """Return the safetensors header with its length prefix, padded so that tensors begin at a multiple of 8 bytes."""
    begins = {item.name: {"saved_offsets": list(item.offsets)} for item in items}
    described = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(begins)}
    return header_bytes({item.name: (_KINDS[item.tensor.dtype], tuple(item.tensor.shape)) for item in items}, described)


def read_offsets(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Read the offsets of each tensor's region from a shard's metadata."""
    begins = json.loads(metadata["DCP_SHARDING_INFO"])
    return {name: tuple(begin["saved_offsets"]) for name, begin in begins.items()}


def _read_back(path: Path) -> Digest:
    """Hash the file as read from the disk: the page cache is dropped first if the system allows it."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        piece = bytearray(_PIECE_BYTES)
        while count := file.readinto(piece):
            hashed.update(memoryview(piece)[:count])
            size += count
    return Digest(size, hashed.hexdigest())
