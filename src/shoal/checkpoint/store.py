"""
Checkpoints: written aside, flushed, hashed, renamed; so that what is listed is complete.

    checkpoints/
      step-00000100/
        shard-00001-model-00001-of-00001.safetensors   one a rank: parameters and the optimizer's moments
        state.json       step, position, tokens, validation loss
        manifest.json    size and SHA-256 of each file above; written last
      latest -> step-00000100                          for people; a resume looks at the folders

A save has three parts, so that a later one can leave the step's path: `stage` (what to write), `write`
(each rank its files, through torch.distributed.checkpoint) and `commit` (rank 0: manifest, rename, keep).
Nothing here is ever pickled or unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from shoal.checkpoint.planner import RegionLoadPlanner, RegionSavePlanner
from shoal.disk import sha256_of, sync
from shoal.errors import CheckpointError
from shoal.parallel.mesh import Mesh
from shoal.parallel.region import Part

FORMAT = 1
_PREFIX = "step-"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there: its folder, step, and validation loss where it was evaluated."""

    folder: Path
    step: int
    val_loss: float | None


def listed(folder: Path) -> list[Saved]:
    """The complete checkpoints under `folder`, oldest first."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []:
        if (path / "manifest.json").is_file() and path.name.removeprefix(_PREFIX).isdigit():
            with contextlib.suppress(CheckpointError):
                found.append(Saved(path, int(path.name.removeprefix(_PREFIX)), read_state(path).get("val_loss")))
    return found


class CheckpointStore:
    """The checkpoints of one run. `save` and `load` are collectives over the world."""

    def __init__(self, folder: Path, mesh: Mesh, *, keep: int, keep_best: bool) -> None:
        self.folder, self._mesh, self._keep, self._keep_best = folder, mesh, keep, keep_best
        if mesh.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):  # of a save or a removal that was cut short
                shutil.rmtree(leftover, ignore_errors=True)
        mesh.barrier()

    def save(self, parts: Mapping[str, Part], state: Mapping[str, Any]) -> Saved:
        """
        Write a checkpoint of step `state["step"]`.

        Raises `CheckpointError` on every rank if any could not write; what was there before stands.
        """
        name = f"{_PREFIX}{state['step']:08d}"
        aside, final = self.folder / f".{name}.tmp", self.folder / name
        if final.exists():
            return Saved(final, int(state["step"]), state.get("val_loss"))
        with _agreeing(self._mesh, aside):
            if self._mesh.is_first:
                aside.mkdir(parents=True, exist_ok=True)
        with _agreeing(self._mesh, aside):
            self._write(aside, parts)
        with _agreeing(self._mesh, aside):
            if self._mesh.is_first:
                self._commit(aside, final, {"format": FORMAT, **state})
        return Saved(final, int(state["step"]), state.get("val_loss"))

    def _write(self, aside: Path, parts: Mapping[str, Part]) -> None:
        with _plainly():
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            planner, alone = RegionSavePlanner(parts), self._mesh.world_size == 1
            dcp_save(_tensors(parts), storage_writer=writer, planner=planner, no_dist=alone)

    def _commit(self, aside: Path, final: Path, state: Mapping[str, Any]) -> None:
        _write_json(aside / "state.json", state)
        files = sorted(p for p in aside.iterdir() if p.is_file())
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256_of, files))
        entries = {p.name: {"bytes": p.stat().st_size, "sha256": d} for p, d in zip(files, digests, strict=True)}
        _write_json(aside / "manifest.json", {"format": FORMAT, "files": entries})
        sync(aside)
        aside.rename(final)
        _point(self.folder / "latest", final.name)
        sync(self.folder)
        self._retain()

    def _retain(self) -> None:
        """Keep the last so many and the best; a removal that is cut short leaves nothing half listed."""
        saved = listed(self.folder)
        kept = {s.step for s in saved[-self._keep :]}
        judged = [s for s in saved if s.val_loss is not None]
        if self._keep_best and judged:
            kept.add(min(judged, key=lambda s: (s.val_loss, s.step)).step)
        for old in saved:
            if old.step not in kept:
                doomed = old.folder.with_name(f".{old.folder.name}.old")
                old.folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def load(self, saved: Saved, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Fill `parts` in place from `saved`; its `state.json`. Raises `CheckpointError`."""
        return load(saved, parts, alone=self._mesh.world_size == 1)


