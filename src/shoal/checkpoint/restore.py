"""Loading checkpoints: each rank reads its own regions, whichever layout wrote them. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from shoal.checkpoint.planner import RegionLoadPlanner
from shoal.checkpoint.saved import Saved, read_state, verify
from shoal.checkpoint.shard_file import read_offsets
from shoal.errors import CheckpointError
from shoal.mesh.region import Part


def load(saved: Saved, parts: Mapping[str, Part]) -> dict[str, Any]:
    """
    Verify the checkpoint, fill `parts` in place, and return its `state.json`.

    parts: regions of all or some of its tensors. Raises `CheckpointError` if the checkpoint is damaged or lacks these tensors.
    """
    verify(saved.folder)
    state = read_state(saved.folder)
    read_into(saved, parts)
    return state


def load_model(saved: Saved, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Allocate a meta-device model on `device`, load the weights of `saved`, and return its `state.json`. Raises as `load` does."""
    model.to_empty(device=device)
    return load(saved, {f"model.{name}": Part.whole(p.detach()) for name, p in model.named_parameters()})


def whole_tensors(saved: Saved) -> dict[str, torch.Tensor]:
    """Verify the checkpoint, and return all its tensors, whole, on the CPU. Raises `CheckpointError` if it is damaged."""
    verify(saved.folder)
    with _plainly():
        found = HuggingFaceStorageReader(str(saved.folder)).read_metadata().state_dict_metadata
    sizes: dict[str, Any] = dict(found)
    parts = {name: Part.whole(torch.empty(each.size, dtype=each.properties.dtype)) for name, each in sizes.items()}
    read_into(saved, parts)
    return {name: part.tensor for name, part in parts.items()}


def read_into(saved: Saved, parts: Mapping[str, Part]) -> None:
    """Fill `parts` without verifying hashes, for callers that have verified them: a large model is read in several calls."""
    try:
        with _plainly():
            reader = HuggingFaceStorageReader(str(saved.folder))
            _check_shapes(saved, reader.read_metadata().state_dict_metadata, parts)
            tensors: dict[str, Any] = {name: part.tensor for name, part in parts.items()}
            # no_dist: each rank reads for itself; a shared plan would grow with the number of ranks
            dcp_load(tensors, storage_reader=reader, planner=RegionLoadPlanner(parts), no_dist=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{saved.folder} could not be loaded: {error}") from error


def read_own(file: Path, parts: Mapping[str, Part]) -> None:
    """Fill `parts` from a shard that holds exactly these regions. Raises `CheckpointError` if it does not, or cannot be read."""
    try:
        with safe_open(file, framework="pt") as shard:
            offsets = read_offsets(shard.metadata())
            for name, part in parts.items():
                found = shard.get_tensor(name)
                if (offsets[name], found.shape) != (part.region.offsets, part.tensor.shape):
                    raise ValueError(f"{name} holds another region of the tensor")
                part.tensor.copy_(found)
    except Exception as error:
        raise CheckpointError(f"{file} could not be loaded: {error}") from error


def _check_shapes(saved: Saved, there: Mapping[str, Any], here: Mapping[str, Part]) -> None:
    for key, part in here.items():
        if key not in there:
            raise CheckpointError(f"{saved.folder} belongs to another model: it has no {key}")
        if tuple(there[key].size) != part.region.shape:
            raise CheckpointError(
                f"{saved.folder} belongs to another model: {key} is {list(there[key].size)} there and "
                f"{list(part.region.shape)} here"
            )


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """
    Run torch.distributed.checkpoint without warnings about its internals, and raise the cause of its failure.

    torch's `CheckpointException` does not derive from `Exception`.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*")
            warnings.filterwarnings(
                "ignore", message=r".*torch\.distributed is disabled, unavailable or uninitialized.*"
            )
            yield
    except CheckpointException as error:
        _, (cause, _) = min(error.failures.items())
        raise OSError(str(cause)) from error
