"""Activation checkpointing and compilation of blocks. Both replace `forward`, so that names and hooks are unchanged."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from shoal.metrics.machine import instruction_sets
from shoal.system.torch_private import require

Forward = Callable[..., torch.Tensor]
CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"


def checkpointed(forward: Forward, mode: str) -> Forward:
    """
    Return `forward`, recomputed in backward: all of it ("full"), or all but matrix products and attention ("selective").

    Chen et al. 2016 (arXiv:1604.06174); selective: Korthikanti et al. 2022 (arXiv:2205.05198), section 5. shoal decides by
    operator what to recompute.
    """
    more: dict[str, Any] = {}
    if mode == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _kept_operators())

    def recomputed(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        out: torch.Tensor = checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)
        return out

    return recomputed


@functools.cache
def _kept_operators() -> list[Any]:
    """Return the operators that are expensive to recompute: matrix products and fused attention. Collectives are rerun."""
    require("selective")
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten.bmm.default]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # float32 products on some CPUs
        kept.append(torch.ops.mkldnn._linear_pointwise.default)
    attention = (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )  # fmt: skip
    return kept + [getattr(aten, name).default for name in attention]


class Compiled:
    """A compiled forward and its eager original; `on` selects which of the two runs."""

    def __init__(self, eager: Forward, compiled: Forward) -> None:
        self._eager, self._compiled = eager, compiled
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._compiled(*args, **kwargs) if self.on else self._eager(*args, **kwargs)


def compile_forward(module: nn.Module, *, whole: bool, bitwise: bool, again: bool) -> Compiled:
    """
    Compile `module.forward`.

    `whole`: whether a graph break is an error. `again`: whether activation checkpointing already applies to this forward.
    If not, the eager version is checkpointed here, so that it needs no more memory than the compiled version.

    `bitwise`: whether compiled code rounds at every cast. By default the compiler skips rounding a weight that it casts and
    uses at once. It cannot skip this rounding if FSDP2 has cast the weight before, so bits would depend on the layout.
    """
    separate_cache()
    options: dict[str, Any] | None = {"emulate_precision_casts": True} if bitwise else None
    eager: Forward = module.forward
    compiled = Compiled(
        eager if again else checkpointed(eager, "full"), torch.compile(eager, fullgraph=whole, options=options)
    )
    module.forward = compiled
    return compiled


def separate_cache() -> None:
    """
    Set the compiler's cache to a folder for this CPU's instruction set.

    torch 2.13 keys compiled CPU code by its graph, not by the vector width it was compiled for. A CPU with another
    instruction set that shares the folder then loads this code, and the process ends with SIGSEGV.
    """
    root = Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")
    kind = instruction_sets().replace(", ", "-")
    if root.name != kind:
        os.environ[CACHE] = str(root / kind)


def set_activation_budget(budget: float) -> None:
    """Set the fraction of activations that code compiled from now on may keep: 0 none, 1 all."""
    require("compile")
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = budget
