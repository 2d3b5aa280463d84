"""
Real processes on gloo, kept for the whole test session: importing torch costs seconds, a test costs little.

    results = World(2).run(function, *args)     # function(mesh, *args) on every rank; a list, by rank

`function` must be importable (a module's function). What it raises on any rank is raised here.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

PATIENCE_SECONDS = 150.0  # half of it for a collective: a compiler on a busy machine takes its time

_axes: dict[tuple[Any, ...], Any] = {}  # of this worker, by their groups


class World:
    """`size` processes that share a gloo group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "shoal.train.loop"])
        store = tempfile.mktemp(prefix="shoal-test-store-")
        self.size, self._pipes, self._processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)` on every rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {PATIENCE_SECONDS} s")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Worlds(dict[int, World]):
    """Worlds by size, each started when first asked for."""

    def __missing__(self, size: int) -> World:
        self[size] = World(size)
        return self[size]

    def close(self, *, but: tuple[int, ...] = ()) -> None:
        """Also what waits costs time: a process has a thread for each of its groups, which looks every 10 ms."""
        for size in [size for size in self if size not in but]:
            self.pop(size).close()


def laid_out(mesh: Any, **sizes: int) -> Any:
    """In a worker: its mesh with these axes (dp_shard=2, tp=2, ...). A collective over the world the first time."""
    from shoal.layout import Layout
    from shoal.parallel.mesh import Axis, Mesh

    class Shared(Mesh):
        """Layouts share an axis that has the same groups: each group costs time to make, and a thread from then on."""

        def _open(self, axes: tuple[str, ...]) -> Axis:
            key = (axes, *map(tuple, self.layout.groups(*axes)))
            if key not in _axes:
                _axes[key] = super()._open(axes)
            return _axes[key]

    layout = Layout(**sizes)
    assert layout.world_size == mesh.world_size
    return Shared(mesh.place, mesh.device, layout)


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from shoal.launch.place import Place
    from shoal.parallel.mesh import Mesh

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=PATIENCE_SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    mesh = Mesh(Place(rank, size, rank, size), torch.device("cpu"))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, function(mesh, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
