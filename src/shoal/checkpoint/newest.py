"""From which checkpoint all processes go on, where each may see another folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from shoal.checkpoint.saved import MARK, Saved, damage, folder_of, listed, read_state, set_aside, shard_of
from shoal.checkpoint.sharers import Sharers
from shoal.parallel.mesh import Mesh


def agree(folder: Path, mesh: Mesh, sharers: Sharers, cut: str) -> tuple[Saved | None, list[str]]:
    """
    The newest checkpoint that is whole, the same on all processes; and what was wrong with newer ones, which are set aside.

    Each folder must have it, of one and the same save; and all of each tensor, or what its processes hold now, which they
    do where it was cut as it is now. A collective over the world.
    """
    mine = [(s, read_state(s.folder).get(MARK)) for s in listed(folder)] if sharers.is_first else None
    there = [found for found in mesh.gather_objects(mine) if found is not None]
    marks = [{saved.step: mark for saved, mark in found} for found in there]
    problems: list[str] = []
    for theirs, mark in reversed(there[0]):
        saved = Saved(folder_of(folder, theirs.step), theirs.step, theirs.val_loss)
        if any(saved.step not in found or found[saved.step] != mark for found in marks):
            continue
        if not all(mesh.gather_objects(_can_read(saved, mark, mesh.place.rank, cut))):
            continue
        damages = mesh.gather_objects(damage(saved.folder, sharers.index, len(sharers.ranks)))
        damaged = next(filter(None, damages), "")
        if not damaged:
            return saved, problems
        problems.append(damaged)
        if sharers.is_first:
            set_aside(saved)
    return None, problems


def _can_read(saved: Saved, mark: Mapping[str, str] | None, rank: int, cut: str) -> bool:
    """From what is whole, or from what it wrote itself when it held the same parts."""
    if not (mark and mark.get("cut")):
        return True
    return mark["cut"] == cut and shard_of(saved.folder, rank).is_file()


def drop_after(folder: Path, newest: Saved | None) -> None:
    """Remove what is newer: its steps are taken anew, and it would be kept in their place, or pass for them."""
    for saved in listed(folder):
        if newest is None or saved.step > newest.step:
            shutil.rmtree(saved.folder, ignore_errors=True)
