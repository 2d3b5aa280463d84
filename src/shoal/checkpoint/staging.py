"""Memory on the host that a save is copied to, kept from one save to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch

from shoal.checkpoint.shard_file import Bytes, pieces_of

_ALIGNED: Final = 64  # bytes: any dtype may begin there


class Staging:
    """
    A place on the host for each of some tensors, in one block of just their size.

    For CUDA tensors it is page-locked, so that a copy need not be waited for. torch's own allocator of such memory rounds up
    to powers of two, and locking takes seconds for many gigabytes: so a thread locks the block, begun when the run starts.
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
        """One for each tensor, in their order. Waits until they can be used."""
        if self._locking is not None:
            self._locking.join()
            self._locking = None
        return self._buffers

    def _lock(self, device: torch.device) -> None:
        """Where it cannot be had, copies wait for the device, and are right all the same."""
        torch.cuda.set_device(device)
        address, portable = self._block.data_ptr(), 1  # for all devices of the process
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(cuda.cudaHostRegister(address, self._block.nbytes, portable)) == 0:
            weakref.finalize(self._block, cuda.cudaHostUnregister, address).atexit = False


def copy_all(tensors: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    """
    Each tensor into the one beside it.

    On a CPU by `memcpy`, which past some megabytes leaves the cache alone and is nearly twice as fast as torch's copy, and
    by as many threads as compute: one alone does not fill the memory's bandwidth.
    """
    pieces: list[tuple[Bytes, Bytes]] = []
    for staged, tensor in zip(to, tensors, strict=True):
        if tensor.is_cuda or not tensor.is_contiguous():
            staged.copy_(tensor, non_blocking=True)
        else:
            pieces += zip(pieces_of(staged), pieces_of(tensor), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads(), "copy") as threads:
        list(threads.map(lambda pair: np.copyto(*pair), pieces))
