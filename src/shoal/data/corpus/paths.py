"""Find a corpus's files: each file under `data.paths` is read, counted as skipped, or reported as an error. No torch."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from shoal.config.data_formats import is_pattern
from shoal.errors import DataError
from shoal.hub.find import near_path
from shoal.system.output import on_one_line

NAMED_AT_MOST = 5  # maximum number of unreadable files named in a message; the rest are counted
KINDS_AT_MOST = 8  # maximum number of suffixes and causes of skipped files named in a message


class Finder:
    """Collects the files under the given paths, and reports all unreadable ones in one error."""

    def __init__(
        self,
        suffixes: tuple[str, ...],
        skip_folders: frozenset[str] = frozenset(),
        skip_files: frozenset[str] = frozenset(),
        option: str = "data.paths",
    ) -> None:
        """Find files with these suffixes. option: the option of the paths, for messages."""
        self._option = option
        self._suffixes, self._skip_folders, self._skip_files = suffixes, skip_folders, skip_files
        # By real path, so that nothing is read twice and a loop of symbolic links ends.
        self._files: dict[str, tuple[str, Path]] = {}
        self._folders: set[str] = set()
        self._skipped: dict[str, str] = {}  # real path -> suffix or cause
        self._counts: Counter[str] = Counter()
        self._unreadable: list[str] = []

    def add(self, given: str, at: Path | None = None) -> None:
        """
        Add a file, whatever its suffix, or a folder's files with the wanted suffixes. Raises DataError if `given` is neither.

        at: where `given` is on this machine, if it names a remote file.
        """
        path, mode = self._look(given if at is None else str(at))
        if stat.S_ISDIR(mode):
            found = sorted(self._walk(path))
            for relative, file, real in found:
                self._add_file(os.path.join(given, relative), file, real)
        elif stat.S_ISREG(mode):
            self._add_file(given, path, os.path.realpath(path))
        else:
            raise DataError(
                f"{given} is a pipe, socket or device; save its content to a file and set {self._option} to it"
            )

    def add_all(self, given: str) -> None:
        """
        Add the files and folders that a pattern such as `data/*.parquet` or `data/**` matches, sorted; or a path without wildcards.

        A pattern that ends with a suffix, as *.log does, names its files; of those of another pattern, the files with the
        wanted suffixes are read. Raises DataError if nothing matches.
        """
        if not is_pattern(given) or os.path.lexists(os.path.expanduser(given)):
            self.add(given)
            return
        found = sorted(glob.iglob(os.path.expanduser(given), recursive=True))
        names_files = not is_pattern(Path(given).suffix or "*")
        for path in found:
            is_folder = os.path.isdir(path)
            if not is_folder and not names_files and not path.lower().endswith(self._suffixes):
                self._skipped[os.path.realpath(path)] = Path(path).suffix or "no suffix"
            elif not is_folder or "**" not in given:  # the files in a folder match `**` themselves
                self.add(path)
        if not found:
            raise DataError(f"no file matches {on_one_line(given)}; correct {self._option}")

    def files(self) -> list[tuple[str, Path]]:
        """Return (name, path) of each file, in reading order. Raises DataError if a file or folder cannot be read."""
        if self._unreadable:
            more = len(self._unreadable) - NAMED_AT_MOST
            named = ", ".join(self._unreadable[:NAMED_AT_MOST]) + (f" and {more:,} more" if more > 0 else "")
            raise DataError(f"cannot read {named}; fix that, or take it out of {self._option}")
        return list(self._files.values())

    def skipped(self) -> Counter[str]:
        """Count skipped files by suffix or cause (such as `hidden`)."""
        return self._counts + Counter(kind for real, kind in self._skipped.items() if real not in self._files)

    def _add_file(self, name: str, path: Path, real: str) -> None:
        if real in self._files:
            self._counts["listed twice"] += 1
            return
        try:
            size = path.stat().st_size
        except OSError as error:
            self._fails(name, error)
            return
        if not os.access(path, os.R_OK):
            self._fails(name, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        self._files[real] = (name, path)
        self._counts["empty"] += size == 0

    def _walk(self, root: Path) -> Iterator[tuple[str, Path, str]]:
        """Yield (name under `root`, path, real path) of each file with one of the suffixes; follow links to folders last."""
        folders, links = [("", os.path.realpath(root))], list[tuple[str, str]]()
        while folders or links:
            below, real = folders.pop() if folders else links.pop(0)
            if real in self._folders:
                self._counts["listed twice"] += 1
                continue
            self._folders.add(real)
            try:
                entries = sorted(os.scandir(real), key=lambda entry: entry.name)
            except OSError as error:
                self._fails(str(root / below), error)
                continue
            for entry in entries:
                name = f"{below}{entry.name}"
                target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                kind = self._kind(entry, str(root / name))
                if kind == "folder":
                    (links if entry.is_symlink() else folders).append((f"{name}/", target))
                elif kind == "file":
                    yield name, root / name, target
                elif kind is not None:
                    self._skipped[target] = kind

    def _kind(self, entry: os.DirEntry[str], name: str) -> str | None:
        """Return "folder", "file", the suffix or cause under which to count a skipped entry, or None for an entry not to count."""
        suffix = Path(entry.name).suffix
        fits = entry.name.lower().endswith(self._suffixes)
        if entry.name.startswith("."):
            return "hidden"
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if entry.is_symlink() and suffix and not fits:
                return suffix
            if entry.is_symlink() or not isinstance(error, FileNotFoundError):  # otherwise the file was just removed
                self._fails(name, error)
            return None
        if stat.S_ISDIR(mode):
            return None if entry.name in self._skip_folders else "folder"
        if not stat.S_ISREG(mode):
            return "pipe, socket or device"
        if fits and entry.name in self._skip_files:
            return entry.name
        return "file" if fits else suffix or "no suffix"

    def _look(self, given: str) -> tuple[Path, int]:
        """Return the path with `~` expanded, and its mode. Raises DataError if there is no such file or it cannot be read."""
        try:
            path = Path(given).expanduser()
            return path, path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            link = f" (it is a link to {os.readlink(path)})" if path.is_symlink() else ""
            raise DataError(
                f"no such file or folder: {on_one_line(given)}{link}{near_path(given)}; correct {self._option}"
            ) from None
        except (OSError, RuntimeError, ValueError) as error:  # an unknown `~user`; a zero byte in the path
            raise DataError(
                f"cannot read {given} ({getattr(error, 'strerror', None) or error}); correct {self._option}"
            ) from error

    def _fails(self, name: str, error: OSError) -> None:
        self._unreadable.append(f"{on_one_line(name)} ({error.strerror})")


def count_kinds(kinds: Mapping[str, int]) -> str:
    """Return the counts as text, the most frequent first: ".pdf (8), .docx (4)"."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = len(most) - KINDS_AT_MOST
    named = ", ".join(f"{on_one_line(kind)} ({count:,})" for kind, count in most[:KINDS_AT_MOST])
    return f"{named} and {more} more kinds" if more > 0 else named
