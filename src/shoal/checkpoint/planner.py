"""
What each process writes and reads, told to torch.distributed.checkpoint by regions.

A layout is nothing but regions: what was written in one layout is read in any other, each process asking for its own
boxes. Several processes that hold the same box (replicas) offer it all, and the planner lets one of them write it.
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
    """Writes the parts it was given."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, part) for name, part in self._parts.items()])
        return self.plan


def share_out(parts: Mapping[str, Part], mesh: Mesh, group: FolderGroup) -> tuple[list[str], bool]:
    """
    The names of the parts that this process is to write, and whether each folder gets all tensors, whole.

    Of several that write to one folder and hold the same box, one writes it. Where there are several folders, and what
    goes into one of them is not all there is, each process writes what it holds, to be read by itself.

    A collective over the world. Raises ValueError where the boxes of all do not make up the tensors.
    """
    planner = RegionSavePlanner(parts)
    planner.set_up_planner({}, is_coordinator=mesh.is_first)
    plans = mesh.gather_objects(planner.create_local_plan())
    names = {item.index.fqn for plan in plans for item in plan.items}
    shared, _ = planner.create_global_plan(plans)  # pure: every process comes to the same
    if group.count > 1:
        if not all(_make_up(names, [plans[r] for r in ranks]) for ranks in group.groups):
            return list(parts), False
        shared, _ = planner.create_global_plan([plans[r] for r in group.ranks])
    return [item.index.fqn for item in shared[group.index].items], True


def _make_up(names: set[str], plans: Sequence[SavePlan]) -> bool:
    """Whether the boxes of `plans` are all of the tensors `names`."""
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
    """Reads into the parts it was given, in place."""

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
