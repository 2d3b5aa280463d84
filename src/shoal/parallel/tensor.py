"""
Tensor, sequence and loss parallel (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

    x [B, T/tp, D] -> norm -> gather -> [B, T, D] -> column layers, heads or width / tp, row layer
                   -> partial sums [B, T, D] -> sum and scatter -> [B, T/tp, D]

Each family's `TENSOR_PARALLEL` table says how its modules are cut. Parameters become plain, smaller parameters:
what runs inside a module is the single-device code on fewer heads or columns, and FSDP2 can lie on top knowing
nothing of it. Between the modules each process holds its part of the sequence, also through norms and residuals.
What is not cut is held by all, each with a part of its gradient: its `Shard` says so, and `apply.py` sums it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.family import LanguageModel, TensorParallelStyle
from shoal.models.layers import Embedding, Linear
from shoal.parallel.collectives import gather, sum_scatter
from shoal.parallel.mesh import Axis
from shoal.parallel.region import Region

SEQUENCE = 1  # the dim of a sequence in [B, T, ...]


def styles(model: LanguageModel) -> Iterator[tuple[str, nn.Module, TensorParallelStyle]]:
    """Each module that the family's table names, with how it is cut."""
    for name, module in model.named_modules():
        for pattern, style in model.TENSOR_PARALLEL.items():
            if fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
                yield name, module, style
                break


def cut(model: LanguageModel, axis: Axis) -> dict[str, Region]:
    """Make each parameter of a model on meta as large as this process's part; which part, by name."""
    regions = {}
    for prefix, module, style in styles(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            region = Region.whole(parameter.shape)
            if style in ("column", "vocab"):
                region = region.chunk(0, axis.rank, axis.size)
            elif style == "row" and name == "weight":
                region = region.chunk(1, axis.rank, axis.size)
            regions[f"{prefix}.{name}"] = region
            if not region.is_whole:
                setattr(module, name, nn.Parameter(torch.empty(region.sizes, device="meta")))
    return regions


def connect(model: LanguageModel, axis: Axis, regions: dict[str, Region]) -> None:
    """Put the exchanges between the parts: what each module gets and gives. After compilation of what is inside."""
    for name, module, style in list(styles(model)):
        match style:
            case "partial":
                [row] = [m for n, m, s in styles(model) if s == "row" and n.startswith(f"{name}.")]
                assert isinstance(row, Linear)
                module.forward = _partial(module.forward, row, axis)
            case "vocab" if isinstance(module, Embedding):
                looked_up = _vocab_lookup(module, regions[f"{name}.weight"].offsets[0], axis)
                _replace_forward(module, looked_up)
            case "position":
                module.forward = _local_lookup(module.forward, axis)


def drop_row_biases(model: LanguageModel) -> None:
    """Row layers give partial sums alone; their bias is added once, where those are summed. Before compilation."""
    for _, module, style in styles(model):
        if style == "row":
            assert isinstance(module, Linear)
            _replace_forward(module, _product(module))


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _product(layer: Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, layer.weight.to(x.dtype))


def _partial(inside: Callable[..., Tensor], row: Linear, axis: Axis) -> Callable[..., Tensor]:
    """Whole sequence in, partial sums out, and each process keeps its part of the sequence of their sum."""

    def forward(x_BTD: Tensor, *rest: object) -> Tensor:
        sums_BTD = inside(gather(x_BTD, SEQUENCE, axis), *rest)
        bias = None if row.bias is None else row.bias.to(sums_BTD.dtype)
        return sum_scatter(sums_BTD, SEQUENCE, axis, bias)

    return forward


def _vocab_lookup(embedding: Embedding, first: int, axis: Axis) -> Callable[[Tensor], Tensor]:
    """Each process looks up the ids whose rows it has; one of them has each, so that the sum is exact."""

    def forward(ids_BT: Tensor) -> Tensor:
        rows = embedding.weight.shape[0]
        here_BT = (ids_BT >= first) & (ids_BT < first + rows)
        found_BTD = F.embedding((ids_BT - first).clamp(0, rows - 1), embedding.weight)
        return sum_scatter(found_BTD * here_BT.unsqueeze(-1), SEQUENCE, axis)

    return forward


def _local_lookup(inside: Callable[[Tensor], Tensor], axis: Axis) -> Callable[[Tensor], Tensor]:
    """Only this process's part of the sequence: the last dim of positions [T] or [B, T]."""

    def forward(ids: Tensor) -> Tensor:
        return inside(ids.chunk(axis.size, -1)[axis.rank])

    return forward
