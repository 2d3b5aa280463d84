"""Printing: control characters become visible, and an unwritable output gives one error message, or none. No torch."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from shoal.errors import ShoalError

# Characters that control a terminal or reorder a line: C0 and C1 except tab and line feed, line separators, directional
# marks; and the lone surrogates that represent non-UTF-8 bytes of file names.
_UNSEEN: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Return `text` with control characters escaped, as `\\x1b`; line feeds stay. All output for users passes through here."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def on_one_line(name: object) -> str:
    """Return an untrusted name, of a file or a run, with line feeds and tabs escaped too."""
    return visible(name).replace("\n", "\\n").replace("\t", "\\t")


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return a line of text for each row, its cells aligned to the right, or to the left in the columns `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def say_error(text: str) -> None:
    """Print the message of a `ShoalError` on standard error."""
    print(f"shoal: {visible(text)}", file=sys.stderr, flush=True)


class Output:
    """A text stream that raises `ShoalError` if it cannot be written, and `BrokenPipeError` if its reader is gone."""

    def __init__(self, stream: Any) -> None:
        # Python sets the stream to None if the descriptor is closed (`>&-`)
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        with self._handled():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._handled():
            self._stream.flush()

    def silence(self) -> None:
        """Discard buffered and later output."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _handled(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.silence()
            raise ShoalError(f"cannot write standard output: {error.strerror}") from None


class Outlasting(Output):
    """A stream that never raises: after a full disk it tries again with the next line; after a closed pipe it discards output."""

    @contextmanager
    def _handled(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                self.silence()


def outlast() -> None:
    """Keep this process alive from now on if its output or its error messages cannot be written."""
    sys.stdout, sys.stderr = (Outlasting(getattr(s, "_stream", s)) for s in (sys.stdout, sys.stderr))
