"""
Remote files of a corpus, downloaded once to <data.folder>/downloads and then read as local files. No torch.

downloads/HASH/NAME             a whole file; HASH is that of its URL without credentials
downloads/HASH/download.json    its URL, its size, and the ETag and time of change that the server stated
downloads/HASH/.NAME.part       an unfinished download, which the next one resumes if the file is unchanged
downloads/HASH/.part.json       the same for the unfinished download
downloads/HASH/.lock            held by the downloading process
downloads/HASH/listing.json     for a pattern or a folder: the URLs of its files
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit

from shoal.data.corpus.remote_body import Body, LostConnectionError, Version, list_remote, open_remote
from shoal.errors import DataError
from shoal.system.disk import NoLocksError, gigabytes, sync, take_lock, write_whole
from shoal.system.secrets import without_secrets

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

FRUITLESS_TRIES = 3  # consecutive connections without data
PAUSE_SECONDS = 1.0  # after such a connection
NAME_CHARACTERS = 120  # maximum length of a file's name, which file systems limit to 255 bytes
_ODD = re.compile(r"[^\w.=+-]+")


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Downloads:
    """
    The downloaded files of `folder`. Whole ones are used without asking their server.

    refresh: compare each with its server's, and download it again if it has changed there. offline: download nothing.
    """

    folder: Path
    refresh: bool = False
    offline: bool = False
    progress: Progress = no_progress

    def bring(self, url: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
        """
        Yield (name, local path) of each file that a URL names, in order; download it if it is missing.

        suffixes: those of the files to take from a folder. The name is the URL without credentials. Raises DataError if a file
        does not exist, cannot be reached or does not fit on the disk.
        """
        try:
            for file in self._listed(url, suffixes):
                yield name_of(file), self._file(file)
        except OSError as error:
            raise DataError(
                f"cannot read or write {error.filename or self.folder}: {error.strerror or error}; {_cure(error)}"
            ) from error

    def _listed(self, url: str, suffixes: tuple[str, ...]) -> list[str]:
        """Return the URLs of the files that a URL names, as found when it was first listed."""
        place = self._place(url)
        listing = place.folder / "listing.json"
        if not self.refresh and listing.exists():
            return [str(file) for file in json.loads(listing.read_bytes())["files"]]
        if place.is_whole():
            return [url]
        by_hand = "set data.paths to a folder with its files" if "*" in url else f"put it at {place.file}"
        self._check_online(url, by_hand)
        found = _trying(url, lambda: list_remote(url, suffixes), by_hand)
        if found != [url]:
            place.folder.mkdir(parents=True, exist_ok=True)
            write_whole(listing, [_json({"url": without_secrets(url), "files": found})])
        return found

    def _file(self, url: str) -> Path:
        """Return the local path of one file, downloaded if it is missing."""
        place = self._place(url)
        if place.is_whole() and not self.refresh:
            return place.file
        by_hand = f"put it at {place.file}"
        self._check_online(url, by_hand)
        place.folder.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process, which downloads {place.file.name}"
        with (place.folder / ".lock").open("ab") as lock:
            take_lock(lock, lambda: self.progress(waiting, 0, 0))
            if not place.is_whole() or (self.refresh and _has_changed(url, place)):
                _trying(url, lambda: self._receive(url, place), by_hand, place.part)
        return place.file

    def _place(self, url: str) -> _Place:
        digest = hashlib.blake2b(without_secrets(url).encode(), digest_size=8).hexdigest()
        return _Place(self.folder / digest, _file_name(url))

    def _check_online(self, url: str, by_hand: str) -> None:
        """Raise DataError if nothing may be downloaded."""
        from huggingface_hub import constants

        why = "is not downloaded" if self.offline else "is not downloaded, and HF_HUB_OFFLINE is set"
        if self.offline or constants.HF_HUB_OFFLINE:
            raise DataError(f"{name_of(url)} {why}; without a network, {by_hand}")

    def _receive(self, url: str, place: _Place) -> None:
        """Download one file, from where the last try ended if it is unchanged; put it in place if it is whole."""
        before, start = place.version(place.part_record), place.received()
        if before is None or before.bytes is None or start != before.bytes:
            with open_remote(url, start, before) as body, place.open_part(url, body) as out:
                total = body.version.bytes or 0
                _check_space(url, place, total - body.start)
                for chunk in body.chunks:
                    out.write(chunk)
                    self.progress(f"downloading {place.name}", out.tell(), total)
        _check_size(url, place)
        place.finish()


def _cure(error: OSError) -> str:
    if isinstance(error, NoLocksError):
        return "set data.folder to a disk that supports file locks"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or set data.folder to a larger disk, then start again: the download resumes"
    return "set data.folder to a writable folder"


def _check_size(url: str, place: _Place) -> None:
    """Raise `LostConnectionError` if bytes are missing, DataError if there are too many."""
    version, received = place.version(place.part_record), place.received()
    if version is None or version.bytes is None:
        return
    if received < version.bytes:
        raise LostConnectionError("cut short")
    if received > version.bytes:
        place.part.unlink()
        raise DataError(
            f"{name_of(url)} has more bytes than the {version.bytes:,} that its server stated; try again later"
        )


def _check_space(url: str, place: _Place, needed: int) -> None:
    free = shutil.disk_usage(place.folder).free
    if needed > free:
        raise DataError(
            f"{name_of(url)} needs {gigabytes(needed)} more, but the disk of {place.folder} has {gigabytes(free)} free; free "
            "some space or set data.folder to a larger disk"
        )


def _has_changed(url: str, place: _Place) -> bool:
    """Return whether the server has another version than the downloaded one. A file without a record is the user's own."""
    before = place.version(place.record)
    if before is None:
        return False

    def look() -> Version:
        with open_remote(url) as body:
            return body.version

    return _trying(url, look, "unset data.rebuild to use the downloaded copy") != before


