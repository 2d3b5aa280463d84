"""The suffixes of the files that a corpus can read: formats and compressions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

Format = Literal["text", "jsonl", "json", "csv", "parquet", "arrow"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

SUFFIXES: Final[Mapping[Format, tuple[str, ...]]] = MappingProxyType({
    "text": (".txt", ".md", ".py", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
})  # fmt: skip
COMPRESSIONS: Final = (".gz", ".zst", ".xz")
CONTAINERS: Final[tuple[Format, ...]] = ("parquet", "arrow")  # formats that compress their own columns
TOKEN_SUFFIXES: Final = (".bin", ".idx", ".npy", ".ds")
# Files that `datasets` writes beside its tables: no documents.
DATASETS_FILES: Final = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
WILDCARDS: Final = frozenset("*?[")


def suffixes_of(kind: str) -> tuple[str, ...]:
    """Return the suffixes that a corpus of this kind reads in a folder, compressed ones included."""
    formats = FORMATS if kind == "files" else [name for name in FORMATS if name == kind]
    plain = [(suffix, name) for name in formats for suffix in SUFFIXES[name]]
    packed = [suffix + end for suffix, name in plain if name not in CONTAINERS for end in COMPRESSIONS]
    return (*(suffix for suffix, _ in plain), *packed)


def split_suffix(name: str) -> tuple[str, str]:
    """Return the suffix of a file's format and of its compression, in lower case: (".csv", ".gz"); "" for either if it has none."""
    stem, compression = os.path.splitext(name.lower())
    if compression not in COMPRESSIONS:
        return compression, ""
    return os.path.splitext(stem)[1], compression


def format_of(name: str) -> Format | None:
    """Return the format that a file's suffix says, None for an unknown suffix."""
    suffix, _ = split_suffix(name)
    return next((found for found, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def is_pattern(path: str) -> bool:
    """Return whether a path contains a wildcard."""
    return not WILDCARDS.isdisjoint(path)


def kind_of_paths(paths: list[str], val_paths: list[str]) -> Literal["text", "jsonl", "files", "tokens"]:
    """Return the kind of corpus that the names in `data.paths` and `data.val_paths` mean if `data.corpus` is not set."""
    if all(path.lower().endswith(TOKEN_SUFFIXES) for path in paths):
        return "tokens"
    paths = paths + val_paths
    formats = {format_of(path) for path in paths}
    compressions = {split_suffix(path)[1] for path in paths}
    if formats == {"jsonl"} and compressions <= {"", ".gz"}:
        return "jsonl"
    remote = any("://" in path for path in paths)
    return "files" if remote or formats - {"text", None} or compressions - {"", ".gz"} else "text"
