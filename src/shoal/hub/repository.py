"""What the fetch of a model and the fetch of a dataset do differently. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from shoal.errors import ShoalError
from shoal.hub.listing import Remote, RemoteFile


class Repository(Protocol):
    """A repository on a hub: which of its files are wanted, and the words of messages about it."""

    @property
    def kind(self) -> Literal["model", "dataset"]:
        """The hub's word for it."""

    @property
    def name(self) -> str:
        """Its name on the hub."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the wanted files, to compare with those of an earlier fetch; () if the name alone decides."""

    @property
    def record(self) -> str:
        """The name of the file that records a fetch."""

    @property
    def error(self) -> type[ShoalError]:
        """The class of its errors."""

    def command(self, folder: Path) -> str:
        """Return the command that fetches it to `folder`."""

    def by_hand(self, folder: Path) -> str:
        """Return instructions to provide it without a network."""

    def no_name(self) -> str:
        """Return the message for a name that no repository can have."""

    def close_names(self) -> list[str]:
        """Return known names with a similar spelling."""

    def with_patterns(self, patterns: tuple[str, ...]) -> Repository:
        """Return this repository with these patterns too, for a folder that already holds their files."""

    def choose(self, remote: Remote, bring: Callable[[RemoteFile], Path]) -> list[RemoteFile]:
        """
        Return the wanted files. bring: a function that downloads one file at once and returns its path.

        Raises `error` if the repository lacks what is wanted.
        """

    def remark(self, remote: Remote) -> str:
        """Return what to say before the download, after its size."""

    def check_fetched(self, remote: Remote, folder: Path) -> None:
        """Raise `error` if the files in `folder`, as the hub has them, do not fit together."""

    def check_by_hand(self, folder: Path) -> None:
        """Raise `error` if `folder`, which shoal did not fetch, holds something else."""
