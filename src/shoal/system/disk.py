"""Files that are either whole or not there, what they hold, and who holds them. No torch; raises `OSError`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

LOCK_POLL_SECONDS = 0.2


class NoLocksError(OSError):
    """The disk of a file has no locks."""


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """
    Write `parts` to `path`: a reader, or a run after a power cut, sees all of them or what was there before.

    Written aside, flushed, renamed; what was written aside is removed where that fails.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder: a rename lives in the folder, and not in the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Remove all that is in a folder, and not the folder: it may be locked."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def replace_folder(new: Path, folder: Path) -> None:
    """
    Rename a whole folder into place, of what is there too.

    Who has a file of the old one open keeps reading the old one. What a kill between the two renames leaves is
    `.NAME.old`, and `new` as it is.
    """
    sync(new)
    old = folder.with_name(f".{folder.name}.old")
    old.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(tempfile.mkdtemp(dir=old))  # over the empty one
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)  # a network disk keeps what is still read; the next call removes that


def gigabytes(count: int) -> str:
    """ "1.2 GB", "3.4 MB", "5.6 kB"."""
    size, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= s / 10 or u == "kB")
    return f"{count / size:,.1f} {unit}"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_lock(file: IO[Any], while_waiting: Callable[[], None]) -> bool:
    """
    Hold `file` against other processes until it is closed; says whether another one had it before us.

    The kernel drops the lock when its holder dies, however it dies. `while_waiting` is called about
    five times a second. Raises `NoLocksError`.
    """
    waited = False
    while not try_lock(file.fileno()):
        waited = True
        while_waiting()
        time.sleep(LOCK_POLL_SECONDS)
    return waited


def try_lock(descriptor: int) -> bool:
    """Hold an open file or folder against other processes, unless one has it. Raises `NoLocksError`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocksError(error.errno, error.strerror) from error
    return True
