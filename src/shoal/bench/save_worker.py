"""Times checkpoints: `python -m shoal.bench.save_worker CONFIG ANSWER TURNS`, alone or under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from shoal.bench.environment import facts
from shoal.bench.worker_process import answering
from shoal.checkpoint.store import CheckpointStore, Keep
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.mesh.region import Part
from shoal.resolve.resolve import read_back
from shoal.system.signals import StopRequest, die_with_parent
from shoal.training.loop import set_threads, take_step
from shoal.training.run import Run


def main(recipe: Path, answer: Path, turns: int) -> None:
    """Save the state of a run after a step, again and again; rank 0 writes the seconds of each way, one a turn."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    timeout = config.launch.timeout_seconds
    with answering(answer), open_mesh(config.train.device, timeout, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        take_step(run)
        parts = run.state.tensors()
        mine = _owned(mesh, parts)
        sizes = mesh.gather_objects(sum(tensor.nbytes for tensor in mine.values()))
        seconds = _turns(mesh, run.folder.path, parts, mine, turns)
        if mesh.is_first:
            found = {
                "seconds": seconds, "state_bytes": sum(sizes),
                "model": run.watch.meter.describe_model(), "dtype": run.config.train.dtype, "about": facts(mesh.device),
            }  # fmt: skip
            answer.write_text(json.dumps(found), encoding="utf-8")
        mesh.barrier()


def _turns(
    mesh: Mesh, folder: Path, parts: Mapping[str, Part], mine: Mapping[str, torch.Tensor], turns: int
) -> dict[str, list[float]]:
    """
    Return the seconds of each way to save, from a barrier until the slowest process is done. A collective over the world.

    mine: the tensors that this process writes with torch.save.
    """
    store = CheckpointStore(folder / "ours", mesh, keep=Keep(2, best=False))
    theirs = folder / f"theirs-{mesh.place.rank}.pt"
    found: dict[str, list[float]] = {}

    def time_it(name: str, work: Callable[[], object]) -> None:
        mesh.barrier()
        begun = time.perf_counter()
        work()
        mesh.barrier()
        found.setdefault(name, []).append(time.perf_counter() - begun)

    for turn in range(turns + 1):  # the first turn, not counted, allocates the memory for copies
        time_it("wait of a step", lambda step=2 * turn: store.begin(parts, _state(step)))  # type: ignore[misc]
        waited = found["wait of a step"][-1]
        time_it("in the background", lambda: _check(store))
        found["in the background"][-1] += waited
        time_it("in the foreground", lambda step=2 * turn + 1: _save(store, parts, step))  # type: ignore[misc]
        time_it("torch.save, flushed", lambda: _torch_save(mine, theirs, flushed=True))
        time_it("torch.save", lambda: _torch_save(mine, theirs, flushed=False))
    shutil.rmtree(folder / "ours", ignore_errors=True)
    return {name: each[1:] for name, each in found.items()}


def _state(step: int) -> dict[str, int | None]:
    return {"step": step, "val_loss": None}


def _check(store: CheckpointStore) -> None:
    """Wait for the save that was begun. Raises `CheckpointError` if it failed."""
    outcome = store.finish()
    if outcome is not None and not outcome.ok:
        raise CheckpointError(f"the benchmark's checkpoint was not saved: {outcome.problem}; choose another --disk")


def _save(store: CheckpointStore, parts: Mapping[str, Part], step: int) -> None:
    outcome = store.save(parts, _state(step))
    if not outcome.ok:
        raise CheckpointError(f"the benchmark's checkpoint was not saved: {outcome.problem}; choose another --disk")


def _owned(mesh: Mesh, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """Return the tensors that no rank before this one has too: what a plain save of every rank's own part would write."""
    held = mesh.gather_objects({name: part.region for name, part in parts.items()})
    before = held[: mesh.place.rank]
    return {
        name: part.tensor for name, part in parts.items() if not any(each.get(name) == part.region for each in before)
    }


def _torch_save(tensors: Mapping[str, torch.Tensor], path: Path, *, flushed: bool) -> None:
    """Write a pickle, which nothing reads: the peer of the comparison."""
    if not tensors:
        return
    with path.open("wb") as file:
        torch.save(dict(tensors), file)
        if flushed:
            file.flush()
            os.fsync(file.fileno())
    path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)
