"""Times one run of shoal's step: `python -m shoal.bench.step_worker CONFIG ANSWER`, alone or under torchrun."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from shoal.bench.environment import facts
from shoal.bench.steps import summarize_steps
from shoal.bench.trial import WARMUP_STEPS
from shoal.bench.worker_process import answering
from shoal.config.options import Config
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.metrics.memory import peak_bytes
from shoal.metrics.products import product_rates
from shoal.models.build import COMPUTE_DTYPES
from shoal.plan.estimate import Attention, flops_per_token, parameter_count, why_no_flops
from shoal.resolve.resolve import read_back
from shoal.run.records import StepRecord, read_metrics
from shoal.system.signals import StopRequest, die_with_parent
from shoal.training.loop import set_threads, take_steps
from shoal.training.run import Run

Measure = Callable[[Config, Mesh, StopRequest], Mapping[str, object]]
PRODUCT_SECONDS = 1.0
CONVENTIONS: Final[dict[Attention, str]] = {"causal": "{}", "full": "{}_full"}  # of MFU: the names of its figures


def main(recipe: Path, answer: Path, measure: Measure) -> None:
    """Call `measure` with the config in `recipe` and a mesh; rank 0 writes what it returns."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    timeout = config.launch.timeout_seconds
    with answering(answer), open_mesh(config.train.device, timeout, config.parallel) as mesh:
        found = measure(config, mesh, StopRequest())
        if mesh.is_first:
            answer.write_text(json.dumps(found), encoding="utf-8")
        mesh.barrier()


def measure(config: Config, mesh: Mesh, stop: StopRequest) -> dict[str, object]:
    """Take steps as `shoal train` does; return the measurements, on the first rank. A collective over the world."""
    run = Run.open(config, mesh, stop)
    take_steps(run)
    memory = mesh.gather_objects(peak_bytes(mesh.device))
    product = _product_flops(run)
    run.close()
    if not mesh.is_first:
        return {}
    records = read_metrics(run.folder.metrics_file).steps
    os.remove(run.folder.metrics_file)  # the same config may be timed again
    return _measured(run, records, product, memory)


def _product_flops(run: Run) -> float:
    """Return the FLOP/s of a matrix product on all processes together, in the run's dtype. A collective over the world."""
    run.mesh.barrier()
    rates = product_rates([COMPUTE_DTYPES[run.config.train.dtype]], run.mesh.device, PRODUCT_SECONDS)
    return float(run.mesh.sum(torch.tensor(rates[0], device=run.mesh.device, dtype=torch.float64)))


def _measured(
    run: Run, records: Sequence[StepRecord], product_flops: float, memory_bytes: Sequence[int]
) -> dict[str, object]:
    """Return the measurements. memory_bytes: the peak of each rank, before the matrix product."""
    config, meter = run.config, run.watch.meter
    timed = records[WARMUP_STEPS:]
    splits = [r.split_seconds for r in timed if r.split_seconds is not None]
    names = [k for k in splits[0] if k != "step"] if splits else []
    result = summarize_steps([r.step_seconds for r in records], config.train.global_batch * config.data.seq_len)
    return {
        **result,
        **_shares(run, result["tokens_per_second"], product_flops),
        "model_flops": meter.model_flops(result["tokens_per_second"]),
        "product_flops": product_flops,
        "mfu_convention": meter.describe_mfu(),
        "model": meter.describe_model(),
        "device": meter.device_name,
        "dtype": config.train.dtype,
        "loss": records[-1].loss,
        "seconds": [r.step_seconds for r in records],
        "losses": [r.loss for r in records],
        "parameters": parameter_count(config.model),
        "memory_bytes": max(memory_bytes),
        "memory_by_rank": memory_bytes,
        "split": {n: statistics.median(s[n] for s in splits) / result["step_seconds"] for n in names},
        "about": facts(run.mesh.device),
    }


def _shares(run: Run, rate: float, product_flops: float) -> dict[str, float]:
    """Return the model's FLOP/s relative to the peak (MFU) and to a matrix product, by causal and by full attention, if known."""
    config, found = run.config, dict[str, float]()
    if why_no_flops(config.model, config.data.seq_len):
        return found
    for attention, name in CONVENTIONS.items():
        flops = rate * flops_per_token(config.model, config.data.seq_len, attention)
        found |= {name.format("of_product"): flops / product_flops} if product_flops else {}
        found |= {name.format("mfu"): flops / peak} if (peak := run.watch.meter.peak_flops) else {}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), measure)
    sys.stdout.flush()
    os._exit(0)
