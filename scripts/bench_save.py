"""
Measure the cost of a checkpoint and compare it with torch.save of the same state, alternating.

    python scripts/bench_save.py --megabytes 500 --processes 2 --turns 5

stall: the time that a step waits if the checkpoint is written in the background. save: the time until the checkpoint is
flushed, hashed and, in the background, read back. torch.save writes the same tensors from one process without flushing and
hashing them; the row "torch.save, flushed" adds an fsync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from shoal.checkpoint.store import CheckpointStore, Keep
from shoal.config.options import Parallel
from shoal.launch.torchrun import worker_environment
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.mesh.region import Part
from shoal.system.cpu import count_cores

TENSORS = 60  # number of tensors in the state, as in a small model with two optimizer moments


def _tensors(megabytes: int) -> dict[str, torch.Tensor]:
    rows = megabytes * 1_000_000 // 4 // TENSORS // 1024
    return {f"model.{n}": torch.full((rows, 1024), float(n)) for n in range(TENSORS)}


def _seconds(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def _torch_save(tensors: dict[str, torch.Tensor], path: Path, *, flushed: bool) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        if flushed:
            file.flush()
            os.fsync(file.fileno())
    path.unlink()


def _turns(mesh: Mesh, folder: Path, tensors: dict[str, torch.Tensor], turns: int) -> dict[str, list[float]]:
    store = CheckpointStore(folder / "ours", mesh, keep=Keep(2, best=False))
    parts = {name: Part.whole(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for turn in range(turns + 1):  # the first turn, not counted, allocates the memory for copies
        mesh.barrier()
        begun = time.perf_counter()
        store.begin(parts, {"step": turn, "val_loss": None})
        note("stall", time.perf_counter() - begun)
        outcome = store.finish()
        assert outcome is not None
        assert outcome.ok, outcome.problem
        mesh.barrier()
        note("save in the background", time.perf_counter() - begun)
        begun = time.perf_counter()
        outcome = store.save(parts, {"step": turns + 1 + turn, "val_loss": None})
        assert outcome.ok, outcome.problem
        mesh.barrier()
        note("save in the foreground", time.perf_counter() - begun)
        if mesh.is_first:
            note("torch.save", _seconds(lambda: _torch_save(tensors, folder / "theirs.pt", flushed=False)))
            note("torch.save, flushed", _seconds(lambda: _torch_save(tensors, folder / "theirs.pt", flushed=True)))
        mesh.barrier()
    return {name: each[1:] for name, each in found.items()}


def _work(rank: int, options: argparse.Namespace, folder: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": options.processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": options.processes}
    os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    torch.set_num_threads(max(1, count_cores() // options.processes))  # like the launcher
    with open_mesh("cpu", 60.0, Parallel()) as mesh:
        found = _turns(mesh, folder, _tensors(options.megabytes), options.turns)
        if mesh.is_first:
            theirs = statistics.median(found["torch.save"])
            for name, seconds in found.items():
                middle = statistics.median(seconds)
                print(
                    f"{name:24} {middle:7.3f} s   {middle / theirs:5.2f} of torch.save   {min(seconds):.3f} to {max(seconds):.3f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--port", type=int, default=29577)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="folder on the disk to measure")
    options = parser.parse_args()
    os.environ |= worker_environment(1)
    options.folder.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="save-", dir=options.folder))
    try:
        print(f"{options.megabytes} MB, {options.processes} processes, medians of {options.turns} turns", flush=True)
        mp.spawn(_work, args=(options, folder), nprocs=options.processes)  # type: ignore[attr-defined]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
