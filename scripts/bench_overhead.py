"""
Measure the cost of fault tolerance without faults: the loop's full step compared with a bare one, alternating.

    python scripts/bench_overhead.py recipes/quickstart.yaml --processes 2 --pairs 100

bare: take a batch, call `train_step` without guard and votes, read the step's results. whole: the step of `training/loop.py`,
with heartbeats, guard, votes, ledger, goodput, straggler detection and metrics. Both use the same model and data. Time
is the CPU time of the training thread, which other programs on the machine hardly affect.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from shoal.config.options import Config
from shoal.elastic.heartbeat import FOLDER
from shoal.mesh.mesh import open_mesh
from shoal.mesh.place import LOCKED_BY
from shoal.resolve.resolve import resolve
from shoal.system.signals import StopRequest
from shoal.training.loop import record, something_is_due, take_step
from shoal.training.run import Run
from shoal.training.step import train_step


def _bare(run: Run) -> None:
    stats = train_step(
        run.runnable,
        run.state,
        run.loader.next_step(),
        step=run.state.step + 1,
        lr=1e-4,
        clip_norm=run.config.optim.clip_norm,
    )
    stats.read()
    run.state.step, run.state.position = run.state.step + 1, run.loader.position


def _whole(run: Run) -> None:
    record(run, take_step(run))
    something_is_due(run)


def _work(rank: int, options: argparse.Namespace, config: Config) -> None:
    place = {"RANK": rank, "WORLD_SIZE": options.processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": options.processes}
    os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    os.environ[LOCKED_BY] = str(os.getppid())
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {"bare": [], "whole": []}
    with open_mesh("cpu", 600.0, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        run.files.begin(run.header, 0, 0, {}, at_end=False)
        run.files.clock.begin(0)
        run.watch.meter.start()
        for pair in range(options.pairs + 5):
            for name, step in (("bare", _bare), ("whole", _whole))[:: 1 if pair % 2 else -1]:
                mesh.barrier()
                begun = time.thread_time()
                step(run)
                took[name].append(time.thread_time() - begun)
        run.close()
    if rank == 0:
        middle = {name: statistics.median(each[5:]) for name, each in took.items()}
        ratios = sorted(w / b - 1 for b, w in zip(took["bare"][5:], took["whole"][5:], strict=True))
        more = statistics.median(ratios)
        quarter = len(ratios) // 4
        print(
            f"{options.processes} processes: bare step {middle['bare'] * 1e3:.1f} ms, whole {middle['whole'] * 1e3:.1f} ms; "
            f"median of pairs {more:+.2%} (middle half {ratios[quarter]:+.2%} to {ratios[-quarter - 1]:+.2%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--port", type=int, default=29578)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shoal-overhead-"))
    os.environ[FOLDER] = str(folder)
    config = resolve(options.recipe, []).config
    steps = 2 * (options.pairs + 10)
    config = config.replace("launch", name="overhead", runs=str(folder)).replace("train", steps=steps, eval_every=0)
    config = config.replace("checkpoint", every=0)
    try:
        mp.spawn(_work, args=(options, config), nprocs=options.processes)  # type: ignore[attr-defined]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
