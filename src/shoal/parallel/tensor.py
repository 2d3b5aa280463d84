"""
Tensor, sequence and loss parallel (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

    x [B, T/tp, D] -> norm -> all-gather -> [B, T, D] -> colwise layers -> heads or width / tp -> rowwise layer
                   -> partial sums [B, T, D] -> reduce-scatter -> [B, T/tp, D]

Each family's `TENSOR_PARALLEL` table says how its modules are sharded. Parameters become plain, smaller parameters: a
module runs its single-device code on fewer heads or columns, and FSDP2 can shard the smaller parameters further. Between
these modules each rank holds its part of the sequence, through norms and residuals too.
Replicated parameters have a partial gradient on each rank: their `Shard` marks it, and `runnable.py` sums it.

A transformers model is sharded by its config's tensor-parallel plan, which names individual layers. Between these layers
activations are replicated, and each rank computes the loss over the whole vocabulary:

    x [B, T, D] -> colwise layer (all-reduces its input's gradient) -> heads or width / tp -> rowwise layer (all-reduces)
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import LaunchError
from shoal.mesh.mesh import Axis
from shoal.mesh.region import Region
from shoal.models.family import LanguageModel, TensorParallelStyle
from shoal.models.layers import Embedding, Linear
from shoal.parallel.collectives import (
    all_gather,
    all_reduce,
    all_reduce_gradient,
    gather_output,
    reduce_scatter,
    split_input,
)

SEQUENCE = 1  # the dim of a sequence in [B, T, ...]


def styles(model: LanguageModel) -> Iterator[tuple[str, nn.Module, TensorParallelStyle]]:
    """Yield each module that the family's table names, with its style."""
    for name, module in model.named_modules():
        if name in model.TENSOR_PARALLEL:
            yield name, module, model.TENSOR_PARALLEL[name]
            continue
        for pattern, style in model.TENSOR_PARALLEL.items():
            if fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
                yield name, module, style
                break


