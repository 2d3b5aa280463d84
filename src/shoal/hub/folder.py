"""An open folder of weights: its config, and the file of each tensor. No torch; reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.hub.header import Entry, parse_object, read_header
from shoal.hub.record import fetch_command, load_record

__all__ = ["CONFIG", "HEADERS", "INDEX", "SINGLE", "Entry", "ModelFolder"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADERS = "weights.json"  # what a run keeps of its initial weights: names, dtypes and shapes
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelFolder:
    """
    The content of a folder of weights. Every weight file exists and has the size that its header states.

    A run's copy of such a folder (`is_kept`) has no weight files, only `HEADERS`.
    """

    path: Path
    config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, Entry]  # by their names in the files

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Open a folder. Raises `ModelError` if a file is missing, cut short or inconsistent; the message names the file."""
        if not path.is_dir():
            raise ModelError(f"there is no folder {path}")
        config = _read_object(path / CONFIG, "it describes the model")
        try:
            tensors = _kept_headers(path) or _merge(_weight_files(path))
        except OSError as error:
            raise ModelError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
        if not tensors:
            raise _broken(path, "holds no tensors")
        return cls(path, config, tensors)

    @cached_property
    def is_kept(self) -> bool:
        """Whether this is a run's copy of the folder that it started from, without the weights."""
        return all(entry.file.name == HEADERS for entry in self.tensors.values())

    @cached_property
    def dtype(self) -> str:
        """The dtype of most weights, by safetensors' name: "BF16"."""
        counts: Counter[str] = Counter()
        for entry in self.tensors.values():
            counts[entry.dtype] += prod(entry.shape)
        return counts.most_common(1)[0][0]

    @cached_property
    def bytes(self) -> int:
        """The size of all weights."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files of weights, sorted."""
        return tuple(sorted({entry.file for entry in self.tensors.values()}))


def _kept_headers(path: Path) -> dict[str, Entry]:
    """Return the tensors recorded in a run's copy; none for a folder of weights, or a copy by an older shoal."""
    if not (path / HEADERS).is_file() or any(path.glob("*.safetensors")):
        return {}
    said = _read_object(path / HEADERS, "it describes the weights").get("tensors", {})
    try:
        return {name: Entry(path / HEADERS, kind, tuple(map(int, shape))) for name, (kind, shape) in said.items()}
    except (AttributeError, TypeError, ValueError):
        raise _broken(path / HEADERS, "does not describe the weights") from None


def _merge(files: Mapping[Path, set[str]]) -> dict[str, Entry]:
    """Return the tensors of all files. Raises `ModelError` if a file is damaged, lacks an indexed tensor, or repeats one."""
    tensors: dict[str, Entry] = {}
    for file, promised in files.items():
        try:
            found = read_header(file)
        except ValueError as error:
            raise _broken(file, str(error)) from None
        absent = sorted(promised - found.keys())
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise _broken(file, f"lacks {absent[0]}{more}, which {INDEX} says it has")
        for name, entry in found.items():
            if name in tensors:
                raise _broken(file, f"has {name}, as does {tensors[name].file.name}")
            tensors[name] = entry
    return tensors


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files, each with the set of tensor names that the index lists for it; empty sets without an index."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise _broken(folder, f"has {len(found)} *.safetensors and no {INDEX} that lists their tensors")
    if not found:
        raise _no_weights(folder)
    return {found[0]: set()}


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    index = folder / INDEX
    files: dict[Path, set[str]] = {}
    for name, file in shard_names(_read_object(index, "it lists the file of each tensor"), index).items():
        files.setdefault(folder / file, set()).add(name)
    for path in files:
        if not path.is_file():
            raise _broken(path, f"is missing; {INDEX} names it")
    return dict(sorted(files.items()))


def shard_names(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    """
    Return tensor -> file from an index read from `path`.

    Raises `ModelError` if the index lists no tensor, or a file that is not a *.safetensors beside it.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise _broken(path, "has no weight_map that lists the file of each tensor")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise _broken(path, f"names {file!r}, which is not a *.safetensors beside it")
    return names


def _read_object(path: Path, purpose: str) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise _broken(path, f"is missing; {purpose}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _broken(path, f"is not a JSON object: {error}") from None


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} has only pickled weights ({pickles[0]}): {WHY_NO_PICKLES}; save it with "
            "safe_serialization=True in transformers, or use a copy that has *.safetensors"
        )
    return _broken(folder, "has no *.safetensors")


WHY_NO_PICKLES = "a pickle can run code when it is read, so shoal reads none"


def _broken(path: Path, what: str) -> ModelError:
    """Return the error for `path`, a folder or a file in it, with the command that fetches it again."""
    folder = path if path.is_dir() else path.parent
    record = load_record(folder)
    if record is None:
        cure = "get that file again, or the whole folder"
    else:
        cure = f"{fetch_command(record.name, folder)} --force fetches it again"
    return ModelError(f"{path} {what}; {cure}")
