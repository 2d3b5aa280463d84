"""The fast place of a run's checkpoints: where it is, whether it can be used, and what is left of it after the run."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from pathlib import Path
from typing import Final

import psutil

from shoal.disk import gigabytes
from shoal.parallel.mesh import Mesh

KEPT: Final = 2
COPIES: Final = KEPT + 1  # and one that is being written


def fast_folder(place: str, run: Path) -> Path:
    """Of the run whose folder is `run`; another run of that name, elsewhere, has another one."""
    mark = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    return Path(place) / f"{run.name}-{mark}"


def unusable(folder: Path, mesh: Mesh) -> str:
    """
    Why `folder` cannot be used, the same on all processes; "" where it can. A collective over the world.

    All processes must see what the others write there: one that has died left nothing else behind.
    """
    word = mesh.gather_objects(uuid.uuid4().hex)[0]
    token, problem = folder / f".{word}", ""
    if mesh.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror}"
    mesh.barrier()
    there = mesh.gather_objects(token.exists())
    if mesh.is_first:
        with contextlib.suppress(OSError):
            token.unlink(missing_ok=True)
    if blind := [rank for rank, sees in enumerate(there) if not sees]:
        problem = problem or f"rank {blind[0]} does not see what rank 0 writes to {folder}: it is on another machine"
    return str(mesh.gather_objects(problem)[0])


def lacks_room(folder: Path, own_bytes: int, mesh: Mesh) -> str:
    """
    Why so many bytes of each process, `COPIES` times, do not go into `folder`, the same on all processes; "" where they
    do. A collective over the world.
    """
    needed = COPIES * sum(mesh.gather_objects(own_bytes))
    there = sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file()) if mesh.is_first else 0
    room = (_free(folder) if mesh.is_first else 0) + there
    problem = f"{folder} has room for {gigabytes(room)}, and {COPIES} checkpoints take {gigabytes(needed)}"
    return str(mesh.gather_objects(problem if room < needed else "")[0])


def _free(folder: Path) -> int:
    """Bytes; in memory no more than the machine has left: it would kill a process, not refuse to write."""
    free = shutil.disk_usage(folder).free
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    here = next((mounts[p] for p in (folder.resolve(), *folder.resolve().parents) if p in mounts), "")
    return min(free, psutil.virtual_memory().available) if here in ("tmpfs", "ramfs") else free


def clear(folder: Path) -> None:
    """Nothing of it is left, nor of an empty folder around it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
