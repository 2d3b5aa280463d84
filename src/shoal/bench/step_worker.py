"""Times one run of shoal's step: `python -m shoal.bench.step_worker CONFIG ANSWER`, alone or under torchrun."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shoal.bench.speed import WARMUP_STEPS, summarize_steps
from shoal.mesh.mesh import open_mesh
from shoal.metrics.products import product_rates
from shoal.models.build import COMPUTE_DTYPES
from shoal.plan.estimate import parameter_count
from shoal.resolve.resolve import read_back
from shoal.run.records import StepRecord, read_metrics
from shoal.system.signals import StopRequest, die_with_parent
from shoal.training.loop import set_threads, take_steps
from shoal.training.run import Run

PRODUCT_SECONDS = 1.0


def main(recipe: Path, answer: Path) -> None:
    """Take the steps of `recipe` as `shoal train` does; rank 0 writes the measurements."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        take_steps(run)
        product = _product_flops(run)
        if mesh.is_first:
            records = read_metrics(run.folder.metrics_file).steps
            answer.write_text(json.dumps(_measured(run, records, product)), encoding="utf-8")
            os.remove(run.folder.metrics_file)


def _product_flops(run: Run) -> float:
    """Return the FLOP/s of a matrix product on all processes together, in the run's dtype. A collective over the world."""
    run.mesh.barrier()
    rates = product_rates([COMPUTE_DTYPES[run.config.train.dtype]], run.mesh.device, PRODUCT_SECONDS)
    return float(run.mesh.sum(torch.tensor(rates[0], device=run.mesh.device, dtype=torch.float64)))


def _measured(run: Run, records: Sequence[StepRecord], product_flops: float) -> dict[str, object]:
    config = run.config
    tokens = config.train.global_batch * config.data.seq_len
    timed = records[WARMUP_STEPS:]
    splits = [r.split_seconds for r in timed if r.split_seconds is not None]
    names = [k for k in splits[0] if k != "step"] if splits else []
    steps = [r.step_seconds for r in records]
    result = summarize_steps(steps, tokens)
    return {
        **result,
        "mfu": run.watch.meter.mfu(result["tokens_per_second"]),
        "model_flops": run.watch.meter.model_flops(result["tokens_per_second"]),
        "product_flops": product_flops,
        "mfu_convention": run.watch.meter.describe_mfu(),
        "model": run.watch.meter.describe_model(),
        "device": run.watch.meter.device_name,
        "memory_bytes": max(r.memory_bytes for r in timed),
        "seconds": steps,
        "losses": [r.loss for r in records],
        "parameters": parameter_count(config.model),
        "split": {n: statistics.median(s[n] for s in splits) / result["step_seconds"] for n in names},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
