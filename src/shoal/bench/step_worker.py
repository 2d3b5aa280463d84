"""One timed run of shoal's own step: `python -m shoal.bench.step_worker CONFIG ANSWER`, alone or under torchrun."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import torch

from shoal.bench.speed import WARMUP_STEPS, summarize_steps
from shoal.mesh.mesh import open_mesh
from shoal.metrics.products import product_rates
from shoal.models.build import COMPUTE_DTYPES
from shoal.resolve.resolve import read_back
from shoal.run.events import read_json_lines
from shoal.system.signals import StopRequest, die_with_parent
from shoal.training.loop import Run, set_threads

PRODUCT_SECONDS = 1.0


def main(recipe: Path, answer: Path) -> None:
    """Take the steps of `recipe` as `shoal train` does; rank 0 writes what they took."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        run.take_steps()
        product = _product_flops(run)
        if mesh.is_first:
            records = read_json_lines(run.folder.metrics_file)
            answer.write_text(json.dumps(_measured(run, records, product)), encoding="utf-8")
            os.remove(run.folder.metrics_file)


def _product_flops(run: Run) -> float:
    """FLOP/s of a matrix product on all processes at once, in the dtype of the run. A collective over the world."""
    run.mesh.barrier()
    rates = product_rates([COMPUTE_DTYPES[run.config.train.dtype]], run.mesh.device, PRODUCT_SECONDS)
    return float(run.mesh.sum(torch.tensor(rates[0], device=run.mesh.device, dtype=torch.float64)))


def _measured(run: Run, records: list[dict[str, object]], product_flops: float) -> dict[str, object]:
    config = run.config
    tokens = config.train.global_batch * config.data.seq_len
    timed = records[WARMUP_STEPS:]
    splits = [r["split_seconds"] for r in timed if "split_seconds" in r]
    names = [k for k in splits[0] if k != "step"] if splits else []  # type: ignore[attr-defined]
    steps = [float(r["step_seconds"]) for r in records]  # type: ignore[arg-type]
    result = summarize_steps(steps, tokens)
    return {
        **result,
        "mfu": run.meter.mfu(result["tokens_per_second"]),
        "model_flops": run.meter.model_flops(result["tokens_per_second"]),
        "product_flops": product_flops,
        "mfu_convention": run.meter.describe_mfu(),
        "model": run.meter.describe_model(),
        "device": run.meter.device_name,
        "memory_bytes": max(int(r["memory_bytes"]) for r in timed),  # type: ignore[call-overload]
        "split": {n: statistics.median(s[n] for s in splits) / result["step_seconds"] for n in names},  # type: ignore[index]
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
