"""What is printed: control characters made visible; an output that cannot be written costs one message, or none. No torch."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from shoal.errors import ShoalError

# What a terminal obeys, or what turns a line round: C0 and C1 but for tab and line feed, line separators, marks of
# direction; and the lone surrogates that stand for bytes of a file's name that are no UTF-8.
_UNSEEN: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """`text` with its control characters written out, as `\\x1b`; lines stay lines. All that a person is told passes here."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def on_one_line(name: object) -> str:
    """A name from outside, of a file or a run: `visible`, its line feeds and tabs too."""
    return visible(name).replace("\n", "\\n").replace("\t", "\\t")


def say_error(text: str) -> None:
    """Print the one message of a `ShoalError` on standard error."""
    print(f"shoal: {visible(text)}", file=sys.stderr, flush=True)


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
