"""Atomic writes, folders and locks, with a suggested fix if they fail. No torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shoal.errors import DataError
from shoal.system.disk import NoLocksError, take_lock, write_whole


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """
    Write a file whole or not at all (`write_whole`).

    Raises DataError, with a suggested fix, if the disk is full, the quota is reached or the folder is not writable.
    """
    try:
        write_whole(path, parts)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> DataError:
    """Return the error for a failed write, with a fix for its cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cure = "free some space or set data.folder to a larger disk, then start again: it resumes after the last shard"
    else:
        cure = "set data.folder to a writable folder"
    return DataError(f"cannot write {path}: {error.strerror or error}; {cure}")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises DataError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    except ValueError as error:  # a zero byte in its name
        raise DataError(f"{str(folder)!r} is not a valid path ({error}); set data.folder to another") from error


@contextlib.contextmanager
def exclusive_lock(path: Path, while_waiting: Callable[[], None]) -> Iterator[bool]:
    """
    Lock `path` against other processes (`take_lock`); yields whether it had to wait for one of them.

    while_waiting: a function called repeatedly during the wait.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            waited = take_lock(file, while_waiting)
        except NoLocksError as error:
            raise DataError(
                f"cannot lock {path}: {error.strerror}; set data.folder to a disk that supports file locks"
            ) from error
        yield waited
