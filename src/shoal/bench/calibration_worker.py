"""One process of a calibration: `python -m shoal.bench.calibration_worker ANSWER DTYPE SECONDS THREADS`, alone or under torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from shoal.bench.curves import curves
from shoal.config.options import Parallel
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.models.build import COMPUTE_DTYPES
from shoal.parallel.collectives import gather_single
from shoal.plan.speed.rates import Curve
from shoal.system import cpu
from shoal.system.signals import die_with_parent

BYTES: Final = (2**10, 2**14, 2**18, 2**22, 2**24)  # that a rank sends in a measured message
LINKS_SHARE: Final = 0.25  # of the seconds, with several processes
TURNS: Final = 5


def main(answer: Path, dtype: str, seconds: float, threads: int) -> None:
    """Measure; the first process writes."""
    die_with_parent()
    torch.set_num_threads(threads)
    with open_mesh("auto", 60, Parallel()) as mesh:
        several = mesh.world_size > 1
        found = curves(mesh.device, COMPUTE_DTYPES[dtype], seconds * (1 - LINKS_SHARE * several))
        mesh.barrier()
        links = _links(mesh, seconds * LINKS_SHARE) if several else {}
        device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else cpu.model_name()
        if mesh.is_first:
            said = {
                "device": device.removeprefix("NVIDIA "), "torch": torch.__version__, "processes": mesh.world_size, "threads": threads,
                "curves": {kind: dataclasses.asdict(curve) for kind, curve in found.items()},
                "links": {kind: dataclasses.asdict(curve) for kind, curve in links.items()},
            }  # fmt: skip
            answer.write_text(json.dumps(said), encoding="utf-8")
        mesh.barrier()


def _links(mesh: Mesh, seconds: float) -> dict[str, Curve]:
    """
    Return the seconds of each collective over all processes, by the bytes that a rank sends if it is a ring.

    On CPUs each follows a product, as in a step: gloo's threads then wait for a core that a computing thread has just had, which
    took 3 ms where messages one after another took 0.6 (two processes on two cores).
    """
    measured = dict[str, list[float]]()
    matrix = torch.ones(512, 512)
    end = time.perf_counter() + seconds
    for size in BYTES:
        for kind, run in _collectives(mesh, size).items():
            run()
            times = []
            for _ in range(TURNS):
                mesh.barrier()
                if mesh.device.type == "cpu":
                    torch.mm(matrix, matrix)
                begun = time.perf_counter()
                run()
                if mesh.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begun)
            measured.setdefault(kind, []).append(statistics.median(times))
        late = mesh.sum(torch.tensor(float(time.perf_counter() > end), device=mesh.device))
        if float(late) > 0 and size != BYTES[-1]:
            break
    return {kind: Curve([BYTES[: len(times)]], times) for kind, times in measured.items()}


def _collectives(mesh: Mesh, sent: int) -> dict[str, Callable[[], object]]:
    """Return each collective, such that a rank of a ring sends `sent` bytes."""
    ranks, device = mesh.world_size, mesh.device
    part = max(1, sent // 4 // (ranks - 1))  # float32 elements of each rank's share
    whole, own = torch.ones(ranks * part, device=device), torch.ones(part, device=device)
    got, half = torch.empty_like(whole), torch.ones(max(ranks, ranks * part // 2), device=device)
    neighbors = torch.ones(max(1, sent // 4), device=device), torch.empty(max(1, sent // 4), device=device)

    def exchange() -> None:
        right, left = (mesh.place.rank + 1) % ranks, (mesh.place.rank - 1) % ranks
        works = [dist.isend(neighbors[0], right), dist.irecv(neighbors[1], left)]
        for work in works:
            assert work is not None
            work.wait()

    return {
        "all_gather": lambda: gather_single(got, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole),
        "all_reduce": lambda: dist.all_reduce(half),
        "all_to_all": lambda: dist.all_to_all_single(got, whole),
        "send": exchange,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)
