"""
The checkpoints that are there: which are complete, what they say, whether every byte of them is as it was written.

    checkpoints/
      step-00000100/
        shard-00000.safetensors   one a rank: its part of the parameters and of the optimizer's moments
        state.json                step, position, tokens, validation loss
        manifest.json             size and SHA-256 of each file above; written last
      latest -> step-00000100     for people; a resume looks at the folders
      damaged-step-00000090/      one that did not verify and was passed over
      memory.json                 which of those in the memory of machines are of this run, while there are some

No torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.errors import CheckpointError
from shoal.system.disk import sha256_of

FORMAT: Final = 1
STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"
_SAVE_ID: Final = "mark"  # key in state.json
_PREFIX: Final = "step-"
_DAMAGED: Final = "damaged-"


@dataclass(frozen=True)
class SaveId:
    """Of which save a checkpoint in memory is."""

    generation: str  # of the processes that wrote it
    save: int  # which one of theirs
    layout_key: str  # how tensors were cut over processes; "": all that is in a folder makes them whole

    def to_state(self) -> dict[str, Any]:
        """Return what `state.json` keeps of it."""
        return {_SAVE_ID: {"life": self.generation, "save": self.save, "cut": self.layout_key}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SaveId | None:
        """Return what `to_state` put into `state.json`; None if there is none."""
        try:
            found = state[_SAVE_ID]
            return cls(found["life"], found["save"], found["cut"])
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there: its folder, step, and validation loss where it was evaluated."""

    folder: Path
    step: int
    val_loss: float | None
    save_id: SaveId | None = None  # of one that was saved in memory


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, under `folder`."""
    return folder / f"{_PREFIX}{step:08d}"


def shard_of(folder: Path, rank: int) -> Path:
    """What the process `rank` wrote of the checkpoint in `folder`."""
    return folder / f"shard-{rank:05d}.safetensors"


def listed(folder: Path) -> list[Saved]:
    """The complete checkpoints under `folder`, oldest first."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []:
        if (path / MANIFEST).is_file() and path.name.removeprefix(_PREFIX).isdigit():
            with contextlib.suppress(CheckpointError):
                state = read_state(path)
                step = int(path.name.removeprefix(_PREFIX))
                found.append(Saved(path, step, state.get("val_loss"), SaveId.from_state(state)))
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `CheckpointError`."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {state.get('format')}; this shoal reads format {FORMAT}")
    return state


def verify(folder: Path) -> None:
    """Raises `CheckpointError` unless every file is there, whole and unaltered."""
    if problem := damage(folder):
        raise CheckpointError(f"{problem}. Remove that folder to go on from the one before it")


def damage(folder: Path, share: int = 0, shares: int = 1) -> str:
    """
    What is wrong with a checkpoint, or nothing: "".

    Every size is looked at, and the SHA-256 of each `shares`th file from `share` on: several processes share the reading.
    """
    try:
        files: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return next(_damaged_files(folder, files, share, shares), "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read: {error}"


def _damaged_files(folder: Path, files: Mapping[str, Any], share: int, shares: int) -> Iterator[str]:
    paths = {name: folder / Path(name).name for name in files}  # a name never leads out of the folder
    for name, path in paths.items():
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            yield f"{path} is missing"
        elif size != files[name]["bytes"]:
            yield f"{path} was cut short or grew: {size} bytes where {files[name]['bytes']} were written"
    mine = sorted(paths)[share::shares]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(mine, pool.map(lambda n: sha256_of(paths[n]), mine), strict=True):
            if digest != files[name]["sha256"]:
                yield f"{paths[name]} was altered: its SHA-256 is not the one written"


def discard(folder: Path) -> None:
    """Remove a checkpoint; a removal that is cut short leaves nothing half listed."""
    doomed = folder.with_name(f".{folder.name}.old")
    with contextlib.suppress(OSError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(saved: Saved) -> None:
    """Keep a damaged checkpoint out of the list, and for those who want to know why. On a read-only disk it stays."""
    with contextlib.suppress(OSError):
        saved.folder.rename(saved.folder.with_name(_DAMAGED + saved.folder.name))
