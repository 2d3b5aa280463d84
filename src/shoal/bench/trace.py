"""
A step's memory, counted a second way: the real code of one rank runs on fake tensors, without memory and without other ranks.

`plan/rehearse` repeats what that code does, in Python without torch; this runs the code itself, on a CPU's kernels. They share
nothing, so where they agree, both are probably right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from shoal.config.layout import Layout
from shoal.config.options import Config
from shoal.data.loader import Batch
from shoal.errors import ShoalError
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.models import loss
from shoal.parallel import fsdp
from shoal.run.phases import NO_PHASES
from shoal.training.assemble import assemble
from shoal.training.clip import clip, gradient_norm

MICRO_BATCHES = 2  # of a rank; more need as much memory


def traced_bytes(config: Config, layout: Layout) -> int:
    """
    Return the peak memory of a step of the first rank, in bytes.

    config: one whose memory `plan/fits.py` knows, with a vocabulary size and a dtype. Must be called in a process without process
    groups. Raises `ShoalError` for a pipeline, and for Muon on several ranks: they wait for answers that no rank gives.
    """
    if layout.world_size > 1 and config.optim.name == "muon":
        raise ShoalError("a step of Muon on several ranks cannot be traced: they ask each other which parts they hold")
    if layout.pp > 1:
        raise ShoalError(
            "a step of a pipeline cannot be traced: its stages exchange their shapes before the first step"
        )
    train = dataclasses.replace(
        config.train, device="cpu",
        global_batch=min(config.train.global_batch, MICRO_BATCHES * config.train.micro_batch * layout.dp),
    )  # fmt: skip
    config = dataclasses.replace(config, train=train)
    live = LiveBytes()
    with _alone(layout), _known_numbers(), _resized(live), FakeTensorMode(allow_non_fake_inputs=True), live:
        mesh = Mesh(Place(0, layout.world_size), torch.device("cpu"), layout)
        with mock.patch.object(nn.Module, "to_empty", _to_empty):
            runnable, state = assemble(config, mesh, lambda text: None, fresh=False)
        batches = [_batch(config) for _ in runnable.slots[mesh.dp_rank]]
        runnable.forward_backward(batches, 1, NO_PHASES)
        norm = gradient_norm(runnable.shards, runnable.shapes, mesh, bitwise=False)
        clip(runnable.shards, norm, config.optim.clip_norm)
        state.optimizer.step()  # whatever the norm, which a fake tensor does not know
    return live.most


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operators create, from their creation until they are freed; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self.now = 0
        self._bytes: dict[int, int] = {}  # by the storage's address
        self._ignored: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # whose local tensor is counted
                self._add(tensor)
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this tensor, now or later: the caller counts it elsewhere. It must outlive the measurement."""
        address = tensor.untyped_storage()._cdata
        self._ignored.add(address)
        self._remove(address)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage, whose memory FSDP2 takes and frees, with its new size."""
        if storage._cdata in self._bytes:
            self._count(storage._cdata, size)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._bytes and storage._cdata not in self._ignored:
            self._count(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._remove, storage._cdata)

    def _count(self, address: int, size: int) -> None:
        self.now += size - self._bytes.get(address, 0)
        self._bytes[address] = size
        self.most = max(self.most, self.now)

    def _remove(self, address: int) -> None:
        self.now -= self._bytes.pop(address, 0)


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Pretend to be rank 0 of a world: collectives return at once, and do nothing."""
    if layout.world_size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _known_numbers() -> Iterator[None]:
    """Give the code the numbers that it reads: FSDP2's mesh of ranks as a real tensor, and that the loss is not scaled."""
    make = fsdp._device_mesh

    def really(mesh: Mesh, *, replicas: bool) -> Any:
        with _disable_current_modes():
            return make(mesh, replicas=replicas)

    with mock.patch.object(fsdp, "_device_mesh", really), mock.patch.object(loss, "_is_one", return_value=True):
        yield


@contextlib.contextmanager
def _resized(live: LiveBytes) -> Iterator[None]:
    """Tell `live` when FSDP2 takes and frees the memory of a storage, which no operator does."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> Any:
        live.resize(storage, size)
        return resize(storage, size)

    with mock.patch.object(torch.UntypedStorage, "resize_", told):
        yield


_ON_DEVICE = nn.Module.to_empty


def _to_empty(module: nn.Module, *, device: torch.device, recurse: bool = True) -> nn.Module:
    """Allocate as `Module.to_empty` does, which cannot replace a parameter on meta by a fake one unless it is sharded."""
    if any(isinstance(p, DTensor) for p in module.parameters()):
        return _ON_DEVICE(module, device=device, recurse=recurse)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = made.setdefault(id(old), nn.Parameter(torch.empty_like(old, device=device)))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


def _batch(config: Config) -> Batch:
    """Return a micro-batch of zeros, whose memory is not counted: a loader's is the data's."""
    size = config.train.micro_batch, config.data.seq_len
    with _disable_current_modes():
        places = [torch.zeros(size, dtype=torch.int64) for _ in range(4)]
    ids = places[3] if config.data.document_mask else None
    return Batch(places[0], places[1], places[2], ids, (), size[0] * size[1])
