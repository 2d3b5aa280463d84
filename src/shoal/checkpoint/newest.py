"""From which checkpoint all processes go on, where each may see another folder."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from shoal.checkpoint.memory import Memory, Sharers
from shoal.checkpoint.saved import Saved, damage, discard, folder_of, listed, set_aside
from shoal.disk import replace_folder, sync
from shoal.parallel.mesh import Mesh


def choose(folder: Path, mesh: Mesh, memory: Memory | None) -> tuple[Saved | None, list[str]]:
    """
    The newest checkpoint under `folder` that is whole, the same on all processes; and what was wrong with newer ones, which
    are set aside, or in memory removed.

    In memory, each folder must have it, of one and the same save, and of this run; and all of each tensor, or what its
    processes hold now. A collective over the world.
    """
    sharers = memory.sharers if memory else Sharers.everyone(mesh.place.rank, mesh.world_size)
    mine = listed(folder) if sharers.is_first else None
    there = [{s.step: s for s in found} for found in mesh.gather_objects(mine) if found is not None]
    problems: list[str] = []
    for theirs in reversed(there[0].values()):
        saved = replace(theirs, folder=folder / theirs.folder.name)
        if any(saved.step not in found or found[saved.step].mark != saved.mark for found in there):
            continue
        if memory and not (memory.is_current(saved) and all(mesh.gather_objects(memory.can_read(saved)))):
            continue
        damages = mesh.gather_objects(damage(saved.folder, sharers.index, len(sharers.ranks)))
        damaged = next(filter(None, damages), "")
        if not damaged:
            return saved, problems
        problems.append(damaged)
        if sharers.is_first and any(damages[rank] for rank in sharers.ranks):
            discard(saved.folder) if memory else set_aside(saved)
    return None, problems


def lend(folder: Path, mesh: Mesh, memory: Memory, after: int, to: Path) -> tuple[int | None, list[str]]:
    """
    Where not all machines have the newest checkpoint, and one has all of it: copy it to the folder `to`, which all see.

    The step, if there is one after `after`; and what was wrong with newer ones. A collective over the world.
    """
    mine = [s for s in listed(folder) if memory.is_current(s) and s.step > after] if memory.sharers.is_first else []
    there = mesh.gather_objects({s.step: s for s in mine if s.mark and not s.mark.cut})
    problems: list[str] = []
    for step in sorted({step for found in there for step in found}, reverse=True):
        lender = next(rank for rank, found in enumerate(there) if step in found)
        problem = _copy(there[lender][step], to) if mesh.place.rank == lender else ""
        problem = mesh.gather_objects(problem)[lender]
        if not problem:
            return step, problems
        problems.append(problem)
    return None, problems


def _copy(saved: Saved, to: Path) -> str:
    """Why it could not be copied; "" where it is there, flushed."""
    if damaged := damage(saved.folder):
        return damaged
    aside = to / f".{saved.folder.name}.lent.tmp"
    try:
        shutil.copytree(saved.folder, aside, dirs_exist_ok=True)
        for file in aside.iterdir():
            sync(file)
        replace_folder(aside, folder_of(to, saved.step))
    except (OSError, shutil.Error) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside)
        return f"{saved.folder} could not be copied to {to}: {error}"
    point_to_latest(to, saved.step)
    return ""


def point_to_latest(folder: Path, step: int) -> None:
    """Let the link `latest` point at a checkpoint, never at nothing in between. A disk without links has none."""
    aside = folder / ".latest.tmp"
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder_of(folder, step).name)
        aside.replace(folder / "latest")
