"""The transfer of a repository's files from a hub: each one resumed, verified and flushed to disk. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shoal.hub.listing import Remote, RemoteFile
from shoal.hub.remote import download
from shoal.hub.repository import Repository
from shoal.system.disk import gigabytes, sha256_of

Progress = Callable[[str, int, int], None]
"""Called with the current file's name, the bytes present and the bytes in total, both summed over all files."""


class Transfer:
    """Transfers the files of a repository, one after the other, into the partial folder."""

    def __init__(self, repository: Repository, remote: Remote, folder: Path, partial: Path, progress: Progress) -> None:
        self.total_bytes = 0
        self._repository, self._remote = repository, remote
        self._folder, self._partial, self._progress = folder, partial, progress
        self._done_bytes = 0
        self._checked: dict[str, str] = {}  # name -> SHA-256

    def start(self, wanted: list[RemoteFile]) -> None:
        """Reuse files of the old folder whose size matches. Raises the repository's `error` if the others do not fit on the disk."""
        self.total_bytes = sum(file.bytes for file in wanted)
        for file in wanted:
            (self._partial / file.name).parent.mkdir(parents=True, exist_ok=True)
            self._take_over(file)
        here = sum(self._bytes_here(file) for file in wanted)
        needed, free = self.total_bytes - here, shutil.disk_usage(self._partial).free
        if needed > free:
            raise self._repository.error(
                f"{self._remote.name} needs {gigabytes(needed)} more, but the disk of {self._folder} has {gigabytes(free)} free; "
                "free some space, or give --to a folder on a larger disk"
            )

    def bring(self, file: RemoteFile) -> str:
        """
        Put a file into the partial folder, flushed and verified; return its SHA-256.

        Raises the repository's `error` if it cannot be downloaded or has another hash than the hub states, `OSError` if the
        disk fails.
        """
        path = self._partial / file.name
        if file.name not in self._checked:
            if self._is_whole(path, file):
                self._advance(file, file.bytes)
            else:
                self._download(path, file)
            self._checked[file.name] = sha256_of(path) if file.sha256 is None else file.sha256
        return self._checked[file.name]

    def _download(self, path: Path, file: RemoteFile) -> None:
        part = self._part(file)
        part.touch()
        self._advance(file, part.stat().st_size)
        download(
            self._repository, self._remote.commit, file, part, self._folder, lambda count: self._advance(file, count)
        )
        if not self._is_whole(part, file):
            part.unlink()
            raise self._repository.error(
                f"the hash of {self._remote.name}'s {file.name} differs from the hub's: the download is damaged; repeat "
                "the command to fetch that file again"
            )
        _flush(part)
        part.replace(path)

    def _take_over(self, file: RemoteFile) -> None:
        """Link a file of the old folder if its size matches; `bring` verifies its content."""
        path, old = self._partial / file.name, self._folder / file.name
        if not path.exists() and not self._part(file).exists() and old.is_file() and old.stat().st_size == file.bytes:
            with contextlib.suppress(OSError):  # for disks without hard links
                os.link(old, path)

    def _part(self, file: RemoteFile) -> Path:
        """Return the unfinished file, named by its content: after a new commit, only an unchanged file is resumed."""
        return self._partial / f".{file.hash[:16]}.part"

    def _bytes_here(self, file: RemoteFile) -> int:
        path, part = self._partial / file.name, self._part(file)
        if path.exists() and path.stat().st_size == file.bytes:
            return file.bytes
        return part.stat().st_size if part.exists() else 0

    def _is_whole(self, path: Path, file: RemoteFile) -> bool:
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
        self._progress(f"checking {file.name}", self._done_bytes, self.total_bytes)
        return (sha256_of(path) if file.sha256 else git_sha1_of(path)) == file.hash

    def _advance(self, file: RemoteFile, count: int) -> None:
        self._done_bytes += count
        self._progress(file.name, self._done_bytes, self.total_bytes)


def git_sha1_of(path: Path) -> str:
    """Return git's blob hash of a file, in hexadecimal."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
