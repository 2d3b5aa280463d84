"""The device mesh: which process this is, on which device, and along which axes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shoal.errors import LaunchError
from shoal.launch.place import Place, read_place

ALONE = Place()


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, its device, and its axes. Today there is one, `dp_replicate`, over the world."""

    place: Place
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """True on the one rank that prints and writes what is written once."""
        return self.place.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.place.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    def barrier(self) -> None:
        """Wait for all ranks. A collective over the world."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the world, in place, and given back. A collective over the world."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def choose_device(wanted: str, place: Place = ALONE) -> torch.device:
    """The device of the process at `place`. Raises `LaunchError` where it is not to be had."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "train.device is cuda, but torch sees no CUDA device; set train.device to cpu, or see shoal env"
        )
    count = torch.cuda.device_count()
    if place.local_world_size > count:
        raise LaunchError(
            f"{place.local_world_size} processes need as many CUDA devices, and there are {count}; set launch.processes to {count}"
        )
    return torch.device("cuda", place.local_rank)


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise `LaunchError` where `device` cannot compute in `dtype`."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise LaunchError(f"{name} has no bfloat16; set train.dtype to float32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself; every CPU can, if slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone, and not for a reason of ours."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "remote process exited",
    )
    return dist.is_initialized() and any(word in str(error) for word in words)


@contextlib.contextmanager
def open_mesh(device: str, timeout_seconds: float) -> Iterator[Mesh]:
    """
    Join the other processes; leave them in order at the end. A collective over the world.

    On an error the group is left without a barrier: the others may never come to one.
    """
    place = read_place()
    chosen = choose_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    mesh = Mesh(place, chosen)
    if mesh.world_size > 1:
        if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    yield mesh
    if mesh.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
