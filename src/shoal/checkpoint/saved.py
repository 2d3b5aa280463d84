"""
Checkpoints on disk: list the complete ones, read their state, verify every byte.

    checkpoints/
      step-00000100/
        shard-00000.safetensors   one per rank: its part of the parameters and of the optimizer's moments
        state.json                step, position, tokens, validation loss
        manifest.json             size and SHA-256 of each file above; written last
      latest -> step-00000100     for people; resuming reads the folders
      damaged-step-00000090/      failed verification and was skipped
      memory.json                 which in-memory checkpoints belong to this run; only while there are some

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
    """The identity of the save that wrote a checkpoint in memory."""

    generation: str  # the generation of the processes that wrote it, see `MemoryTier`
    save: int  # number of the save in that generation
    layout_key: str  # how tensors were sharded over ranks; "": the folder holds every tensor whole

    def to_state(self) -> dict[str, Any]:
        """Return the entry for `state.json`."""
        return {_SAVE_ID: {"life": self.generation, "save": self.save, "cut": self.layout_key}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SaveId | None:
        """Read the entry that `to_state` added to `state.json`; None if it is missing."""
        try:
            found = state[_SAVE_ID]
            return cls(found["life"], found["save"], found["cut"])
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its folder, step, and validation loss if it was evaluated."""

    folder: Path
    step: int
    val_loss: float | None
    save_id: SaveId | None = None  # only for a checkpoint in memory


def folder_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step` under `folder`."""
    return folder / f"{_PREFIX}{step:08d}"


def shard_of(folder: Path, rank: int) -> Path:
    """Return the path of the shard that `rank` writes in `folder`."""
    return folder / f"shard-{rank:05d}.safetensors"


def listed(folder: Path) -> list[Saved]:
    """List the complete checkpoints under `folder`, oldest first."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []:
        if (path / MANIFEST).is_file() and path.name.removeprefix(_PREFIX).isdigit():
            with contextlib.suppress(CheckpointError):
                state = read_state(path)
                step = int(path.name.removeprefix(_PREFIX))
                found.append(Saved(path, step, state.get("val_loss"), SaveId.from_state(state)))
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint. Raises `CheckpointError` if it cannot be read or has another format."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {state.get('format')}; this shoal reads format {FORMAT}")
    return state


def verify(folder: Path) -> None:
    """Raise `CheckpointError` unless every file is present, complete and unaltered."""
    if problem := damage(folder):
        raise CheckpointError(f"{problem}. Remove that folder to resume from the previous checkpoint")


def damage(folder: Path, share: int = 0, shares: int = 1) -> str:
    """
    Return the first damage found in a checkpoint; "" if there is none.

    Checks the size of every file, and the SHA-256 of every `shares`-th file starting at `share`, so that ranks can split
    the reading.
    """
    try:
        files: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return next(_damaged_files(folder, files, share, shares), "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read: {error}"


def _damaged_files(folder: Path, files: Mapping[str, Any], share: int, shares: int) -> Iterator[str]:
    paths = {name: folder / Path(name).name for name in files}  # a name cannot point outside the folder
    for name, path in paths.items():
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            yield f"{path} is missing"
        elif size != files[name]["bytes"]:
            yield f"{path} was cut short or grew: it has {size} bytes, {files[name]['bytes']} were written"
    mine = sorted(paths)[share::shares]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(mine, pool.map(lambda n: sha256_of(paths[n]), mine), strict=True):
            if digest != files[name]["sha256"]:
                yield f"{paths[name]} was altered: its SHA-256 differs from the manifest"


def discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so an interrupted removal leaves no partial checkpoint listed."""
    doomed = folder.with_name(f".{folder.name}.old")
    with contextlib.suppress(OSError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(saved: Saved) -> None:
    """Rename a damaged checkpoint, so that it is no longer listed but can be inspected. Does nothing on a read-only disk."""
    with contextlib.suppress(OSError):
        saved.folder.rename(saved.folder.with_name(_DAMAGED + saved.folder.name))
