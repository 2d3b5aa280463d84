"""The facts that the event "started" records: what trains, with which code, and on which hardware."""

from __future__ import annotations

import math
import platform
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import shoal
from shoal.launch.command import users_command
from shoal.plan.estimate import parameter_count
from shoal.training.run import Run


def start_facts(run: Run, machine: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the facts of a start; on other ranks than the first, only `machine`. A collective over the world.

    machine: what the bits of a step depend on.
    """
    places = run.mesh.gather_objects((socket.gethostname(), _gpu(run.mesh.device)))
    if not run.mesh.is_first:
        return {"machine": machine}
    config, meter, look = run.config, run.watch.meter, run.start.repository
    repository = look.found() if look else None
    return {
        "step": run.state.step,
        "processes": run.mesh.world_size,
        "device": str(run.mesh.device),
        "machine": machine,
        "layout": asdict(run.mesh.layout),
        "command": users_command(),
        **({} if repository is None else {"git": repository}),
        "versions": _versions(),
        "host": socket.gethostname(),
        "hosts": [host for host, _ in places],
        "gpus": [gpu for _, gpu in places if gpu is not None],
        "device_name": meter.device_name,
        "parameters": parameter_count(config.model),
        "trainable_parameters": sum(map(math.prod, run.runnable.shapes.values())),
        "total_steps": run.total_steps,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
        "flops_per_token": meter.flops_per_token or None,
        "peak_flops": meter.peak_flops,
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    """Return the name and the memory of this process's GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "memory_bytes": found.total_memory}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    found = {
        "shoal": shoal.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if torch.version.cuda is not None and torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
    return found
