"""The checkpoint from which all ranks resume, although each may see a different folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shoal.checkpoint.memory_tier import FolderGroup, MemoryTier
from shoal.checkpoint.saved import Saved, damage, discard, folder_of, listed, set_aside
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh
from shoal.system.disk import replace_folder, sync


def choose(folder: Path, mesh: Mesh, group: FolderGroup, memory: MemoryTier | None) -> tuple[Saved | None, list[str]]:
    """
    Return the newest undamaged checkpoint under `folder`, the same on all ranks, and the damage found in newer ones.

    Damaged checkpoints are renamed, or removed if in memory. A checkpoint in memory counts only if it is in the run's history,
    every folder has it from the same save, and each rank can read it, because it has whole tensors or the parts that the rank
    holds now. A collective over the world.
    """
    mine = listed(folder) if group.is_leader else None
    there = [{s.step: s for s in found} for found in mesh.gather_objects(mine) if found is not None]
    problems: list[str] = []
    for theirs in reversed(there[0].values()):
        saved = replace(theirs, folder=folder / theirs.folder.name)
        if any(saved.step not in found or found[saved.step].save_id != saved.save_id for found in there):
            continue
        if memory and not (memory.is_current(saved) and all(mesh.gather_objects(memory.can_read(saved)))):
            continue
        damages = mesh.gather_objects(damage(saved.folder, group.index, len(group.ranks)))
        damaged = next(filter(None, damages), "")
        if not damaged:
            return saved, problems
        problems.append(damaged)
        if group.is_leader and any(damages[rank] for rank in group.ranks):
            discard(saved.folder) if memory else set_aside(saved)
    return None, problems


def replicate(folder: Path, mesh: Mesh, memory: MemoryTier, after: int, to: Path) -> tuple[Saved | None, list[str]]:
    """
    Copy a whole checkpoint newer than `after` from one machine's memory to the folder `to`, which all ranks see.

    Returns the copy, if any, and the damage found in newer checkpoints. A collective over the world. Raises
    `CheckpointError` on all ranks if the copy cannot be written: resuming from an older checkpoint would lose this one.
    """
    group = memory.group
    mine = [s for s in listed(folder) if memory.is_current(s) and s.step > after] if group.is_leader else []
    there = mesh.gather_objects([s for s in mine if s.save_id and not s.save_id.layout_key])
    offers = [(saved, rank) for rank, found in enumerate(there) for saved in found]
    problems: list[str] = []
    for saved, source in sorted(offers, key=lambda offer: (-offer[0].step, offer[1])):
        is_source = group.ranks[0] == source  # all ranks that see the source folder share the copying
        if damaged := mesh.first_problem(damage(saved.folder, group.index, len(group.ranks)) if is_source else ""):
            problems.append(damaged)
            continue
        replica = replace(saved, folder=folder_of(to, saved.step))
        temporary = to / f".{replica.folder.name}.lent.tmp"
        _together(mesh, saved, lambda: _copy(saved.folder, temporary, group) if is_source else None)  # noqa: B023  # called at once
        _together(mesh, saved, lambda: replace_folder(temporary, replica.folder) if mesh.place.rank == source else None)  # noqa: B023
        if mesh.is_first:
            point_to_latest(to, replica.step)
        return replica, problems
    return None, problems


def _together(mesh: Mesh, saved: Saved, do: Callable[[], None]) -> None:
    """Call `do` on all ranks. Raises `CheckpointError` on all if it fails on one."""
    problem = ""
    try:
        do()
    except OSError as error:
        problem = str(error)
    if problem := mesh.first_problem(problem):
        raise CheckpointError(
            f"{saved.folder} is only in one machine's memory, and cannot be copied to the shared disk: {problem}. "
            "Fix that, then run the same command to resume from it"
        )


def _copy(folder: Path, to: Path, group: FolderGroup) -> None:
    """Copy and flush this rank's share of the files."""
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir())[group.index :: len(group.ranks)]:
        shutil.copyfile(file, to / file.name)
        sync(to / file.name)


def point_to_latest(folder: Path, step: int) -> None:
    """Point the link `latest` at a checkpoint, atomically. Does nothing on a disk without links."""
    temporary = folder / ".latest.tmp"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder_of(folder, step).name)
        temporary.replace(folder / "latest")
