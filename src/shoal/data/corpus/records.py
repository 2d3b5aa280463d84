"""Records, such as lines of JSON or rows of a table, and the documents that they become. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.data.corpus.documents import Cursor, Document, Skipped
from shoal.errors import DataError
from shoal.system.output import on_one_line

COLUMNS_AT_MOST = 20  # maximum number of columns named in a message
NAME_CHARACTERS = 60  # maximum length of a column's name in a message


@dataclass(frozen=True)
class Shape:
    """
    How a record becomes a document.

    key: the record's main field. document: a function of a record (any value that JSON can hold), its name and the cursor
    after it, which returns the document or the reason why there is none. columns: the columns of a table that it needs, None
    for all.
    """

    key: str
    document: Callable[[Any, str, Cursor], Document | Skipped]
    columns: tuple[str, ...] | None = None


def text_shape(text_key: str) -> Shape:
    """Return the shape of records with a text under `text_key`."""

    def document(record: Any, name: str, after: Cursor) -> Document | Skipped:
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = record.items() if isinstance(record, dict) else ()
            texts = {key: len(said) for key, said in fields if isinstance(said, str)}
            return Skipped(name, f"no string under {text_key!r} (data.text_key)", after, texts)
        if not text:
            return Skipped(name, "empty text", after)
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can encode half of a surrogate pair
            return Skipped(name, "half a surrogate pair, not a character", after)
        return Document(name, text, after)

    return Shape(text_key, document, (text_key,))


def check_columns(there: Sequence[str], shape: Shape, name: str) -> None:
    """Raise DataError, naming the columns of a table, if it lacks one that the shape needs."""
    twice = [column for column in shape.columns or () if there.count(column) > 1]
    if twice:
        raise DataError(f"{on_one_line(name)} has the column {on_one_line(twice[0])} twice; rename one of the two")
    missing = [column for column in shape.columns or () if column not in there]
    if missing:
        named = ", ".join(on_one_line(column[:NAME_CHARACTERS]) for column in there[:COLUMNS_AT_MOST])
        named += ", ..." if len(there) > COLUMNS_AT_MOST else ""
        raise DataError(
            f"{on_one_line(name)} has no column {on_one_line(missing[0])}; its columns are {named}; set data.text_key to the one "
            "with the text"
        )
