"""Find the token files that a config names: files, folders and patterns. No torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.data.corpus.paths import Finder, count_kinds
from shoal.data.pretokenized.formats import SUFFIXES
from shoal.errors import DataError

# Names such as val.bin, fineweb_val_000000.bin, test-00.npy
_HELD_OUT = re.compile(r"(?<![a-z])(val|valid|validation|test)(?![a-z])")


@dataclass(frozen=True)
class Found:
    """Token files as (name, path), in reading order; of Megatron-LM's two files, the .bin."""

    files: tuple[tuple[str, Path], ...]
    named: frozenset[str]  # names that the user wrote, not found in a folder or by a pattern
    skipped: str  # how many other files the folders have, by suffix; empty if none

    def without(self, others: Found) -> Found:
        """Return these files except those that `others` has too."""
        theirs = {path.resolve() for _, path in others.files}
        return Found(tuple(file for file in self.files if file[1].resolve() not in theirs), self.named, self.skipped)


def expand(given: str) -> list[str]:
    """Return the paths that match a pattern, sorted; a path that exists, or has no `*`, `?` or `[`, unchanged."""
    path = Path(given).expanduser()
    if not glob.has_magic(given) or path.exists():
        return [given]
    return sorted(glob.glob(str(path), recursive=True))


def find_token_files(paths: Sequence[str], option: str) -> Found:
    """
    Find the files of an option. Raises DataError if there are none, or one cannot be read.

    A folder is searched with its subfolders for names that end in `SUFFIXES`, in sorted order. A file that several paths
    name is read once.
    """
    finder = Finder(SUFFIXES)
    named = set[str]()
    for given in paths:
        matches = expand(given)
        if not matches:
            raise DataError(f"no file matches {given}; correct {option}")
        for match in matches:
            finder.add(match)
        named.update(_tokens_of(match, Path(match))[0] for match in matches if match == given)
    files = {path.resolve(): (name, path) for name, path in (_tokens_of(*file) for file in finder.files())}
    skipped = count_kinds(finder.skipped())
    if not files:
        there = f"; found {skipped}" if skipped else ""
        raise DataError(f"no token files ({', '.join(SUFFIXES)}) in {', '.join(paths)}{there}; correct {option}")
    return Found(tuple(files.values()), frozenset(named), skipped)


def check_held_out(train: Found) -> None:
    """Raise DataError if a folder or a pattern found training files that are named like held-out ones."""
    for name, _ in train.files:
        if name not in train.named and _HELD_OUT.search(Path(name).name.lower()):
            raise DataError(
                f"{name} is named like held-out tokens, but would be trained on; set data.val_paths to it, or name it in "
                "data.paths as a file"
            )


def _tokens_of(name: str, path: Path) -> tuple[str, Path]:
    """Return the name and path of a file; for an .idx, those of its .bin."""
    if path.suffix.lower() != ".idx":
        return name, path
    return str(Path(name).with_suffix(".bin")), path.with_suffix(".bin")
