"""The folder of `checkpoint.fast`, usually in memory: its path, the ranks that share it, its space, and its removal."""

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
COPIES: Final = KEPT + 1  # the checkpoints kept, and the one being written
GENERATIONS_FILE: Final = "memory.json"  # in the folder of the checkpoints on disk


def folder_in_memory(place: str, run: Path) -> Path:
    """Return the folder under `place` for the run in `run`. Runs of the same name in different folders get different folders."""
    mark = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    return Path(place) / f"{run.name}-{mark}"


def find_folder_group(folder: Path, mesh: Mesh) -> tuple[FolderGroup, str]:
    """
    Create `folder`; return the ranks that see the same folder, and the reason why it cannot be used ("" if it can).

    On one machine, or on a shared disk, the group is all ranks. If each machine has a folder of its own, usually in memory, the
    group is the ranks of this machine. The reason is the same on all ranks. A collective over the world.
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
    with contextlib.suppress(OSError):  # all ranks have looked
        mine.unlink(missing_ok=True)
    problem = mesh.first_problem(problem)
    if group is None:
        problem = problem or f"the ranks disagree about who shares {folder}"
    return group or FolderGroup.shared_by_all(mesh.place.rank, mesh.world_size), problem


def lacks_room(folder: Path, own_bytes: int, mesh: Mesh, group: FolderGroup) -> str:
    """
    Return why `folder` lacks space for `COPIES` checkpoints; "" if it has enough.

    own_bytes: the bytes that this rank writes for each checkpoint. The answer is the same on all ranks. A collective over the
    world.
    """
    sizes, problem = mesh.gather_objects(own_bytes), ""
    if group.is_leader:
        needed = COPIES * sum(sizes[r] for r in group.ranks)
        room = _free(folder) + sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file())
        if room < needed:
            problem = f"{folder} has room for {gigabytes(room)}, but {COPIES} checkpoints take {gigabytes(needed)}"
    return mesh.first_problem(problem)


def _free(folder: Path) -> int:
    """Return the free bytes; in tmpfs at most the free memory, beyond which the kernel kills processes."""
    free = shutil.disk_usage(folder).free
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    here = next((mounts[p] for p in (folder.resolve(), *folder.resolve().parents) if p in mounts), "")
    return min(free, psutil.virtual_memory().available) if here in ("tmpfs", "ramfs") else free


def clear(folder: Path) -> None:
    """Remove `folder`, and its parent if that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def read_generations(checkpoints: Path) -> dict[str, int | None]:
    """Read which generations' in-memory checkpoints belong to this run, and up to which step; {} if there is no valid record."""
    try:
        found = json.loads((checkpoints / GENERATIONS_FILE).read_text(encoding="utf-8"))
        return {str(generation): None if last is None else int(last) for generation, last in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_generations(checkpoints: Path, generations: Mapping[str, int | None]) -> None:
    """Record `generations` on the disk that all machines see; remove the record if there are none. Raises `OSError` on failure."""
    if generations:
        write_whole(checkpoints / GENERATIONS_FILE, [json.dumps(generations).encode()])
    else:
        (checkpoints / GENERATIONS_FILE).unlink(missing_ok=True)
