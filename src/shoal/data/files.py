"""Files that are either whole or not there: written aside, flushed, renamed. No torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shoal.errors import DataError
from shoal.system.disk import NoLocksError, take_lock, write_whole


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """
    `write_whole`, with the way out where it fails.

    Raises DataError when the disk is full, the quota is reached or the folder cannot be written.
    """
    try:
        write_whole(path, parts)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> DataError:
    """What to do about a failed write, by its cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cure = "free some space or set data.folder to a larger disk, then start again: it goes on after the last shard"
    else:
        cure = "set data.folder to a folder that can be written"
    return DataError(f"cannot write {path}: {error.strerror or error}; {cure}")


def make_folder(folder: Path) -> None:
    """Raises DataError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    except ValueError as error:  # a zero byte in its name
        raise DataError(f"{str(folder)!r} is no path ({error}); set data.folder to another") from error


@contextlib.contextmanager
def exclusive_lock(path: Path, while_waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold `path` against other processes as `take_lock` does; yields whether another one had it before us."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            waited = take_lock(file, while_waiting)
        except NoLocksError as error:
            raise DataError(
                f"cannot lock {path}: {error.strerror}; set data.folder to a disk that has locks"
            ) from error
        yield waited
