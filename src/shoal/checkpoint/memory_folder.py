"""The fast place of a run's checkpoints: where it is, whether it can be used, and what is left of it after the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from shoal.checkpoint.memory_tier import FolderGroup
from shoal.mesh.mesh import Mesh
from shoal.system.disk import gigabytes, write_whole

KEPT: Final = 2
COPIES: Final = KEPT + 1  # and one that is being written
GENERATIONS_FILE: Final = "memory.json"  # beside the checkpoints that last


def folder_in_memory(place: str, run: Path) -> Path:
    """Of the run whose folder is `run`; another run of that name, elsewhere, has another one."""
    mark = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    return Path(place) / f"{run.name}-{mark}"


def find_folder_group(folder: Path, mesh: Mesh) -> tuple[FolderGroup, str]:
    """
    Which processes see the same under `folder`, which is made; and why it cannot be used, the same on all processes, ""
    where it can. A collective over the world.

    On one machine, or on a disk that all share, these are all; where each machine has its own memory, those of a machine.
    """
    word = mesh.gather_objects(uuid.uuid4().hex)[0]
    tokens, problem = [folder / f".{word}-{rank}" for rank in range(mesh.world_size)], ""
    mine = tokens[mesh.place.rank]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}"
    mesh.barrier()
    seen = [rank for rank, token in enumerate(tokens) if os.path.exists(token)]
    group = FolderGroup.from_visible(mesh.place.rank, mesh.gather_objects(seen or [mesh.place.rank]))
    with contextlib.suppress(OSError):  # all have looked
        mine.unlink(missing_ok=True)
    problem = mesh.first_problem(problem)
    if group is None:
        problem = problem or f"not all who see {folder} see the same there"
    return group or FolderGroup.shared_by_all(mesh.place.rank, mesh.world_size), problem


def lacks_room(folder: Path, own_bytes: int, mesh: Mesh, group: FolderGroup) -> str:
    """
    Why so many bytes of each process, `COPIES` times, do not go into `folder`, the same on all processes; "" where they
    do. A collective over the world.
    """
    sizes, problem = mesh.gather_objects(own_bytes), ""
    if group.is_leader:
        needed = COPIES * sum(sizes[r] for r in group.ranks)
        room = _free(folder) + sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file())
        if room < needed:
            problem = f"{folder} has room for {gigabytes(room)}, and {COPIES} checkpoints take {gigabytes(needed)}"
    return mesh.first_problem(problem)


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


def read_generations(checkpoints: Path) -> dict[str, int | None]:
    """Whose checkpoints in memory are of this run, and up to which step, as `write_generations` left word; none where it did not."""
    try:
        found = json.loads((checkpoints / GENERATIONS_FILE).read_text(encoding="utf-8"))
        return {str(generation): None if last is None else int(last) for generation, last in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_generations(checkpoints: Path, generations: Mapping[str, int | None]) -> None:
    """Where all machines see it; nothing where there are none. Raises `OSError`."""
    if generations:
        write_whole(checkpoints / GENERATIONS_FILE, [json.dumps(generations).encode()])
    else:
        (checkpoints / GENERATIONS_FILE).unlink(missing_ok=True)
