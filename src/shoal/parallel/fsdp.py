"""
FSDP2 and HSDP: parameters, gradients and optimizer state sharded over ranks (ZeRO stage 3).

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5; FSDP: Zhao et al. 2023, arXiv:2304.11277. Each block is a
group of `torch.distributed.fsdp.fully_shard`: all-gathered before forward, freed after it, all-gathered again for
backward, and its gradients reduce-scattered. The parameters outside the blocks (embedding, last norm, head) are one more
group, in float32, since their gradients are sums over many positions. A block's parameters are sent in the compute
dtype: casting them before or after the all-gather gives the same bits (see `models/layers.py`).
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from shoal.config.options import Parallel
from shoal.mesh.mesh import GROUPS, Mesh
from shoal.models.family import LanguageModel
from shoal.parallel.fsdp_gradients import ShardedGradients
from shoal.parallel.tree import Leaves


def shard(model: LanguageModel, mesh: Mesh, parallel: Parallel, leaves: Leaves | None) -> ShardedGradients:
    """Shard a model on meta over `dp_shard` and `cp`. With `leaves`, gradients are added as one tree (`tree.py`)."""
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
    # The loss multiplies by the head after forward has returned: the head must still be unsharded.
    fully_shard(model, mesh=devices, reshard_after_forward=False, mp_policy=rest, offload_policy=offload)
    return ShardedGradients(model, mesh.axis("batch"), mesh.axis("shard"), leaves)


def reshard(model: LanguageModel) -> None:
    """Free parameters left gathered by a forward without a backward: they would not follow later changes of the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _device_mesh(mesh: Mesh, *, replicas: bool) -> DeviceMesh:
    """Return the mesh that shards parameters, with the replicas as outer dim if torch is to all-reduce over them."""
    inner, outer = mesh.axis("shard"), mesh.axis("dp_replicate")
    assert inner.group is not None
    if outer.size == 1 or not replicas:
        return DeviceMesh.from_group(inner.group, mesh.device.type, mesh_dim_names=("shard",))
    assert outer.group is not None
    here = mesh.layout.group_of(mesh.place.rank, *GROUPS["batch"])
    ranks = torch.tensor(here).view(outer.size, inner.size)
    names = ("dp_replicate", "shard")
    return DeviceMesh.from_group([outer.group, inner.group], mesh.device.type, mesh=ranks, mesh_dim_names=names)
