"""A repository's files as a hub lists them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """A file in the hub's listing, with one of the two hashes."""

    name: str
    bytes: int
    sha256: str | None  # of a file in Git LFS
    git_sha1: str | None  # of the blob, for a file in git itself

    @property
    def hash(self) -> str:
        """The hash of the content: the SHA-256 if the hub states it, else git's."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Remote:
    """A model or a dataset at a commit of its repository."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]
    license: str = ""  # as its card states it; "" if it does not