def cut(model: LanguageModel, axis: Axis) -> dict[str, Region]:
    """
    Shrink each parameter of a model on meta to this rank's part. Return this rank's regions by parameter name.

    Raises `LaunchError` if the model cannot be sharded, or `axis` does not divide a dimension that needs equal parts.
    """
    if model.why_not_cut is not None:
        raise LaunchError(f"parallel.tp {axis.size}: {model.why_not_cut}; set parallel.tp to 1")
    regions = {}
    for prefix, module, style in styles(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            side = {"colwise_gather_output": 0, "rowwise_split_input": -1}.get(style)
            if side is not None and name == "weight" and parameter.shape[side] % axis.size:
                raise LaunchError(
                    f"parallel.tp {axis.size} does not divide {parameter.shape[side]}, a dimension of {prefix} that needs "
                    "equal parts; set parallel.tp to 1, or a divisor of it"
                )
            region = regions[f"{prefix}.{name}"] = _part(Region.whole(parameter.shape), name, style, axis)
            if not region.is_whole:
                setattr(module, name, nn.Parameter(torch.empty(region.sizes, device="meta")))
    return regions


def _part(whole: Region, name: str, style: str, axis: Axis) -> Region:
    """Return this rank's region of a layer's parameter. A weight is [outputs, inputs], so 'colwise' splits its rows."""
    if style in ("colwise", "vocab_parallel", "colwise_grad_allreduce", "colwise_gather_output"):
        return whole.chunk(0, axis.rank, axis.size)
    if style in ("rowwise", "rowwise_allreduce", "rowwise_split_input") and name == "weight":
        return whole.chunk(1, axis.rank, axis.size)
    return whole


def connect(model: LanguageModel, axis: Axis, regions: dict[str, Region]) -> None:
    """Wrap each module's forward in its collectives. Call after compiling the modules: collectives are not compiled."""
    inputs: dict[str, _SharedInput] = collections.defaultdict(lambda: _SharedInput(axis))  # by the enclosing module
    for name, module, style in list(styles(model)):
        match style:
            case "colwise_grad_allreduce" | "colwise_gather_output":
                module.forward = _column(module, inputs[_around(name)], axis, join=style == "colwise_gather_output")
            case "rowwise_allreduce" | "rowwise_split_input":
                module.forward = _row(module, inputs[_around(name)], axis, split=style == "rowwise_split_input")
            case "gather_reduce_scatter":
                [row] = [m for n, m, s in styles(model) if s == "rowwise" and n.startswith(f"{name}.")]
                assert isinstance(row, Linear)
                module.forward = _partial(module.forward, row, axis)
            case "vocab_parallel" if isinstance(module, Embedding):
                looked_up = _vocab_lookup(module, regions[f"{name}.weight"].offsets[0], axis)
                _replace_forward(module, looked_up)
            case "local_positions":
                module.forward = _local_lookup(module.forward, axis)


def drop_row_biases(model: LanguageModel) -> None:
    """Make rowwise layers return partial sums without the bias, which is added once, to the sum. Call before compiling."""
    for _, module, style in styles(model):
        if style == "rowwise":
            assert isinstance(module, Linear)
            _replace_forward(module, module.product)


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _partial(inside: Callable[..., Tensor], row: Linear, axis: Axis) -> Callable[..., Tensor]:
    """All-gather the sequence, run `inside`, and reduce-scatter its partial sums along the sequence."""

    def forward(x_BTD: Tensor, *rest: object) -> Tensor:
        sums_BTD = inside(all_gather(x_BTD, SEQUENCE, axis), *rest)
        bias = None if row.bias is None else row.bias.to(sums_BTD.dtype)
        return reduce_scatter(sums_BTD, SEQUENCE, axis, bias)

    return forward


class _SharedInput:
    """The input that layers such as q, k and v share: its gradients are added locally, then all-reduced once."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = (x, all_reduce_gradient(x, self._axis))
        return self._last[1]

    def forget(self) -> None:
        """Drop the tensor once all layers have read it, so that its memory can be freed."""
        self._last = None


def _column(layer: nn.Module, shared: _SharedInput, axis: Axis, *, join: bool) -> Callable[[Tensor], Tensor]:
    inside: Callable[[Tensor], Tensor] = layer.forward

    def forward(x: Tensor) -> Tensor:
        out = inside(shared(x))
        return gather_output(out, out.ndim - 1, axis) if join else out

    return forward


def _around(name: str) -> str:
    return name.rpartition(".")[0]


def _row(layer: nn.Module, shared: _SharedInput, axis: Axis, *, split: bool) -> Callable[[Tensor], Tensor]:
    """All-reduce the layer's partial sums; the bias is added once, to the sum."""
    assert isinstance(layer, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        shared.forget()
        x = split_input(x, x.ndim - 1, axis) if split else x
        return all_reduce(F.linear(x, layer.weight), axis, layer.bias)

    return forward


def has_part_of_gradient(model: LanguageModel, name: str) -> bool:
    """Return whether a replicated parameter's gradient is a partial sum on each rank, for `sum_replicated` to complete."""
    return model.TENSOR_PARALLEL.get(_around(name)) not in ("replicated", "rowwise_allreduce", "rowwise_split_input")


def _vocab_lookup(embedding: Embedding, first: int, axis: Axis) -> Callable[[Tensor], Tensor]:
    """Look up the ids whose rows this rank holds; others give 0. Exactly one rank has each id, so the sum is exact."""

    def forward(ids_BT: Tensor) -> Tensor:
        rows = embedding.weight.shape[0]
        here_BT = (ids_BT >= first) & (ids_BT < first + rows)
        found_BTD = F.embedding((ids_BT - first).clamp(0, rows - 1), embedding.weight)
        return reduce_scatter(found_BTD * here_BT.unsqueeze(-1), SEQUENCE, axis)

    return forward


def _local_lookup(inside: Callable[[Tensor], Tensor], axis: Axis) -> Callable[[Tensor], Tensor]:
    """Look up this rank's part of the positions [T] or [B, T], which are split along their last dim."""

    def forward(ids: Tensor) -> Tensor:
        return inside(ids.chunk(axis.size, -1)[axis.rank])

    return forward
