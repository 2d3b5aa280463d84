"""
What each process writes and reads, told to torch.distributed.checkpoint by regions.

A layout is nothing but regions: what was written in one layout is read in any other, each process asking for its own
boxes. Several processes that hold the same box (replicas) offer it all, and the planner lets one of them write it.
"""

from __future__ import annotations

from collections.abc import Mapping

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

from shoal.parallel.mesh import Mesh
from shoal.parallel.region import Part, Region


class RegionSavePlanner(DefaultSavePlanner):
    """Writes the parts it was given."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, part) for name, part in self._parts.items()])
        return self.plan


def share_out(parts: Mapping[str, Part], mesh: Mesh) -> list[str]:
    """
    The names of the parts that this process is to write: of several that hold the same box, one writes it.

    A collective over the world. Raises ValueError where the boxes of all do not make up the tensors.
    """
    planner = RegionSavePlanner(parts)
    planner.set_up_planner({}, is_coordinator=mesh.is_first)
    plans = mesh.gather_objects(planner.create_local_plan())
    plans, _ = planner.create_global_plan(plans)  # pure: every process comes to the same
    return [item.index.fqn for item in plans[mesh.place.rank].items]


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
