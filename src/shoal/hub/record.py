"""The record that `shoal fetch` writes beside a model or a dataset: its origin, and each file's size and hash. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.system.disk import sha256_of

RECORD = "fetched.json"
DATA_RECORD = ".fetched.json"  # of a dataset: hidden, because readers of a folder take every JSON file for data
MODELS = Path("models")  # where `shoal fetch model NAME` puts NAME
DATASETS = Path("datasets")  # where `shoal fetch data NAME` puts its repository


@dataclass(frozen=True)
class FileRecord:
    """The size and SHA-256 of a complete file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """The record of a folder that `shoal fetch` wrote. It is written last, so its presence means that all files are complete."""

    name: str
    revision: str  # as requested: a branch, a tag or a commit
    commit: str
    files: Mapping[str, FileRecord]
    patterns: tuple[str, ...] = ()  # the requested files of a dataset

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def missing(self, folder: Path, *, hashes: bool = False) -> str:
        """
        Return the first problem: a missing file, a wrong size or, with `hashes`, other content; "" if there is none.

        Raises `OSError` if a file cannot be read.
        """
        for name, file in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            there = path.stat().st_size
            if there != file.bytes:
                return f"{path} has {there:,} of {file.bytes:,} bytes"
            if hashes and sha256_of(path) != file.sha256:
                return f"{path} was altered"
        return ""


def load_record(folder: Path) -> Record | None:
    """Return the record of a folder; None if there is none, or it cannot be read."""
    path = folder / DATA_RECORD
    try:
        fields = json.loads((path if path.exists() else folder / RECORD).read_bytes())
        files = {name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in fields["files"].items()}
        patterns = tuple(str(pattern) for pattern in fields.get("patterns", ()))
        return Record(str(fields["name"]), str(fields["revision"]), str(fields["commit"]), files, patterns)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def fetch_command(name: str, folder: Path) -> str:
    """Return the command that fetches `name` into `folder`."""
    there = "" if folder == MODELS / name else f" --to {folder}"
    return f"shoal fetch model {name}{there}"
