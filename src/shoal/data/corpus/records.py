"""Records, such as lines of JSON or rows of a table, and the documents that they become. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.data.corpus.documents import Cursor, Document, Skipped


@dataclass(frozen=True)
class Shape:
    """
    How a record becomes a document.

    key: the record's main field. document: a function of a record (any value that JSON can hold), its name and the cursor
    after it, which returns the document or the reason why there is none.
    """

    key: str
    document: Callable[[Any, str, Cursor], Document | Skipped]


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
            text.isascii() or text.encode()
        except UnicodeEncodeError:  # JSON can encode half of a surrogate pair
            return Skipped(name, "half a surrogate pair, not a character", after)
        return Document(name, text, after)

    return Shape(text_key, document)
