"""From which checkpoint all processes go on, where each may see another folder."""

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
    The newest checkpoint under `folder` that is whole, the same on all processes; and what was wrong with newer ones, which
    are set aside, or in memory removed.

    In memory, each folder must have it, of one and the same save, and of this run; and all of each tensor, or what its
    processes hold now. A collective over the world.
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
    Where a machine has a checkpoint that is newer than `after`, and all of it: copy it to the folder `to`, which all see.

    The copy, if there is one; and what was wrong with newer ones. A collective over the world. Raises `CheckpointError`, on
    all processes, where it cannot be written: who went on from an older one would give this one up.
    """
    group = memory.group
    mine = [s for s in listed(folder) if memory.is_current(s) and s.step > after] if group.is_leader else []
    there = mesh.gather_objects([s for s in mine if s.save_id and not s.save_id.layout_key])
    offers = [(saved, rank) for rank, found in enumerate(there) for saved in found]
    problems: list[str] = []
    for saved, source in sorted(offers, key=lambda offer: (-offer[0].step, offer[1])):
        is_source = group.ranks[0] == source  # all that see it share the work
        if damaged := mesh.first_problem(damage(saved.folder, group.index, len(group.ranks)) if is_source else ""):
            problems.append(damaged)
            continue
        replica = replace(saved, folder=folder_of(to, saved.step))
        aside = to / f".{replica.folder.name}.lent.tmp"
        _together(mesh, saved, lambda: _copy(saved.folder, aside, group) if is_source else None)  # noqa: B023  # at once
        _together(mesh, saved, lambda: replace_folder(aside, replica.folder) if mesh.place.rank == source else None)  # noqa: B023
        if mesh.is_first:
            point_to_latest(to, replica.step)
        return replica, problems
    return None, problems


def _together(mesh: Mesh, saved: Saved, do: Callable[[], None]) -> None:
    """Do it, all processes at once. Raises `CheckpointError` on all of them where it fails on one."""
    problem = ""
    try:
        do()
    except OSError as error:
        problem = str(error)
    if problem := mesh.first_problem(problem):
        raise CheckpointError(
            f"{saved.folder} is in the memory of one machine alone, and cannot be written where all see it: {problem}. "
            "Mend that, and the same command goes on from there"
        )


def _copy(folder: Path, to: Path, group: FolderGroup) -> None:
    """This process's share of the files, flushed."""
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir())[group.index :: len(group.ranks)]:
        shutil.copyfile(file, to / file.name)
        sync(to / file.name)


def point_to_latest(folder: Path, step: int) -> None:
    """Let the link `latest` point at a checkpoint, never at nothing in between. A disk without links has none."""
    aside = folder / ".latest.tmp"
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder_of(folder, step).name)
        aside.replace(folder / "latest")
