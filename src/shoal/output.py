"""Standard output where it cannot be written: one message, or for what is to outlast it, none. No torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.errors import ShoalError


class Output:
    """A stream of text that raises `ShoalError` where it cannot be written, and `BrokenPipeError` where its reader has gone."""

    def __init__(self, stream: Any) -> None:
        # Python has none where the descriptor was closed (`>&-`)
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        with self._refused():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._refused():
            self._stream.flush()

    def silence(self) -> None:
        """What is still to be written, and all that follows, goes nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.silence()
            raise ShoalError(f"standard output cannot be written: {error.strerror}") from None


class Outlasting(Output):
    """One that raises nothing: where a disk is full, the next line is tried again; a reader that has gone hears no more."""

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                self.silence()


def outlast() -> None:
    """From now on this process does not end because its output, or what it says of errors, cannot be written."""
    sys.stdout, sys.stderr = (Outlasting(getattr(s, "_stream", s)) for s in (sys.stdout, sys.stderr))
