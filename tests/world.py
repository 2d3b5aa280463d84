"""
Real processes on gloo, kept for the whole pytest session: importing torch takes seconds, a test takes little.

    results = World(2).run(function, *args)     # function(mesh, *args) on every rank; a list, by rank

A world without work is stopped (SIGSTOP): each process group has a thread that polls every 10 ms, and the idle worlds' hundreds of
groups took a third of two cores.

`function` must be importable (a module's function). If it fails on any rank, `run` raises. A world in which a function failed
or hung ends, because processes may be left in the middle of a collective, and `Worlds` starts another for the next test.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests import warm

# Time limit of a call; the time limit of a collective is half of it. Compiling on a busy machine is slow.
PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "150"))
FOLLOW_SECONDS = 10.0  # time for the other ranks to answer after one has failed, since they may wait for it

_axes: dict[tuple[Any, ...], Any] = {}  # this worker's axes, by names and groups


class World:
    """`size` processes that share a gloo group; `alive` until one of them fails, hangs or dies."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "shoal.training.loop"])
        store = tempfile.mktemp(prefix="shoal-test-store-")
        self.size, self.alive, self.patience_seconds = size, True, PATIENCE_SECONDS
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of a process is seen
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)  # before multiprocessing's own, whose SIGTERM a stopped process does not get

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """
        Call `function(mesh, *args)` on every rank; return the results by rank.

        Raises AssertionError if a rank fails, with its traceback, or TimeoutError if ranks do not answer in time.
        """
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            os.kill(process.pid, signal.SIGCONT)
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + self.patience_seconds
        while len(answers) < self.size:
            ready: Any = wait([p for rank, p in enumerate(self._pipes) if rank not in answers], end - time.monotonic())
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    fine, value = False, "it died"
                answers[self._pipes.index(pipe)] = fine, value
                if not fine:
                    end = min(end, time.monotonic() + FOLLOW_SECONDS)
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in sorted(answers.items()) if not fine]
        silent = [rank for rank in range(self.size) if rank not in answers]
        if failed or silent:
            self.close()
            hung = f"ranks {silent} gave no answer" if silent else ""
            raise AssertionError("\n".join([*failed, hung])) if failed else TimeoutError(hung)
        for process in self._processes:
            os.kill(process.pid, signal.SIGSTOP)
        return [answers[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()


class Worlds(dict[int, World]):
    """Worlds by size. Each is started when first requested, and again if it has ended since."""

    def __getitem__(self, size: int) -> World:
        if size not in self or not super().__getitem__(size).alive:
            self[size] = World(size)
        return super().__getitem__(size)

    def close(self, *, but: tuple[int, ...] = ()) -> None:
        """Close all worlds but those of these sizes."""
        for size in [size for size in self if size not in but]:
            self.pop(size).close()


def laid_out(mesh: Any, **sizes: int) -> Any:
    """
    Return, in a worker, its mesh with these axes (dp_shard=2, tp=2, ...).

    Call it on every rank in the same order: creating the process groups of new axes is a collective over the world.
    """
    from shoal.config.layout import Layout
    from shoal.mesh.mesh import Axis, Mesh

    class Shared(Mesh):
        """A mesh that reuses axes of earlier meshes with the same groups: a group takes time to create, and keeps a thread."""

        def _open(self, axes: tuple[str, ...]) -> Axis:
            key = (axes, *map(tuple, self.layout.groups(*axes)))
            if key not in _axes:
                _axes[key] = super()._open(axes)
            axis: Axis = _axes[key]
            return axis

    layout = Layout(**sizes)
    assert layout.world_size == mesh.world_size
    return Shared(mesh.place, mesh.device, layout)


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from shoal.mesh.mesh import Mesh
    from shoal.mesh.place import Place

    if warm.LINUX:
        warm.die_with_parent()  # a stopped process does not see that its pipe ends
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
