"""Find the first NaN or Inf by rerunning the step with hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, order=True)
class Origin:
    """The place where NaN or Inf appeared. Places compare in the order of computation."""

    in_gradient: bool  # gradients come after every output
    stage: int
    turn: int  # modules called so far, this one included; 0 for a gradient
    name: str

    def __str__(self) -> str:
        return f"the {'gradient' if self.in_gradient else 'output'} of {self.name}"


def find_origin(parts: Mapping[int, nn.Module], again: Callable[[], object]) -> Origin | None:
    """
    Return where NaN or Inf first appears when `again` repeats the step's forward and backward; None if all is finite.

    That is the first module with such an output. If there is none, it is the parameter with such a gradient that is nearest to
    the loss. parts: pipeline stages by number. Waits for the device after every module, which is acceptable for a rare event.
    """
    watch = _Watch()
    named = [(stage, name, m) for stage, part in parts.items() for name, m in part.named_modules() if name]
    hooks = [module.register_forward_hook(watch.hook(stage, name)) for stage, name, module in named]
    try:
        again()
    finally:
        for hook in hooks:
            hook.remove()
    if watch.found is not None:
        return watch.found
    for stage, part in sorted(parts.items(), reverse=True):
        for name, parameter in reversed(list(part.named_parameters())):
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return Origin(True, -stage, 0, name)
    return None


class _Watch:
    """Remembers the first module whose output is not finite."""

    def __init__(self) -> None:
        self.found: Origin | None = None
        self._calls = 0

    def hook(self, stage: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a forward hook for the module `name`."""

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            self._calls += 1
            if self.found is None and not all(map(_is_finite, _tensors(output))):
                self.found = Origin(False, stage, self._calls, name)

        return look


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a module's output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for each in output for t in _tensors(each)] if isinstance(output, list | tuple) else []


def _is_finite(tensor: Tensor) -> bool:
    """Return whether this process's part of a tensor is finite."""
    local = getattr(tensor, "to_local", lambda: tensor)()
    return not local.is_floating_point() or bool(torch.isfinite(local).all())
