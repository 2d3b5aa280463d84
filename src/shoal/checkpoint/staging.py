"""Host memory that a save copies tensors to, reused by later saves."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch

from shoal.checkpoint.shard_file import Bytes, pieces_of

_ALIGNED: Final = 64  # bytes, enough for any dtype


class Staging:
    """
    A host buffer for each of the given tensors, all in one block of memory.

    For CUDA tensors the block is page-locked, so that copies are asynchronous. torch's allocator of pinned memory rounds up
    to powers of two, so we lock our own block. Locking gigabytes takes seconds, so a thread does it from the start of the run.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        ends, end = [], 0
        for tensor in tensors:
            end = -(-end // _ALIGNED) * _ALIGNED + tensor.nbytes
            ends.append(end)
        self._block = torch.empty(end, dtype=torch.uint8)
        self._buffers = [
            self._block[stop - t.nbytes : stop].view(t.dtype).view(t.shape)
            for t, stop in zip(tensors, ends, strict=True)
        ]
        self._locking: threading.Thread | None = None
        on_cuda = next((t.device for t in tensors if t.is_cuda), None)
        if on_cuda is not None and end:
            self._locking = threading.Thread(target=self._lock, args=(on_cuda,), name="staging", daemon=True)
            self._locking.start()

    def buffers(self) -> list[torch.Tensor]:
        """Return one buffer per tensor, in their order. Waits until they are page-locked."""
        if self._locking is not None:
            self._locking.join()
            self._locking = None
        return self._buffers

    def _lock(self, device: torch.device) -> None:
        """Page-lock the block. If this fails, copies are synchronous but still correct."""
        torch.cuda.set_device(device)
        address, portable = self._block.data_ptr(), 1  # for all devices of the process
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(cuda.cudaHostRegister(address, self._block.nbytes, portable)) == 0:
            weakref.finalize(self._block, cuda.cudaHostUnregister, address).atexit = False


def copy_all(tensors: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    """
    Copy each tensor to its counterpart.

    CPU tensors are copied with `memcpy`, which bypasses the cache above a few megabytes and is nearly twice as fast as torch's
    copy. The copies use as many threads as torch does, since one thread does not saturate the memory bandwidth.
    """
    pieces: list[tuple[Bytes, Bytes]] = []
    for staged, tensor in zip(to, tensors, strict=True):
        if tensor.is_cuda or not tensor.is_contiguous():
            staged.copy_(tensor, non_blocking=True)
        else:
            pieces += zip(pieces_of(staged), pieces_of(tensor), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads(), "copy") as threads:
        list(threads.map(lambda pair: np.copyto(*pair), pieces))
