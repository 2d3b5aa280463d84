"""
Sums over processes of one machine through memory that they share.

gloo sends through sockets even between processes of one machine, which for GPT-2's 0.5 GB of gradients took a quarter of a step of
1,024 tokens. Here each rank adds all ranks' values of its share of the elements, and writes the sums into all buffers. A memory file
has no name, so that none is left when a process is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh.mesh import Axis

SLICE: Final = 2**18  # elements that are added and written at a time, while they are in the cache
_MARK: Final = 16  # bytes at the end of a memory file, by which other ranks recognize it
_own = weakref.WeakSet[mmap.mmap]()


def shared_buffers(count: int, axis: Axis) -> list[Tensor] | None:
    """
    Return a buffer of `count` float32 zeros for each rank of the axis, the same memory on all of them, in rank order.

    None on all ranks if some cannot share memory, as on several machines or outside Linux. Collectives over `axis`.
    """
    mark = secrets.token_bytes(_MARK)
    own = _create(4 * count, mark)
    said: list[tuple[str, int, int, bytes]] = [("", 0, 0, b"")] * axis.size
    dist.all_gather_object(said, (_machine() if own else "", os.getpid(), own or 0, mark), group=axis.group)
    buffers = [_buffer(count, *each, is_own=rank == axis.rank) for rank, each in enumerate(said)]
    found = [each for each in buffers if each is not None]
    complete = [False] * axis.size
    dist.all_gather_object(complete, len(found) == axis.size, group=axis.group)
    if own:
        os.close(own)
    return found if all(complete) else None


def sum_shared(buffers: Sequence[Tensor], axis: Axis) -> None:
    """
    Add the ranks' buffers, whose size the axis's divides; each then holds the sum. Two barriers over `axis`.

    One rank adds an element for all, so that all have the same bits.
    """
    dist.barrier(axis.group)
    parts = [buffer.chunk(axis.size)[axis.rank] for buffer in buffers]
    mine, others = parts[axis.rank], [part for rank, part in enumerate(parts) if rank != axis.rank]
    for start in range(0, len(mine), SLICE):
        here = slice(start, start + SLICE)
        for other in others:
            mine[here] += other[here]
        for other in others:
            other[here] = mine[here]
    dist.barrier(axis.group)


def shared_bytes() -> int:
    """Return the bytes of this process's own buffers, of which torch's allocator knows nothing."""
    return sum(len(each) - _MARK for each in _own)


def _machine() -> str:
    """Return what tells this machine's kernel from others since it started; empty outside Linux."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii") if file.is_file() else ""


def _create(size: int, mark: bytes) -> int | None:
    """Return the descriptor of a new memory file that ends with `mark`; None outside Linux, or if the kernel gives none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.memfd_create("shoal gradients")
    except OSError:
        return None
    try:
        os.pwrite(file, mark, size)
    except OSError:
        os.close(file)
        return None
    return file


def _buffer(count: int, machine: str, process: int, file: int, mark: bytes, *, is_own: bool) -> Tensor | None:
    """Map a rank's memory file; None if it is not to be found, as in a container that does not see the other's processes."""
    if not machine or machine != _machine():
        return None
    try:
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if os.fstat(opened).st_size != 4 * count + _MARK or os.pread(opened, _MARK, 4 * count) != mark:
            return None
        memory = mmap.mmap(opened, 4 * count + _MARK)
    except OSError:
        return None
    finally:
        os.close(opened)
    with contextlib.suppress(OSError):  # fewer page walks, where the kernel allows it for shared memory
        memory.madvise(mmap.MADV_HUGEPAGE)
    if is_own:
        _own.add(memory)
    return torch.frombuffer(memory, dtype=torch.float32, count=count)
