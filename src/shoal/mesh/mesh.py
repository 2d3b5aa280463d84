"""The device mesh: this process's rank, device, and position on each parallel axis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shoal.config.layout import AXES, DATA_PARALLEL, Layout, find_layout
from shoal.config.options import FLOAT16_ON_CPU, Parallel
from shoal.errors import LaunchError
from shoal.mesh.place import Place, describe_place, is_launched, read_place
from shoal.mesh.same_world import check_same_world
from shoal.mesh.store import open_store, stay_on_loopback

ALONE = Place()


@dataclass(frozen=True)
class Axis:
    """This rank's group along one parallel axis, or along several flattened into one."""

    size: int = 1
    rank: int = 0  # of this process on the axis
    group: dist.ProcessGroup | None = None  # None if the size is 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` over the axis in place, and return it. A collective over this axis."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


DEFAULT_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")  # module variables of `distributed_c10d`

# Process groups: single axes, and flattened combinations.
GROUPS: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "dp_replicate": ("dp_replicate",),
    "cp": ("cp",),
    "tp": ("tp",),
    "shard": ("dp_shard", "cp"),  # FSDP shards parameters over both
    "batch": (*DATA_PARALLEL, "cp"),  # gradients are all-reduced over it
    "stage": tuple(name for name in AXES if name != "pp"),  # all ranks of one pipeline stage
}


class Mesh:
    """
    This process's rank, device and axes (see `config/layout.py`).

    `dp_rank` (of `dp_size`) determines which of a step's micro-batches this rank loads; neighbors along `pp`, `cp` and
    `tp` load the same ones.
    """

    def __init__(
        self, place: Place, device: torch.device, layout: Layout | None = None, timeout: timedelta | None = None
    ) -> None:
        """
        Open a process group for each axis. A collective over the world: all ranks create the groups in the same order.

        timeout: for collectives of these groups; None uses torch's default.
        """
        self.place, self.device, self._timeout = place, device, timeout
        self.layout = layout or Layout(dp_replicate=place.world_size)
        self.coordinates = self.layout.coordinates(place.rank)
        self.dp_rank = self.layout.group_of(place.rank, *DATA_PARALLEL).index(place.rank)
        self._axes = {name: self._open(axes) for name, axes in GROUPS.items()}

    def _open(self, axes: tuple[str, ...]) -> Axis:
        mine = self.layout.group_of(self.place.rank, *axes)
        if len(mine) == 1:
            return Axis()
        if len(mine) == self.world_size:
            return Axis(len(mine), mine.index(self.place.rank), dist.group.WORLD)
        group, _ = dist.new_subgroups_by_enumeration(self.layout.groups(*axes), timeout=self._timeout)  # type: ignore[no-untyped-call]
        return Axis(len(mine), mine.index(self.place.rank), group)

    def axis(self, name: str) -> Axis:
        """Return the axis `name`, a key of `GROUPS`."""
        return self._axes[name]

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """Return True on rank 0, which prints messages and writes the run's metrics and events for all ranks."""
        return self.place.rank == 0

    @property
    def first_of_batch(self) -> bool:
        """Return True on one of the ranks along `pp`, `cp` and `tp`, which have equal batches: this rank counts them."""
        return all(at == 0 for axis, at in self.coordinates.items() if axis not in DATA_PARALLEL)

    @property
    def dp_size(self) -> int:
        return self.layout.dp

    def barrier(self) -> None:
        """Wait for all ranks. A collective over the world."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` over the world in place, and return it. A collective over the world."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """
        Return each rank's `value`, in rank order; for rare, small values. A collective over the world.

        torch pickles the values and sends them between the run's own processes.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_problem(self, problem: str) -> str:
        """
        Return the lowest rank's non-empty `problem`, or "" if all are empty. A collective over the world.

        The result is the same on all ranks, so that either all raise or none.
        """
        return next(filter(None, self.gather_objects(problem)), "")


def choose_device(wanted: str, place: Place = ALONE) -> torch.device:
    """Return the device for the process at `place`. Raises `LaunchError` if its node has too few CUDA devices."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "{option} is cuda, but torch sees no CUDA device; set {option} to cpu, or check shoal env",
            option="train.device",
        )
    count = torch.cuda.device_count()
    if count == 1:  # Slurm's --gpus-per-task=1 shows each worker its own device as number 0
        return torch.device("cuda", 0)
    if place.local_world_size > count:
        fewer = (
            f"set launch.processes to {count}"
            if is_launched()
            else f"start {count} per node, or give each process its own device (Slurm: --gpus-per-task=1)"
        )
        raise LaunchError(
            f"{place.local_world_size} processes need {place.local_world_size} CUDA devices, but there are {count}; {fewer}"
        )
    return torch.device("cuda", place.local_rank)


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise `LaunchError` if `device` cannot compute in `dtype`."""
    if dtype == "float16" and device.type == "cpu":
        raise LaunchError(FLOAT16_ON_CPU, option="train.dtype")
    if dtype == "bfloat16" and not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise LaunchError(f"{name} does not support bfloat16; set {{option}} to float32", option="train.dtype")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether `device` computes in bfloat16 natively: True for every CPU, even a slow one."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank died or cannot be reached."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "remote process exited",  # NCCL's text for ncclRemoteError; the next is torch's
        "remote process exiting",
        "NCCL communicator was aborted",
        "Timed out waiting",
    )
    return dist.is_initialized() and any(word in str(error) for word in words)


@contextlib.contextmanager
def default_timeout(timeout: timedelta) -> Iterator[None]:
    """
    Apply `timeout` to the groups that torch opens itself, such as FSDP2's for an integer `reshard_after_forward`.

    torch takes their timeout from two module variables, not from the world group: 30 minutes, 10 with NCCL.
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


def _join(place: Place, device: torch.device, timeout: timedelta, settings: Mapping[str, object]) -> None:
    """
    Open the world group. Raises `LaunchError` if NCCL finds two ranks on one device, or if another launcher started shoal
    and its ranks disagree, also about `settings`, or not all ranks of its WORLD_SIZE join.

    `device_id` makes NCCL connect all ranks of each group here. Otherwise torch would connect the ranks of a pipeline lazily:
    each pair at its first message, while other ranks wait for other pairs.
    """
    try:
        store = open_store(place, timeout)
        if not is_launched():  # shoal's own launchers have compared themselves
            check_same_world(store, place, settings, timeout.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        if isinstance(error, dist.DistStoreError | dist.DistNetworkError) and not is_launched():
            raise LaunchError(
                f"{describe_place()}: not all ranks joined within {timeout.total_seconds():.0f} s; start shoal once for each "
                "RANK from 0 to WORLD_SIZE - 1, or unset these variables"
            ) from error
        if "Duplicate GPU detected" not in str(error):
            raise
        raise LaunchError(
            f"some of the {place.local_world_size} processes on this node share a CUDA device; start one process per device, or "
            "give each its own (Slurm: --gpus-per-task=1)"
        ) from error


@contextlib.contextmanager
def open_mesh(
    device: str, timeout_seconds: float, parallel: Parallel, settings: Mapping[str, object] | None = None
) -> Iterator[Mesh]:
    """
    Join the other ranks, and leave them at the end, after a barrier. A collective over the world.

    settings: what must be the same on all ranks if another launcher started them; see `same_world.py`.

    After an error there is no barrier: the other ranks may never reach one.
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
        _join(place, chosen, timeout, settings or {})
    mesh = Mesh(place, chosen, layout, timeout)
    with default_timeout(timeout):
        yield mesh
    if mesh.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