def load(saved: Saved, parts: Mapping[str, Part], *, alone: bool = True) -> dict[str, Any]:
    """
    Fill `parts` (of all of a checkpoint's tensors, or of some) in place; verified before, read by slices.

    With `alone` false it is a collective over the world. Raises `CheckpointError`.
    """
    verify(saved.folder)
    state = read_state(saved.folder)
    read_into(saved, parts, alone=alone)
    return state


def read_into(saved: Saved, parts: Mapping[str, Part], *, alone: bool = True) -> None:
    """`load` without a look at the hashes, for one who has taken it: a large model is read in several turns."""
    try:
        with _plainly():
            reader = HuggingFaceStorageReader(str(saved.folder))
            _check_shapes(saved.folder, reader.read_metadata().state_dict_metadata, parts)
            dcp_load(_tensors(parts), storage_reader=reader, planner=RegionLoadPlanner(parts), no_dist=alone)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{saved.folder} could not be loaded: {error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {state.get('format')}; this shoal reads format {FORMAT}")
    return state


def load_model(saved: Saved, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Give a model on meta its memory on `device` and the weights of `saved`; its `state.json`. Raises as `load` does."""
    model.to_empty(device=device)
    return load(saved, {f"model.{name}": Part.whole(p.detach()) for name, p in model.named_parameters()})


def verify(folder: Path) -> None:
    """Raise `CheckpointError` unless every file is there, whole and unaltered."""
    remedy = "Remove that folder to go on from the one before it"
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/manifest.json cannot be read: {error}. {remedy}") from error
    for name, entry in files.items():
        path = folder / Path(name).name  # a name never leads out of the folder
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing. {remedy}")
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{path} was cut short or grew: {size} bytes where {entry['bytes']} were written. {remedy}"
            )
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(files, pool.map(lambda n: sha256_of(folder / Path(n).name), files), strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{folder / name} was altered: its SHA-256 is not the one written. {remedy}")


def _tensors(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {name: part.tensor for name, part in parts.items()}


def _check_shapes(folder: Path, there: Mapping[str, Any], here: Mapping[str, Part]) -> None:
    for key, part in here.items():
        if key not in there:
            raise CheckpointError(f"{folder} is of another model: it has no {key}")
        if tuple(there[key].size) != part.region.shape:
            raise CheckpointError(
                f"{folder} is of another model: {key} is {list(there[key].size)} there and {list(part.region.shape)} here"
            )


@contextlib.contextmanager
def _agreeing(mesh: Mesh, aside: Path) -> Iterator[None]:
    """
    Run a part of a save; if any rank failed, all raise, and what was written aside is removed.

    A collective over the world.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # told to the other ranks before it is raised
        error = caught
    failed = torch.tensor(float(error is not None), device=mesh.device)
    if mesh.sum(failed).item() == 0:
        return
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)
    if error is None:
        raise CheckpointError(f"{aside.parent}: another rank could not write its part")
    raise CheckpointError(_why_not_saved(aside.parent, error)) from error


def _why_not_saved(folder: Path, error: Exception) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text:
        return f"{folder}: the disk is full, so this checkpoint was not written; those before it stand. Free space, and start again with the same command"
    return (
        f"{folder}: this checkpoint could not be written, those before it stand: {text.strip() or type(error).__name__}"
    )


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """
    Run a part of torch.distributed.checkpoint without the warnings about its own internals, and let what
    went wrong on a rank come out as what it is (its own exception is no `Exception`).
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*")
            warnings.filterwarnings(
                "ignore", message=r".*torch\.distributed is disabled, unavailable or uninitialized.*"
            )
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise OSError(getattr(cause, "errno", None) or errno.EIO, f"rank {rank}: {cause}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _point(link: Path, target: str) -> None:
    """Let `link` point at `target`, never at nothing in between."""
    aside = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(target)
    aside.replace(link)
