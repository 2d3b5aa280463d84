"""
Plans for torch.distributed.checkpoint: which regions each rank writes and reads.

A layout is a set of regions, so a checkpoint written in one layout loads in any other: each rank reads its own regions. If
several ranks hold the same region (replicas), the planner picks one of them to write it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shoal.checkpoint.memory_tier import FolderGroup
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Part, Region


class RegionSavePlanner(DefaultSavePlanner):
    """A planner that writes the given parts."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, part) for name, part in self._parts.items()])
        return self.plan


def share_out(parts: Mapping[str, Part], mesh: Mesh, group: FolderGroup) -> tuple[list[str], bool]:
    """
    Return the names of the parts that this rank writes, and whether each folder gets every tensor whole.

    Among ranks that share a folder and hold the same region, one writes it. If there are several folders, and the ranks of one
    folder do not hold every tensor whole, each rank writes all its parts, and only that rank can read them.

    A collective over the world. Raises ValueError if the regions of all ranks do not add up to the tensors.
    """
    planner = RegionSavePlanner(parts)
    planner.set_up_planner({}, is_coordinator=mesh.is_first)
    plans = mesh.gather_objects(planner.create_local_plan())
    names = {item.index.fqn for plan in plans for item in plan.items}
    shared, _ = planner.create_global_plan(plans)  # deterministic: every rank computes the same plan
    if group.count > 1:
        if not all(_make_up(names, [plans[r] for r in ranks]) for ranks in group.groups):
            return list(parts), False
        shared, _ = planner.create_global_plan([plans[r] for r in group.ranks])
    return [item.index.fqn for item in shared[group.index].items], True


def _make_up(names: set[str], plans: Sequence[SavePlan]) -> bool:
    """Return whether the regions of `plans` cover the tensors `names`."""
    missing: dict[str, int] = dict.fromkeys(names, -1)
    seen = set()
    for item in (item for plan in plans for item in plan.items):
        assert item.tensor_data is not None
        name, box = item.index.fqn, item.tensor_data.chunk
        if missing[name] < 0:
            missing[name] = math.prod(item.tensor_data.size)
        if (name, box.offsets, box.sizes) not in seen:
            seen.add((name, box.offsets, box.sizes))
            missing[name] -= math.prod(box.sizes)
    return not any(missing.values())


class RegionLoadPlanner(DefaultLoadPlanner):
    """A planner that reads into the given parts in place."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, part in self._parts.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(part.region)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._parts[index.fqn].tensor


def _chunk(region: Region) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(region.offsets), sizes=torch.Size(region.sizes))


def _write_item(name: str, part: Part) -> WriteItem:
    chunk = _chunk(part.region)
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(part.tensor), torch.Size(part.region.shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
