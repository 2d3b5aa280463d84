"""
FSDP2 and HSDP: parameters, gradients and optimizer state cut over processes (Rajbhandari et al. 2020, arXiv:1910.02054).

Each block is a group: gathered before its forward, freed after it, gathered again for backward, its gradients summed
and cut. `torch.distributed.fsdp.fully_shard` does this. What lies outside the blocks (embedding, last norm, head) is
one group more, in float32, since its gradients are sums over many places. A block's parameters travel in the compute
dtype: cast before they are gathered or after, the bits are the same (see `models/layers.py`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from shoal.config.options import Parallel
from shoal.mesh.mesh import Axis, Mesh
from shoal.models.family import LanguageModel
from shoal.parallel.tree import Exchange, Leaves, TreeSum
from shoal.system.torch_private import require


def shard(model: LanguageModel, mesh: Mesh, parallel: Parallel, leaves: Leaves | None) -> ShardedGradients:
    """Cut a model on meta over `dp_shard` and `cp`; `leaves` asks for sums of one tree."""
    reshard: bool | int
    match parallel.reshard_after_forward:
        case "always" | "never" as word:
            reshard = word == "always"
        case number:
            reshard = number
    devices = _device_mesh(mesh, replicas=leaves is None)
    pinned = mesh.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if parallel.cpu_offload else OffloadPolicy()
    compute = None if model.compute_dtype == torch.float32 else model.compute_dtype
    blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks.values():
        fully_shard(block, mesh=devices, reshard_after_forward=reshard, mp_policy=blocks, offload_policy=offload)
    # The loss multiplies by the head after forward is over: it must still be there.
    fully_shard(model, mesh=devices, reshard_after_forward=False, mp_policy=rest, offload_policy=offload)
    return ShardedGradients(model, mesh.axis("batch"), mesh.axis("shard"), leaves)


def reshard(model: LanguageModel) -> None:
    """Forget what a forward without a backward has gathered: it would not see that weights are loaded or changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _device_mesh(mesh: Mesh, *, replicas: bool) -> DeviceMesh:
    """Of the processes that a parameter is cut over and, where torch is to sum over replicas too, of those."""
    inner, outer = mesh.axis("shard"), mesh.axis("dp_replicate")
    assert inner.group is not None
    if outer.size == 1 or not replicas:
        return DeviceMesh.from_group(inner.group, mesh.device.type, mesh_dim_names=("shard",))
    assert outer.group is not None
    here = next(g for g in mesh.layout.groups("dp_replicate", "dp_shard", "cp") if mesh.place.rank in g)
    ranks = torch.tensor(here).view(outer.size, inner.size)
    names = ("dp_replicate", "shard")
    return DeviceMesh.from_group([outer.group, inner.group], mesh.device.type, mesh=ranks, mesh_dim_names=names)


class ShardedGradients:
    """
    `Gradients` of a model that FSDP2 cut: each `p.grad` is this process's shard of the sum over all of `batch`.

    In a pipeline torch's stage tells FSDP2 itself when to sum; this is why a tree's order cannot be had there.
    """

    def __init__(self, model: LanguageModel, batch: Axis, shards: Axis, leaves: Leaves | None) -> None:
        assert isinstance(model, FSDPModule)
        if leaves is not None:
            require("bitwise_shards")
        self._model: FSDPModule = model
        self._parameters = list(model.parameters())
        self._sums: list[_TreeReduceScatter] = []
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            # The loss is already divided by the global number of tokens. gloo has no scaled sum: plain ones.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if leaves is not None:
                self._sums.append(_TreeReduceScatter(leaves, batch, shards))
                module.set_custom_reduce_scatter(self._sums[-1])  # type: ignore[arg-type]  # torch does not export the base

    def zero(self) -> None:
        for p in self._parameters:
            p.grad = None
        for tree_sum in self._sums:
            tree_sum.zero()

    def before_backward(self, slot: int | None, last: bool) -> None:
        for tree_sum in self._sums:
            tree_sum.slot, tree_sum.last = slot, last
        if not self._sums:
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)

    def after_backward(self, slot: int | None) -> None:
        pass

    def finish(self) -> None:
        pass


class _TreeReduceScatter:
    """FSDP2's reduce-scatter of one group: nothing until a step's last micro-batch, then the sum of the tree."""

    def __init__(self, leaves: Leaves, batch: Axis, shards: Axis) -> None:
        self._leaves, self._shards = leaves, shards.size
        self._exchange = Exchange(leaves, batch)
        self.slot: int | None = None
        self.last = False
        self.zero()

    def zero(self) -> None:
        self._tree = TreeSum(self._leaves.slots)

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: object,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        if self.slot is not None:
            self._tree.push(self.slot, input_tensor)
        if not self.last:
            output_tensor.zero_()
            return
        self._exchange.send(self._tree, self._shards)
        output_tensor.copy_(self._exchange.wait())
        self.zero()  # a block's whole gradient is not kept until the others' are done
