"""One process of a calibration: `python -m shoal.bench.calibration_worker ANSWER DTYPE SECONDS THREADS`, alone or under torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from shoal.bench.curves import curves
from shoal.bench.small_steps import host_costs, waits
from shoal.config.options import Parallel
from shoal.mesh.mesh import Axis, Mesh, open_mesh
from shoal.models.build import COMPUTE_DTYPES
from shoal.parallel.collectives import gather_single
from shoal.parallel.shared_sum import shared_buffers, sum_shared
from shoal.plan.machine import machine_of
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import WIDTHS, Curve, Rates
from shoal.system import cpu
from shoal.system.signals import die_with_parent

BYTES: Final = (2**10, 2**14, 2**18, 2**22, 2**24)  # that a rank sends in a measured message
LINKS_SHARE: Final = 0.25  # of the seconds, with several processes
STEPS_SHARE: Final = 0.2  # of the seconds, for steps of small models on CPUs
WAITS_SHARE: Final = 0.2  # of the seconds, for steps that several processes on CPUs divide
ROUNDS: Final = (4, 4, 4, 2, 2)  # of each size
TURNS: Final = (8, 8, 8, 3, 2)  # in a round; the time of a small message varies more
LEAST: Final = 1e-6  # seconds of a message


def main(answer: Path, dtype: str, seconds: float, threads: int) -> None:
    """Measure; the first process writes."""
    die_with_parent()
    torch.set_num_threads(threads)
    with open_mesh("auto", 60, Parallel()) as mesh:
        several, is_cpu = mesh.world_size > 1, mesh.device.type == "cpu"
        share = 1 - LINKS_SHARE * several - STEPS_SHARE * is_cpu - WAITS_SHARE * (several and is_cpu)
        found = curves(mesh.device, COMPUTE_DTYPES[dtype], seconds * share)
        mesh.barrier()
        if is_cpu:
            found |= host_costs(_rates(mesh, dtype, found, {}), dtype, seconds * STEPS_SHARE)
        mesh.barrier()
        links = _links(mesh, seconds * LINKS_SHARE) if several else {}
        stretch, waiting = 1.0, dict[str, Curve]()
        if several and is_cpu:
            stretch, waiting = waits(mesh, _rates(mesh, dtype, found, links), dtype, seconds * WAITS_SHARE)
        device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else cpu.model_name()
        if mesh.is_first:
            said = {
                "device": device.removeprefix("NVIDIA "), "torch": torch.__version__, "processes": mesh.world_size, "threads": threads,
                "curves": {kind: dataclasses.asdict(curve) for kind, curve in found.items()},
                "links": {kind: dataclasses.asdict(curve) for kind, curve in links.items()},
                "waits": {axis: dataclasses.asdict(curve) for axis, curve in waiting.items()}, "stretch": stretch,
            }  # fmt: skip
            answer.write_text(json.dumps(said), encoding="utf-8")
        mesh.barrier()


def _rates(mesh: Mesh, dtype: str, curves: Mapping[Kind, Curve], links: Mapping[str, Curve]) -> Rates:
    """Return what is measured so far of these processes, which share the CPUs."""
    machine = machine_of("", mesh.world_size, 1, 0, cuda=False)
    assert machine is not None
    return Rates(machine, WIDTHS[dtype], curves, links)


def _links(mesh: Mesh, seconds: float) -> dict[str, Curve]:
    """
    Return the seconds of each collective by the size of the groups, which all send at the same time, and the bytes that a rank sends.

    On CPUs it is what work takes longer with messages between, in a row without a pause, as in a step: gloo's threads wait for a
    core that a computing thread has just had, and processes for each other. Messages one after another took half as long with two
    processes on two cores; messages after a large product, with the wait for all to end it, a third longer with four.
    """
    sizes = [size for size in range(2, mesh.world_size + 1) if mesh.world_size % size == 0]
    found = dict[str, list[float]]()
    for size in sizes:
        for kind, times in _in_groups(mesh, size, seconds / len(sizes)).items():
            found.setdefault(kind, []).extend(times)
    return {kind: Curve([sizes, BYTES], times, powers=(0, 1)) for kind, times in found.items()}


def _in_groups(mesh: Mesh, size: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of collectives in groups of `size` processes, by `BYTES`. After `seconds`, each has one round."""
    measured = dict[str, list[float]]()
    group, _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
    work = _work_between(mesh.device)
    end, late = time.perf_counter() + seconds, False
    for sent, rounds, turns in zip(BYTES, ROUNDS, TURNS, strict=True):
        collectives = _collectives(group, mesh.device, sent) | _shared(
            Axis(size, dist.get_rank(group), group), mesh, sent
        )
        for run in collectives.values():
            run()
        found = dict[str, list[float]]()
        for _ in range(1 if late else rounds):
            alone = _seconds_of(mesh, turns, work)
            for kind, run in collectives.items():
                found.setdefault(kind, []).append(_seconds_of(mesh, turns, work, run) - alone)
        for kind, differences in found.items():
            measured.setdefault(kind, []).append(max(LEAST, statistics.median(differences)))
        late = float(mesh.sum(torch.tensor(float(time.perf_counter() > end), device=mesh.device))) > 0
    return measured


def _shared(axis: Axis, mesh: Mesh, sent: int) -> dict[str, Callable[[], object]]:
    """Return the sum through memory that processes share, where they can, such that as many bytes are written as a ring sends."""
    if mesh.device.type != "cpu":
        return {}
    count = max(1, sent // 4 // (axis.size - 1)) * axis.size // 2
    buffers = shared_buffers(-(-count // axis.size) * axis.size, axis)
    return {} if buffers is None else {"shared_sum": lambda: sum_shared(buffers, axis)}


def _work_between(device: torch.device) -> Callable[[], object]:
    """Return what a small model's step does between two messages on a CPU, some operations of 1 ms in all; nothing on a GPU."""
    matrix, elements = torch.ones(256, 256), torch.ones(2**18)

    def work() -> None:
        for _ in range(2):
            torch.mm(matrix, matrix)
            for _ in range(3):
                elements.mul(1.0)

    return torch.cuda.synchronize if device.type == "cuda" else work


def _seconds_of(mesh: Mesh, turns: int, *functions: Callable[[], object]) -> float:
    """Return the seconds of calling the functions in turn, of all processes at the same time."""
    mesh.barrier()
    begun = time.perf_counter()
    for _ in range(turns):
        for function in functions:
            function()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    mesh.barrier()
    return (time.perf_counter() - begun) / turns


def _collectives(group: dist.ProcessGroup, device: torch.device, sent: int) -> dict[str, Callable[[], object]]:
    """Return each collective, such that a rank of a ring sends `sent` bytes."""
    ranks, here = dist.get_world_size(group), dist.get_rank(group)
    part = max(1, sent // 4 // (ranks - 1))  # float32 elements of each rank's share
    whole, own = torch.ones(ranks * part, device=device), torch.ones(part, device=device)
    got, half = torch.empty_like(whole), torch.ones(max(ranks, ranks * part // 2), device=device)
    neighbors = torch.ones(max(1, sent // 4), device=device), torch.empty(max(1, sent // 4), device=device)

    def exchange() -> None:
        works = [
            dist.isend(neighbors[0], group=group, group_dst=(here + 1) % ranks),
            dist.irecv(neighbors[1], group=group, group_src=(here - 1) % ranks),
        ]
        for work in works:
            assert work is not None
            work.wait()

    return {
        "all_gather": lambda: gather_single(got, own, group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(half, group=group),
        "all_to_all": lambda: dist.all_to_all_single(got, whole, group=group),
        "send": exchange,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)
