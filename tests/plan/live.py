"""The memory of tensors that are alive at the same time, in code that runs on fake tensors: no memory is used, and no time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators create, from their creation until they are freed; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._bytes: dict[int, int] = {}  # by the storage's address
        self._ignored: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this tensor, now or later: the caller counts it elsewhere. It must outlive the measurement."""
        address = tensor.untyped_storage()._cdata
        self._ignored.add(address)
        self._remove(address)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._bytes and storage._cdata not in self._ignored:
            self._bytes[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, address: int) -> None:
        self._now -= self._bytes.pop(address, 0)
