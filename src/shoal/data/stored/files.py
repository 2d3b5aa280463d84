"""Atomic writes, folders and locks, with a suggested fix if they fail. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from shoal.errors import DataError
from shoal.system.disk import NoLocksError, take_lock, write_whole

LOCK: Final = ".lock"
UNUSED: Final = frozenset({LOCK, "journal.json"})  # files of a folder in which no work is done yet


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
def locked_folder(folder: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """
    Create a folder and lock it (`exclusive_lock`).

    If the block raises DataError and has written nothing but the folder's journal, the folder is removed again.
    """
    make_folder(folder)
    lock = folder / LOCK
    with exclusive_lock(lock, while_waiting):
        try:
            yield
        except DataError:
            with contextlib.suppress(OSError):
                if {path.name for path in folder.iterdir()} <= UNUSED:
                    for name in UNUSED:
                        (folder / name).unlink(missing_ok=True)
                    folder.rmdir()
            raise


@contextlib.contextmanager
def exclusive_lock(path: Path, while_waiting: Callable[[], None]) -> Iterator[bool]:
    """
    Lock `path` against other processes (`take_lock`); yields whether it had to wait for one of them.

    while_waiting: a function called repeatedly during the wait.
    """
    waited, is_there = False, False
    with contextlib.ExitStack() as files:
        while not is_there:  # the process before this one may have removed the file with its folder
            make_folder(path.parent)
            try:
                file = files.enter_context(path.open("ab"))
                waited = take_lock(file, while_waiting) or waited
            except NoLocksError as error:
                raise DataError(
                    f"cannot lock {path}: {error.strerror}; set data.folder to a disk that supports file locks"
                ) from error
            except OSError as error:
                raise cannot_write(path, error) from error
            is_there = _is_at(file, path)
        yield waited


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
