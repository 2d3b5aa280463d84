"""Prepared tokens, with what a person sees while they are made."""

from __future__ import annotations

from shoal.config import Data
from shoal.data.prepare import Prepared, prepare
from shoal.metrics.console import Console


def open_data(data: Data, console: Console, *, rows: int | None = None) -> Prepared:
    """The tokens of `data` for a model of so many `rows`, made now where they are not there. One process makes them."""
    with console.progress("preparing") as progress:
        prepared = prepare(data, progress, rows=rows)
    for note in prepared.notes:
        console.warn(note)
    return prepared
