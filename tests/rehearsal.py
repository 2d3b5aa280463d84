"""
A simulated CUDA device, to find on a CPU where the host would wait for a GPU.

    with Rehearsal() as waits:
        ...             # shoal's code sees tensors on `DEVICE`, and takes the same branches as on a GPU
    waits               # each wait of the host for the device: its kind, and the function that waited

All tensors are in the CPU's memory, and operations on `DEVICE` run on the CPU. A tensor counts as the device's, unless it was
created without a device or computed only from such tensors; `mark_host` marks host tensors that existed before. A dispatch
mode records reads in C++. It does not see `tolist`, `cpu` and `numpy` of CPU tensors, which a function mode records.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

import shoal

DEVICE = torch.device("cuda", 0)
SHOAL = str(Path(shoal.__file__).parent)
# Code in these files sees the real device, the CPU: recomputation compares devices seen inside and outside of a rehearsal.
REAL = (str(Path(torch.distributed.__file__).parent), torch.utils.checkpoint.__file__)
READS = {
    "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__",
    "__repr__", "__contains__", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "unique", "argwhere",
}  # fmt: skip
DISPATCHED = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
FROM_DATA = {"tensor", "as_tensor", "from_numpy"}


@dataclass(frozen=True)
class Wait:
    """A kind of wait, and the innermost function of shoal that waited; the direct caller, if none of shoal is on the stack."""

    kind: str
    where: str


class Rehearsal:
    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.host: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._seen = False  # whether the function mode has recorded the current read, which it names better than the dispatch mode
        self._open = ExitStack()

    def mark_host(self, tensors: Iterable[Tensor | None]) -> None:
        """Mark tensors that were created in the host's memory before the rehearsal."""
        for tensor in tensors:
            if tensor is not None:
                self.host[tensor] = True

    def __enter__(self) -> list[Wait]:
        self._open.enter_context(mock.patch.object(torch.cuda, "Event", self._event))
        self._open.enter_context(mock.patch.object(torch.cuda, "synchronize", self._synchronize))
        self._open.enter_context(_Functions(self))
        self._open.enter_context(_Dispatched(self))
        return self.waits

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def record(self, kind: str) -> None:
        frame = first = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(SHOAL):
            frame = frame.f_back
            if first.f_code.co_filename == __file__:
                first = frame
        found = frame if frame.f_code.co_filename.startswith(SHOAL) else first
        self.waits.append(Wait(kind, f"{Path(found.f_code.co_filename).stem}.{found.f_code.co_name}"))

    @contextmanager
    def reading(self, kind: str | None) -> Iterator[None]:
        """Record a wait of this kind, but not the waits inside it. With None, record only the waits inside."""
        if kind is not None:
            self.record(kind)
        before, self._seen = self._seen, self._seen or kind is not None
        yield
        self._seen = before

    def dispatched(self, name: str, tensors: list[Tensor]) -> None:
        if name in DISPATCHED and not self._seen and any(t not in self.host for t in tensors):
            self.record(name)

    def _synchronize(self, *_: Any) -> None:
        self.record("synchronize")

    def _event(self, *_: Any, **__: Any) -> Any:
        event = mock.Mock(spec=["record", "synchronize", "query", "elapsed_time", "wait"])
        event.synchronize.side_effect = lambda: self.record("synchronize")
        event.elapsed_time.return_value = 1.0
        return event


def _on_device(asked: Any) -> bool | None:
    """Return whether an argument names a CUDA device; None if it names no device."""
    if isinstance(asked, (torch.device, str)):
        return str(asked).startswith("cuda")
    return None


class _Functions(TorchFunctionMode):
    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, host = kwargs or {}, self._rehearsal.host
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if func in (torch.Tensor.backward, torch.autograd.backward):  # the second is called by pipelines
            of = (args[0],) if isinstance(args[0], Tensor) else tuple(args[0])
            given = kwargs.get("grad_tensors") or (None,) * len(of)
            with self:  # backward functions written in Python see the device, too
                gradients = tuple(torch.ones_like(t) if g is None else g for t, g in zip(of, given, strict=True))
                return torch.autograd.graph._engine_run_backward(
                    of, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t not in host for t in inputs)
        asked = next(filter(lambda x: x is not None, map(_on_device, (*args, *kwargs.values()))), None)
        asked = {"cpu": False, "cuda": True}.get(name, asked)
        if asked is False and sys._getframe(1).f_code.co_filename.startswith(REAL):
            asked = True  # to these files the CPU is the device
        with self._rehearsal.reading(self._kind(name, args, kwargs, asked, on_device)):
            result = func(*_real(args), **_real({k: v for k, v in kwargs.items() if k != "pin_memory"}))
        made_there = asked if asked is not None and (not inputs or name in ("to", "cpu", "cuda")) else on_device
        if not made_there and name != "copy_":
            self._rehearsal.mark_host(t for t in tree_iter(result) if isinstance(t, Tensor))
        elif made_there and not on_device:
            for t in tree_iter(result):
                if isinstance(t, Tensor) and not any(t is x for x in inputs):
                    host.pop(t, None)
                elif isinstance(t, Tensor):  # the input itself, where a GPU would return a copy
                    result = t.view_as(t)
                    host.pop(result, None)
        return result

    def _kind(self, name: str, args: Any, kwargs: dict[str, Any], asked: bool | None, on_device: bool) -> str | None:
        if name in READS:
            return name if on_device else None
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if name == "to" and asked is not None and asked != on_device:
            return "to" if blocks else None
        if name == "copy_" and (args[0] in self._rehearsal.host) != (args[1] in self._rehearsal.host):
            return "copy_" if blocks else None
        if name in FROM_DATA and asked:
            return name
        if name == "__getitem__" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_iter(args[1])):
            return "nonzero"
        return None

    def _attribute(self, func: Callable[..., Any], args: Any) -> Any:
        value = func(*args)
        if args[0] in self._rehearsal.host or sys._getframe(2).f_code.co_filename.startswith(REAL):
            return value
        if func == torch.Tensor.device.__get__:
            return DEVICE
        return True if func == torch.Tensor.is_cuda.__get__ else value  # type: ignore[attr-defined]


class _Dispatched(TorchDispatchMode):
    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        self._rehearsal.dispatched(func._schema.name.partition("::")[2], tensors)
        return func(*args, **kwargs)


def _real(tree: Any) -> Any:
    return tree_map(lambda x: "cpu" if _on_device(x) else x, tree)
