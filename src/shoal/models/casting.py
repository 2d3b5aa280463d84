"""
Mixed precision as in `layers.py`, for modules of other libraries.

`layers.py` casts each weight where it is used. Modules of other libraries do not: while such a module runs, copies in the
activations' dtype replace its parameters. Autograd records the cast, so gradients arrive in float32. A block's parameters are
cast together, since a block's own code may use the weight of a submodule. With FSDP2 a block's parameters are cast already,
with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def cast_while_running(module: nn.Module, dtype: torch.dtype, *, inside: bool) -> None:
    """Make `module` run with its own parameters in `dtype`. `inside`: whether to cast its submodules' parameters too."""
    owners = list(module.modules()) if inside else [module]
    plain: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for owner in owners:
                held: dict[str, Any] = owner._parameters
                for name, parameter in held.items():
                    if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                        kept.append((held, name, parameter))
            for own, name, parameter in kept:
                own[name] = parameter.to(dtype)
            return plain(*args, **kwargs)
        finally:
            for own, name, parameter in kept:
                own[name] = parameter

    module.forward = forward


def cast_output(module: nn.Module, dtype: torch.dtype) -> None:
    """Make `module`, an embedding, run in float32 and cast its output, so that a row's gradient is summed in float32."""
    plain: Callable[..., Any] = module.forward
    module.forward = lambda *args, **kwargs: plain(*args, **kwargs).to(dtype)
