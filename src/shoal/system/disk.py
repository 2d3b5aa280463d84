"""Atomic writes, hashes and locks of files. No torch. Errors of the file system are raised as `OSError`."""

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
    """A file system without locks."""


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """
    Write `parts` to `path` atomically: after a power cut, too, the file has all of them or its old content.

    Writes a temporary file, flushes and renames it; on failure the temporary file is removed.
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
    """Flush a file or a folder to disk; a rename is stored in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Remove the contents of a folder but not the folder, which may be locked."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def replace_folder(new: Path, folder: Path) -> None:
    """
    Rename folder `new` to `folder`, replacing an existing folder.

    A reader with an open file of the old folder keeps reading it. A kill between the two renames leaves `.NAME.old`, and
    `new` under its temporary name.
    """
    sync(new)
    old = folder.with_name(f".{folder.name}.old")
    old.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(tempfile.mkdtemp(dir=old))  # onto the empty folder just made
    new.rename(folder)
    sync(folder.parent)
    # A network file system keeps files that are open; the next call removes them
    shutil.rmtree(old, ignore_errors=True)


def gigabytes(count: int) -> str:
    """Format bytes as "1.2 GB", "3.4 MB" or "5.6 kB"."""
    size, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= s / 10 or u == "kB")
    return f"{count / size:,.1f} {unit}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_lock(file: IO[Any], while_waiting: Callable[[], None]) -> bool:
    """
    Lock `file` until it is closed, waiting for another process if necessary; return whether it had to wait.

    The kernel drops the lock when its holder dies, for any reason. `while_waiting` is called about five times a second.
    Raises `NoLocksError` if the file system has no locks.
    """
    waited = False
    while not try_lock(file.fileno()):
        waited = True
        while_waiting()
        time.sleep(LOCK_POLL_SECONDS)
    return waited


def try_lock(descriptor: int) -> bool:
    """
    Lock an open file or folder; return False if another process holds the lock.

    Raises `NoLocksError` if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocksError(error.errno, error.strerror) from error
    return True
