"""
Windows of many curves in one answer, as numbers: formatting and reading text would take longer than all else. No torch.

Asked for with a list of JSON, an object a window:

    {"run": NAME, "name": "loss", "first": 0, "last": 1000, "columns": 800, "had": [GENERATION, START, WIDTH, STOP] or null}

`had` is what the asker has of this window already; if its buckets are still right, the answer has only the new ones.

    length of the header: 4 bytes, little-endian
    header: JSON, an object a window, null for a run that is not there or was not read yet; padded to a multiple of 8 bytes
        {"keep": buckets that the asker keeps, "buckets": that follow them, "had": for the next time}
    for each window its step, tokens and seconds in float64, then low, high, mean, count and gaps in float32
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.report.curves.curves import Curves, Window

MOST_COLUMNS: Final = 10_000
PLACES: Final = ("step", "tokens", "seconds")
VALUES: Final = ("low", "high", "mean", "count", "gaps")


@dataclass(frozen=True)
class Wanted:
    """A window that is asked for. Raises `TypeError` if it is not of these types."""

    run: str
    name: str
    first: int
    last: int
    columns: int
    had: list[Any] | None = None

    def __post_init__(self) -> None:
        numbers = (self.first, self.last, self.columns)
        texts = (self.run, self.name)
        if not all(type(each) is int and abs(each) <= 2**53 for each in numbers) or not all(
            type(t) is str for t in texts
        ):
            raise TypeError("a window has a run, a name, and whole numbers")


@dataclass(frozen=True)
class Answer:
    """The buckets of a window after the first `keep`."""

    window: Window
    keep: int
    had: list[Any]


def answer(wanted: Wanted, curves: Curves | None) -> Answer | None:
    """Return the buckets that the asker does not have; None if there are no curves."""
    if curves is None:
        return None
    generation = curves.generation
    window = curves.window(wanted.name, wanted.first, wanted.last, min(max(wanted.columns, 1), MOST_COLUMNS))
    stop = window.start + int(window.count.sum())
    had = [generation, window.start, window.width, stop]
    keep = 0
    if isinstance(wanted.had, list) and wanted.had[:3] == had[:3] and type(wanted.had[3]) is int:
        keep = max(0, min(wanted.had[3], stop) // window.width - window.start // window.width)
        keep = len(window) if wanted.had[3] == stop else keep
    return Answer(window, keep, had)


def packed(answers: Sequence[Answer | None]) -> bytes:
    """Return the answers as bytes."""
    header = [
        None if each is None else {"keep": each.keep, "buckets": len(each.window) - each.keep, "had": each.had}
        for each in answers
    ]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 8)
    parts = [len(text).to_bytes(4, "little"), text]
    for each in answers:
        if each is not None:
            parts += [getattr(each.window, name)[each.keep :].astype("<f8").tobytes() for name in PLACES]
            values = b"".join(getattr(each.window, name)[each.keep :].astype("<f4").tobytes() for name in VALUES)
            parts.append(values + b"\0" * (-len(values) % 8))
    return b"".join(parts)
