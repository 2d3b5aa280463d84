"""Measures the peak memory of a step: `python -m shoal.bench.memory_worker CONFIG ANSWER`, alone or under torchrun."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from shoal.bench.environment import facts
from shoal.bench.step_worker import main
from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.mesh.mesh import Mesh
from shoal.metrics.allocated import most_alive
from shoal.parallel.shared_sum import shared_bytes
from shoal.plan.fits import need_of, why_unknown
from shoal.system.signals import StopRequest
from shoal.training.loop import take_step
from shoal.training.run import Run


def measure(config: Config, mesh: Mesh, stop: StopRequest) -> dict[str, Any]:
    """Take a step, then another one; return its peaks on all ranks, and the predicted one. A collective over the world."""
    peak, run = _peak(config, mesh, stop)
    peaks = mesh.gather_objects(peak)
    run.close()
    return {
        "allocated_by_rank": peaks, "allocated_bytes": max(peaks), **_predicted(run.config, mesh),
        "model": run.watch.meter.describe_model(), "dtype": run.config.train.dtype, "about": facts(mesh.device),
    }  # fmt: skip


def _peak(config: Config, mesh: Mesh, stop: StopRequest) -> tuple[int, Run]:
    """Return the most bytes that torch's allocator had given out in the second step, with shared memory, and the run."""
    runs: list[Run] = []

    def open_run() -> None:
        runs.append(Run.open(config, mesh, stop))
        take_step(runs[0])

    if mesh.device.type != "cuda":
        return most_alive(open_run, lambda: take_step(runs[0])) + shared_bytes(), runs[0]
    open_run()
    torch.cuda.synchronize(mesh.device)
    torch.cuda.reset_peak_memory_stats(mesh.device)
    take_step(runs[0])
    torch.cuda.synchronize(mesh.device)
    return torch.cuda.max_memory_allocated(mesh.device), runs[0]


def _predicted(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return what `shoal plan` predicts, and of which parts; only why not, if it cannot."""
    if why := why_unknown(config):
        return {"why_not_predicted": why}
    known = dataclasses.replace(config, model=resolve_shape(config.model))
    need = need_of(known, mesh.layout, cuda=mesh.device.type == "cuda")
    return {"predicted_bytes": need.total, "parts": dict(need.parts)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), measure)
    sys.stdout.flush()
    os._exit(0)
