"""
Measure the cost of `train.repro: bitwise`: `python scripts/bench_bitwise.py [--processes 2] [--steps 12] [--micro-batch 4]`.

Each layout trains the same model twice in the same processes, in fast and in bitwise mode, alternating steps so that drift of
the machine's speed affects both. The cost is the median ratio of neighboring steps. Memory is the peak growth of torch's
allocations in a step, the maximum over processes. Each process has one thread and needs an idle core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GLOO_SOCKET_IFNAME="lo")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shoal.bench.environment import describe
from shoal.config.data_options import Data
from shoal.config.layout import find_layout
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.metrics.allocated import allocated_bytes
from shoal.training.assemble import assemble
from shoal.training.step import train_step

SHAPE = Model(family="llama", dim=384, num_layers=6, num_heads=6, vocab_size=257, max_seq_len=256)  # 10.8M parameters
SEQ_LEN, WARM_UP = 256, 2


def layouts(processes: int) -> dict[str, Parallel]:
    return {"ddp": Parallel(), "fsdp": Parallel(dp_shard=processes)}


class Trainer:
    """A model in a layout, trained on random tokens."""

    def __init__(self, mesh: Mesh, parallel: Parallel, repro: Any, args: argparse.Namespace) -> None:
        train = Train(
            steps=1, global_batch=args.tokens // SEQ_LEN, micro_batch=args.micro_batch, dtype=args.dtype, repro=repro
        )
        config = Config(model=SHAPE, data=Data(seq_len=SEQ_LEN), optim=Optim(), train=train, parallel=parallel)
        self.runnable, self.state = assemble(config, mesh, lambda _: None)
        generator = torch.Generator().manual_seed(mesh.place.rank)
        self.batches = []
        for _ in self.runnable.slots[mesh.dp_rank]:
            tokens = torch.randint(257, (args.micro_batch, SEQ_LEN), generator=generator)
            positions = torch.arange(SEQ_LEN).expand_as(tokens)
            self.batches.append(Batch(tokens, tokens, positions, None, (), tokens.numel()))

    def step(self) -> None:
        train_step(self.runnable, self.state, self.batches, step=1, lr=1e-5, clip_norm=1.0)


def seconds(trainer: Trainer) -> float:
    dist.barrier()
    begun = time.perf_counter()
    trainer.step()
    dist.barrier()
    return time.perf_counter() - begun


def grown_bytes(trainer: Trainer) -> int:
    """Return the peak growth of allocated memory in a step, the maximum over processes."""
    worst = torch.tensor(allocated_bytes(trainer.step))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return int(worst)


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes, timeout=timedelta(seconds=300)
    )
    if rank == 0:
        print(
            f"{args.processes} processes of one thread, llama of 10.8M parameters, {args.tokens:,} tokens per step in "
            f"micro-batches of {args.micro_batch} x {SEQ_LEN}, {args.dtype}, {args.steps} pairs of steps\n\n"
            "| layout | fast: s/step | bitwise: s/step | ratio (lowest to highest) | fast: MB per step | bitwise: MB per step |\n"
            "| --- | --- | --- | --- | --- | --- |",
            flush=True,
        )
    for name, parallel in layouts(args.processes).items():
        layout = find_layout(parallel, args.processes)
        assert not isinstance(layout, str)
        mesh = Mesh(Place(rank, args.processes, rank, args.processes), torch.device("cpu"), layout)
        fast, bitwise = Trainer(mesh, parallel, "fast", args), Trainer(mesh, parallel, "bitwise", args)
        pairs = []
        for turn in range(WARM_UP + args.steps):
            first, second = (fast, bitwise) if turn % 2 == 0 else (bitwise, fast)
            found = {id(first): seconds(first), id(second): seconds(second)}
            pairs.append((found[id(fast)], found[id(bitwise)]))
        pairs = pairs[WARM_UP:]
        memory = [grown_bytes(trainer) / 1e6 for trainer in (fast, bitwise)]
        if rank == 0:
            ratios = sorted(b / f for f, b in pairs)
            print(
                f"| {name} | {statistics.median(f for f, _ in pairs):.3f} | {statistics.median(b for _, b in pairs):.3f} "
                f"| {statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive Python's shutdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    print(describe(), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (str(Path(folder, "store")), args), nprocs=args.processes)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
