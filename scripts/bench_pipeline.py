"""
Measure the idle time of pipeline processes and compare it with the pipeline bubble's formula.

    python scripts/bench_pipeline.py [--processes 2] [--micro-batches 8] [--steps 12] [--schedules 1f1b,zbv]

Idle time is the step's wall time, from a barrier to the end of the last process, minus a process's time in forward, loss and
backward; the formula is `bubble_fraction` in `config/schedules.py`. Each process has one thread and needs an idle core: other
programs' load counts as idle time. The table shows the median step and the fastest one, which was disturbed least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GLOO_SOCKET_IFNAME="lo")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from shoal.config.options import Model
from shoal.config.schedules import Schedule, bubble_fraction, stages_per_rank
from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis
from shoal.models.build import build_model, initialize
from shoal.models.family import LanguageModel
from shoal.models.loss import linear_cross_entropy_sum
from shoal.parallel.pipeline import Pipeline, cut

ALL: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")
WARM_UP = 2
busy_seconds: dict[str, float] = {}


def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        answer = function(*args, **kwargs)
        busy_seconds[what] = busy_seconds.get(what, 0.0) + time.perf_counter() - start
        return answer

    return run


@torch.no_grad()
def _zero(stages: dict[int, LanguageModel]) -> None:
    for stage in stages.values():
        for p in stage.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()


def measure(axis: Axis, schedule: Schedule, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return each step's wall seconds (equal on all ranks) and this process's busy seconds. Runs collectives over the world."""
    shape = Model(
        family="llama", dim=args.dim, num_layers=args.layers, num_heads=4, vocab_size=512, max_seq_len=args.seq_len,
        tie_embeddings=False,
    )  # fmt: skip
    held = stages_per_rank(schedule, None)
    stages = cut(build_model(shape, compute_dtype=torch.float32), axis, schedule, held)
    for stage in stages.values():
        initialize(stage, 0, "cpu")

    def loss(last: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_sum(hidden, last.head_weight(), labels)

    hidden_shape = (args.batch, args.seq_len, args.dim)
    device = torch.device("cpu")
    pipeline = Pipeline(
        stages, axis, schedule, args.micro_batches, device, hidden_shape, torch.float32, timed("loss", loss)
    )
    tokens = torch.randint(512, (args.batch, args.seq_len + 1), generator=torch.Generator().manual_seed(0))
    places = torch.arange(args.seq_len).expand(args.batch, -1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], places, None, (), tokens[:, 1:].numel())
    steps = []
    for _ in range(WARM_UP + args.steps):
        _zero(stages)
        busy_seconds.clear()
        dist.barrier()
        start = time.perf_counter()
        pipeline.forward_backward([batch] * args.micro_batches)
        wall = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        steps.append((wall.item(), sum(busy_seconds.values())))
    return steps[WARM_UP:]


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes, timeout=timedelta(seconds=60)
    )
    for name, what in (
        ("forward_one_chunk", "forward"),
        ("backward_one_chunk", "backward"),
        ("backward_weight_one_chunk", "weight"),
    ):
        setattr(PipelineStage, name, timed(what, getattr(PipelineStage, name)))
    axis = Axis(args.processes, rank, dist.group.WORLD)
    if rank == 0:
        print(
            f"{args.processes} processes, {args.layers} blocks of width {args.dim}, {args.micro_batches} micro-batches of "
            f"{args.batch} x {args.seq_len}, float32, {args.steps} steps\n\n"
            "| schedule | formula | median step: seconds | idle, per process | idle / formula "
            "| fastest step: seconds | idle, per process | idle / formula |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
    for schedule in args.schedules:
        steps = measure(axis, schedule, args)
        fastest = min(range(len(steps)), key=lambda i: steps[i][0])  # the same step on all ranks: wall times are equal
        mine = torch.tensor(
            [
                statistics.median(wall for wall, _ in steps),
                statistics.median(1 - busy / wall for wall, busy in steps),
                steps[fastest][0],
                1 - steps[fastest][1] / steps[fastest][0],
            ],
            dtype=torch.float64,
        )
        table = [torch.empty_like(mine) for _ in range(axis.size)]
        dist.all_gather(table, mine)
        if rank == 0:
            formula = bubble_fraction(schedule, axis.size, stages_per_rank(schedule, None), args.micro_batches)
            cells = []
            for seconds, idle in ((0, 1), (2, 3)):
                shares = [row[idle].item() for row in table]
                cells += [f"{mine[seconds]:.3f}", ", ".join(f"{share:.3f}" for share in shares)]
                cells.append(f"{statistics.mean(shares) / formula:.2f}")
            print(f"| {schedule} | {formula:.3f} | {' | '.join(cells)} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive Python's shutdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--schedules", type=lambda text: text.split(","), default=ALL)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (str(Path(folder, "store")), args), nprocs=args.processes)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
