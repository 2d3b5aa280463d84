"""The device mesh: which process this is, on which device, and along which axes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shoal.config.layout import Layout, find_layout
from shoal.config.options import FLOAT16_ON_CPU, Parallel
from shoal.errors import LaunchError
from shoal.mesh.place import Place, describe_place, is_launched, read_place
from shoal.mesh.store import open_store, stay_on_loopback

ALONE = Place()


@dataclass(frozen=True)
class Axis:
    """The processes that differ from this one along one axis, or along several taken as one."""

    size: int = 1
    rank: int = 0  # this process's place on it
    group: dist.ProcessGroup | None = None  # None where there is nobody to talk to

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the axis, in place, and given back. A collective over this axis."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


DEFAULT_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")  # of `distributed_c10d`

# What is talked along: the axes themselves, and some taken together.
GROUPS: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "dp_replicate": ("dp_replicate",),
    "cp": ("cp",),
    "tp": ("tp",),
    "shard": ("dp_shard", "cp"),  # FSDP's shards, over the parts of a sequence too
    "batch": ("dp_replicate", "dp_shard", "cp"),  # whose gradients are summed
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),  # all that hold something of the same pipeline stage
}


class Mesh:
    """
    Where this process stands, its device, and its axes (see `config/layout.py`).

    `dp_rank` of `dp_size` says which of a step's micro-batches are its own; `pp`, `cp` and `tp` neighbours share them.
    """

    def __init__(
        self, place: Place, device: torch.device, layout: Layout | None = None, timeout: timedelta | None = None
    ) -> None:
        """
        A collective over the world where the layout has axes: groups are made by all processes in one order.

        timeout: of the groups of the axes; None: torch's own.
        """
        self.place, self.device, self._timeout = place, device, timeout
        self.layout = layout or Layout(dp_replicate=place.world_size)
        self.coordinates = self.layout.coordinates(place.rank)
        self._axes = {name: self._open(axes) for name, axes in GROUPS.items()}

    def _open(self, axes: tuple[str, ...]) -> Axis:
        lists = self.layout.groups(*axes)
        mine = next(ranks for ranks in lists if self.place.rank in ranks)
        if len(mine) == 1:
            return Axis()
        if len(mine) == self.world_size:
            return Axis(len(mine), mine.index(self.place.rank), dist.group.WORLD)
        group, _ = dist.new_subgroups_by_enumeration(lists, timeout=self._timeout)  # type: ignore[no-untyped-call]
        return Axis(len(mine), mine.index(self.place.rank), group)

    def axis(self, name: str) -> Axis:
        """One of `GROUPS`."""
        return self._axes[name]

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """True on the one rank that prints and writes what is written once."""
        return self.place.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.coordinates["dp_replicate"] * self.layout.dp_shard + self.coordinates["dp_shard"]

    @property
    def dp_size(self) -> int:
        return self.layout.dp

    def barrier(self) -> None:
        """Wait for all ranks. A collective over the world."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the world, in place, and given back. A collective over the world."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank gives, in their order; for what is rare and small. A collective over the world."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_problem(self, problem: str) -> str:
        """
        What the first rank that has a problem says of it, the same on all; "" where none has: so that all raise, or none.
        A collective over the world.
        """
        return next(filter(None, self.gather_objects(problem)), "")


def choose_device(wanted: str, place: Place = ALONE) -> torch.device:
    """The device of the process at `place`. Raises `LaunchError` where it is not to be had."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "{option} is cuda, but torch sees no CUDA device; set {option} to cpu, or see shoal env",
            option="train.device",
        )
    count = torch.cuda.device_count()
    if count == 1:  # Slurm's --gpus-per-task=1 shows each worker a device of its own, as number 0
        return torch.device("cuda", 0)
    if place.local_world_size > count:
        fewer = (
            f"set launch.processes to {count}"
            if is_launched()
            else f"start {count} on each machine, or give each its own (Slurm: --gpus-per-task=1)"
        )
        raise LaunchError(
            f"{place.local_world_size} processes need as many CUDA devices, and there are {count}; {fewer}"
        )
    return torch.device("cuda", place.local_rank)


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise `LaunchError` where `device` cannot compute in `dtype`."""
    if dtype == "float16" and device.type == "cpu":
        raise LaunchError(FLOAT16_ON_CPU, option="train.dtype")
    if dtype == "bfloat16" and not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise LaunchError(f"{name} has no bfloat16; set {{option}} to float32", option="train.dtype")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself; every CPU can, if slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone or cannot be reached, and not for a reason of ours."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "remote process exited",  # NCCL's own words for ncclRemoteError, and torch's
        "remote process exiting",
        "NCCL communicator was aborted",
        "Timed out waiting",
    )
    return dist.is_initialized() and any(word in str(error) for word in words)


@contextlib.contextmanager
def default_timeout(timeout: timedelta) -> Iterator[None]:
    """
    Give `timeout` to the groups that torch opens by itself (FSDP2's for `reshard_after_forward` by a number).

    torch takes the timeout of such a group from two variables of a module, not from the group of the world: 30 minutes,
    10 with NCCL.
    """
    names = [name for name in DEFAULT_TIMEOUTS if hasattr(distributed_c10d, name)]
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name in names:
            setattr(distributed_c10d, name, before[name])


def _join(place: Place, device: torch.device, timeout: timedelta) -> None:
    """
    Open the group of the world. Raises `LaunchError` where NCCL finds two processes on one device, or where the processes
    that another launcher's variables promise do not come.

    With `device_id` NCCL connects all processes here, for each group: a pipeline's first messages need no connection
    of their own, which torch would otherwise open between two processes while others wait for another pair.
    """
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=open_store(place, timeout),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        if isinstance(error, dist.DistStoreError | dist.DistNetworkError) and not is_launched():
            raise LaunchError(
                f"{describe_place()}: after {timeout.total_seconds():.0f} s not all had come; start shoal once for each of "
                "RANK 0 to WORLD_SIZE - 1, or unset these variables"
            ) from error
        if "Duplicate GPU detected" not in str(error):
            raise
        raise LaunchError(
            f"{place.local_world_size} processes here share a CUDA device; start as many as there are devices, or give "
            "each its own (Slurm: --gpus-per-task=1)"
        ) from error


@contextlib.contextmanager
def open_mesh(device: str, timeout_seconds: float, parallel: Parallel) -> Iterator[Mesh]:
    """
    Join the other processes; leave them in order at the end. A collective over the world.

    On an error the group is left without a barrier: the others may never come to one.
    """
    place = read_place()
    layout = find_layout(parallel, place.world_size)
    if isinstance(layout, str):
        raise LaunchError(layout)
    chosen = choose_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=timeout_seconds)
    if place.world_size > 1:
        stay_on_loopback()
        _join(place, chosen, timeout)
    mesh = Mesh(place, chosen, layout, timeout)
    with default_timeout(timeout):
        yield mesh
    if mesh.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