def _trying(url: str, action: Callable[[], T], by_hand: str, part: Path | None = None) -> T:
    """
    Return what `action` returns. part: the file that it extends; if it does, it is repeated after lost connections.

    Raises DataError after several tries that did not extend the file.
    """
    fruitless, size = 0, 0
    while True:
        try:
            return action()
        except LostConnectionError as error:
            grown = part is not None and part.exists() and part.stat().st_size > size
            size = part.stat().st_size if part is not None and part.exists() else 0
            fruitless = 0 if grown else fruitless + 1
            if fruitless >= FRUITLESS_TRIES or part is None:
                raise DataError(
                    f"cannot read {name_of(url)} ({error}); later, the same command resumes; without a network, {by_hand}"
                ) from None
            time.sleep(PAUSE_SECONDS if fruitless else 0)


def name_of(url: str) -> str:
    """Return a remote file's name in listings and messages: its URL without credentials, ending with the file's suffix."""
    address = without_secrets(url)
    plain = urlsplit(address)._replace(query="", fragment="").geturl()
    return plain if "." in plain.rpartition("/")[2] else address


def _file_name(url: str) -> str:
    """Return a name for the local file, with the suffix of the remote one."""
    last = unquote(name_of(url).rstrip("/").rpartition("/")[2])
    return _ODD.sub("_", last).lstrip(".")[-NAME_CHARACTERS:] or "file"


def _json(fields: object) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


@dataclass(frozen=True)
class _Place:
    """The local files of one remote file."""

    folder: Path
    name: str

    @property
    def file(self) -> Path:
        return self.folder / self.name

    @property
    def part(self) -> Path:
        return self.folder / f".{self.name}.part"

    @property
    def record(self) -> Path:
        return self.folder / "download.json"

    @property
    def part_record(self) -> Path:
        return self.folder / ".part.json"

    def is_whole(self) -> bool:
        """Return whether the file is there, with the size of its record. Without a record, a person put it there."""
        if not self.file.is_file():
            return False
        version = self.version(self.record)
        return version is None or self.file.stat().st_size == version.bytes

    def received(self) -> int:
        """Return the bytes of the unfinished file."""
        return self.part.stat().st_size if self.part.exists() else 0

    def version(self, record: Path) -> Version | None:
        """Return what a record says of the remote file; None if there is none, or it cannot be read."""
        try:
            fields = json.loads(record.read_bytes())
            size = fields["bytes"]
            return Version(None if size is None else int(size), str(fields["etag"]), str(fields["modified"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def open_part(self, url: str, body: Body) -> IO[bytes]:
        """Open the unfinished file: to append the rest, or empty for a whole body."""
        if body.start == 0:
            write_whole(self.part_record, [_json({"url": without_secrets(url), **vars(body.version)})])
        return self.part.open("ab" if body.start else "wb")

    def finish(self) -> None:
        """Put the complete part in place, flushed to disk, then its record."""
        with self.part.open("rb") as file:
            os.fsync(file.fileno())
        stated = json.loads(self.part_record.read_bytes()) | {"bytes": self.received()}
        self.part.replace(self.file)
        write_whole(self.record, [_json(stated)])
        self.part_record.unlink()
        sync(self.folder)
