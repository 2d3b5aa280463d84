"""Recording of a process's steps with torch's profiler: named ranges for steps, phases and modules, and a bound on memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

MOST_BYTES: Final = 2 << 30  # of memory for the events of a process; recording stops there
WARNED_BYTES: Final = MOST_BYTES // 4
LOSS: Final = "loss"  # name of the range around the loss, which is not a module


class PhaseRanges:
    """An observer of phases that opens a named range for each; `over` is called after each."""

    def __init__(self, over: Callable[[], None]) -> None:
        self._over = over
        self._open: list[record_function] = []

    def enter(self, phase: str) -> None:
        self._open.append(_entered(phase))

    def leave(self, phase: str) -> None:
        self._open.pop().__exit__(None, None, None)
        self._over()


class ModuleRanges:
    """Named ranges around the forward of each module, by its global name. They exist only between `open` and `close`."""

    def __init__(self, parts: Iterable[nn.Module], is_compiled: Callable[[nn.Module], bool]) -> None:
        """is_compiled: whether a module's forward is compiled: hooks on the modules inside would compile it again."""
        self._modules = {name: m for part in parts for name, m in _outside_of_compiled(part, is_compiled)}
        self._hooks: list[RemovableHandle] = []
        self._open: list[record_function] = []

    @property
    def names(self) -> list[str]:
        """The names of the modules with a range."""
        return [*self._modules]

    def open(self) -> None:
        """Open a range at each forward from now on. FSDP2's own hooks, which gather weights, run inside."""
        for name, module in self._modules.items():
            enter, leave = self._hooks_of(name)
            self._hooks.append(module.register_forward_pre_hook(enter, prepend=True))
            self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Open no more ranges."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hooks_of(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._open.append(_entered(name))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._open:
                self._open.pop().__exit__(None, None, None)

        return enter, leave


def _outside_of_compiled(
    module: nn.Module, is_compiled: Callable[[nn.Module], bool], name: str = ""
) -> Iterable[tuple[str, nn.Module]]:
    """Yield the named modules below `module`, down to the compiled ones."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if not isinstance(child, nn.ModuleDict | nn.ModuleList):
            yield full, child
        if not is_compiled(child):
            yield from _outside_of_compiled(child, is_compiled, full)


def in_range(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    """Return `do` inside a range of this name."""

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return do(*args, **kwargs)

    return ranged


def _entered(name: str) -> record_function:
    opened = record_function(name)
    opened.__enter__()  # type: ignore[no-untyped-call]
    return opened


class Recorder:
    """
    torch's profiler around some steps of this process.

    Call `begin` before each step and `end` after it; `check` may stop it early. `export` writes the trace.
    """

    def __init__(self, device: torch.device, *, most_bytes: int = MOST_BYTES) -> None:
        self._device, self._most_bytes = device, most_bytes
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(activities=activities, profile_memory=True)
        self._step: record_function | None = None
        self._resident = 0
        self.is_on = False
        self.grown_bytes = 0
        """How much more memory the process holds than when recording began: the events, mostly."""
        self.is_full = False
        """Whether recording stopped because its events take too much memory."""

    def start(self) -> None:
        """Record from now on."""
        _wait(self._device)
        self._resident = psutil.Process().memory_info().rss
        self._profile.start()
        self.is_on = True

    def begin(self, step: int) -> None:
        """Open the range of a step."""
        if self.is_on:
            self._step = _entered(f"step {step}")

    def end(self) -> None:
        """Close the range of a step."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def check(self) -> None:
        """Stop recording if its events take too much memory."""
        if self.is_on:
            self.grown_bytes = max(self.grown_bytes, psutil.Process().memory_info().rss - self._resident)
            if self.grown_bytes > self._most_bytes:
                self.is_full = True
                self.stop()

    def stop(self) -> None:
        """Stop recording. May be called twice."""
        if self.is_on:
            self.is_on = False
            self.end()
            _wait(self._device)
            self._profile.stop()

    def export(self, path: Path) -> None:
        """Write the trace as JSON, compressed if the name ends with .gz. Raises `OSError`."""
        self._profile.export_chrome_trace(str(path))


def _wait(device: torch.device) -> None:
    """Wait for the device, so that a recording holds whole steps of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
