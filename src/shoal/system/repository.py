"""The git repository that a user works in: its commit, its branch, and whether files differ from the commit. No torch."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Final, Self

PATIENCE_SECONDS: Final = 1.0  # for git, counted from the start of the look; in a large repository it may take longer

# Take no lock that the user's own git may need, and run no program that the repository names.
_COMMAND: Final = (
    "git", "--no-optional-locks", "-c", "core.fsmonitor=false",
    "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=all",
)  # fmt: skip


class Look:
    """A look at a folder's repository, by `git` and in a thread: the caller does other work until it asks for the result."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._until = folder, time.monotonic() + PATIENCE_SECONDS
        self._found: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._look, name="git", daemon=True)

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Begin to look at the repository that `folder` is in."""
        look = cls(folder)
        look._thread.start()
        return look

    def found(self) -> dict[str, Any] | None:
        """
        Return the repository's "commit" and "branch", None if there is none, and "dirty": whether tracked files differ.

        None outside a repository, without `git`, and if it takes longer than `PATIENCE_SECONDS` since the look began.
        """
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._found

    def _look(self) -> None:
        try:
            done = subprocess.run(
                _COMMAND, cwd=self._folder, capture_output=True, stdin=subprocess.DEVNULL, check=True,
                timeout=PATIENCE_SECONDS, env=os.environ | {"LC_ALL": "C"},
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError):
            return
        self._found = read_status(done.stdout.decode("utf-8", "replace"))


def read_status(text: str) -> dict[str, Any]:
    """Return commit, branch and dirty from the output of `git status --porcelain=v2 --branch`."""
    lines = text.splitlines()
    named = dict(line[2:].partition(" ")[::2] for line in lines if line.startswith("# "))
    commit, branch = named.get("branch.oid", ""), named.get("branch.head", "")
    return {
        "commit": None if commit in ("", "(initial)") else commit,
        "branch": None if branch in ("", "(detached)") else branch,
        "dirty": any(not line.startswith("#") for line in lines),
    }
