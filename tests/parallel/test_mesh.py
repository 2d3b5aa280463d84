"""The groups of a mesh, and the device of a rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shoal.config.options import Config
from shoal.errors import LaunchError
from shoal.mesh import mesh as mesh_module
from shoal.mesh.mesh import Mesh, choose_device, is_lost_peer, open_mesh
from shoal.mesh.place import LOCKED_BY, Place
from shoal.training.loop import take_step
from shoal.training.run import Run
from tests.parallel.layouts import NeverStop, config_of
from tests.world import World

ASKED_SECONDS = 77.0


def timeouts_of_a_run(mesh: Mesh, config: Config) -> tuple[timedelta, dict[str, timedelta]]:
    """Return the timeout of the world group, and those of all groups that exist after a step and a save."""
    groups = distributed_c10d._world.pg_map
    before = set(groups)
    with (
        mock.patch.object(mesh_module, "read_place", return_value=mesh.place),
        mock.patch.object(mesh_module, "open_store"),
        mock.patch.object(mesh_module, "check_same_world"),
        mock.patch.object(mesh_module, "stay_on_loopback"),
        mock.patch.object(dist, "init_process_group") as init,  # the tests' world group exists already
        mock.patch.object(dist, "destroy_process_group"),
        open_mesh("cpu", ASKED_SECONDS, config.parallel) as opened,
    ):
        run = Run.open(config, opened, NeverStop())
        take_step(run)
        assert run.saving.finish(run.state, None).ok
        run.evaluate(None)
        run.close()
        new: dict[str, timedelta] = {
            str(distributed_c10d._world.pg_names[group]): group._get_backend(torch.device("cpu")).options._timeout
            for group in groups
            if group not in before
        }
    for group in set(groups) - before:
        dist.destroy_process_group(group)
    return init.call_args.kwargs["timeout"], new


@pytest.mark.parametrize(
    ("parallel", "least"),
    [
        ({"dp_shard": 2, "tp": 2}, 2),
        ({"dp_shard": 2, "pp": 2}, 2),
        ({"dp_shard": 4, "reshard_after_forward": 2}, 1),  # FSDP2 opens its own groups
    ],
    ids=str,
)
def test_every_group_has_the_timeout_that_was_asked_for(
    world: Callable[[int], World], tmp_path: Path, parallel: dict[str, Any], least: int
) -> None:
    options = {f"parallel__{key}": value for key, value in parallel.items()}
    config = config_of(tmp_path, "timeouts", checkpoint__every=1, **options)
    for world_timeout, groups in world(4).run(timeouts_of_a_run, config):
        assert len(groups) >= least
        assert {world_timeout, *groups.values()} == {timedelta(seconds=ASKED_SECONDS)}, groups


@pytest.mark.parametrize(
    ("visible", "place", "index"),
    [
        (1, Place(3, 4, 3, 4), 0),  # Slurm's --gpus-per-task=1
        (4, Place(3, 4, 3, 4), 3),
        (1, Place(), 0),
        (8, Place(9, 16, 1, 8), 1),
        (2, Place(3, 4, 3, 4), None),
    ],
    ids=str,
)
def test_which_device_a_worker_takes(
    monkeypatch: pytest.MonkeyPatch, visible: int, place: Place, index: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if index is None:
        with pytest.raises(LaunchError, match=r"4 processes .* there are 2; start 2 .*--gpus-per-task=1"):
            choose_device("cuda", place)
        monkeypatch.setenv(LOCKED_BY, str(os.getppid()))  # as in workers of shoal's launcher
        with pytest.raises(LaunchError, match=r"4 processes .* there are 2; set launch\.processes to 2"):
            choose_device("auto", place)
    else:
        assert choose_device("auto", place) == torch.device("cuda", index)


def test_two_processes_on_one_device_are_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "read_place", lambda: Place(1, 2, 1, 2))
    monkeypatch.setattr(mesh_module, "open_store", mock.Mock())
    monkeypatch.setattr(mesh_module, "check_same_world", mock.Mock())
    monkeypatch.setattr(mesh_module, "stay_on_loopback", mock.Mock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    words = "NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    init = mock.Mock(side_effect=dist.DistBackendError(words))  # as NCCL raises it
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(LaunchError, match="--gpus-per-task=1"), open_mesh("cuda", 9.0, Config().parallel):
        pass
    assert init.call_args.kwargs["device_id"] == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("words", "is_lost"),
    [
        (
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited or there was a "
            "network error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
            "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer",
            True,
        ),
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            True,
        ),
        ("NCCL communicator was aborted on rank 1. Original reason for failure was: watchdog timeout", True),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40112", True),
        ("[gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:40112: Connection reset by peer", True),
        ("[gloo/transport/tcp/pair.cc:301] Write error [127.0.0.1]:40112: Broken pipe", True),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete", True),
        (
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: ...",
            False,
        ),
        ("NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.5\nDuplicate GPU detected", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_words_that_say_another_process_has_gone(monkeypatch: pytest.MonkeyPatch, words: str, is_lost: bool) -> None:
    """The messages are from the sources of torch and NCCL. Without an open group, no message counts as a lost peer."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert is_lost_peer(RuntimeError(words)) is is_lost
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert not is_lost_peer(RuntimeError(words))
