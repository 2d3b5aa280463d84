"""Records, such as lines of JSON or rows of a table, and the documents that they become. No torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from shoal.data.corpus.documents import Cursor, Document, Skipped
from shoal.errors import DataError
from shoal.system.output import on_one_line

COLUMNS_AT_MOST = 20  # maximum number of columns named in a message
NAME_CHARACTERS = 60  # maximum length of a column's name in a message
TEXT_KEY: Final = "text"  # the default of data.text_key; of conversations, it means the format's usual field
USUAL_KEYS: Final[Mapping[str, str]] = MappingProxyType({
    "alpaca": "output", "messages": "messages", "sharegpt": "conversations",
})  # fmt: skip


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


def text_shape(text_key: str, *, keep_empty: bool = False) -> Shape:
    """Return the shape of records with a text under `text_key`. keep_empty: whether an empty text is a document too."""

    def document(record: Any, name: str, after: Cursor) -> Document | Skipped:
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = record.items() if isinstance(record, dict) else ()
            texts = {key: len(said) for key, said in fields if isinstance(said, str)}
            wrong_type = text is not None or not isinstance(record, dict)
            reason = f"no string under {text_key!r} (data.text_key){looks_like(record, 'text', text_key)}"
            return Skipped(name, reason, after, texts, wrong_type)
        if not text and not keep_empty:
            return Skipped(name, "empty text", after)
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:  # JSON can encode half of a surrogate pair
            return Skipped(name, "half a surrogate pair, not a character", after, damaged=True)
        return Document(name, text, after)

    return Shape(text_key, document, (text_key,))


def looks_like(record: Any, form: str, text_key: str) -> str:
    """
    Return the options to set for a record that looks like a conversation of another format, or under another field.

    form, text_key: `data.format` and `data.text_key` now. "" if they fit, or if the record does not look like one.
    """
    found, field = _conversation_in(record)
    usual = USUAL_KEYS.get(found, "") if text_key == TEXT_KEY or found == "alpaca" else text_key
    options = {"data.format": (found, form), "data.text_key": (field, usual)}
    changed = [f"{option} to {ascii(new).strip(chr(39))}" for option, (new, now) in options.items() if new != now]
    return f"; it looks like {found}: set {' and '.join(changed)}" if found and changed else ""


def _conversation_in(record: Any) -> tuple[str, str]:
    """Return the format of a record's conversation, and its field; "" for both if there is none."""
    if not isinstance(record, dict):
        return "", ""
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return "alpaca", "output"
    for field, said in record.items():
        entry = said[0] if isinstance(said, list) and said else None
        for form, speaker in (("messages", "role"), ("sharegpt", "from")):
            if isinstance(entry, dict) and speaker in entry:
                return form, field
    return "", ""


def check_columns(there: Sequence[str], shape: Shape, name: str) -> None:
    """Raise DataError, naming the columns of a table, if it lacks one that the shape needs."""
    twice = [column for column in shape.columns or () if there.count(column) > 1]
    if twice:
        raise DataError(f"{on_one_line(name)} has the column {on_one_line(twice[0])} twice; rename one of the two")
    missing = [column for column in shape.columns or () if column not in there]
    if missing:
        named = ", ".join(on_one_line(column[:NAME_CHARACTERS] or "(no name)") for column in there[:COLUMNS_AT_MOST])
        named += ", ..." if len(there) > COLUMNS_AT_MOST else ""
        like = [
            form for form, key in USUAL_KEYS.items() if key in there and (form != "alpaca" or "instruction" in there)
        ]
        instead = f"; or, as these look like {like[0]}, data.format to {like[0]}" if like else ""
        raise DataError(
            f"{on_one_line(name)} has no column {on_one_line(missing[0])}; its columns are {named}; set data.text_key to the one "
            f"with the text{instead}"
        )


def from_json(source: bytes, record: Any, label: str, shape: Shape, after: Cursor) -> Document | Skipped:
    """Return the document of a JSON object. source: its JSON, which may have the main field twice; one text would be lost then."""
    found = shape.document(record, label, after)
    if isinstance(found, Skipped):
        return found
    if sum(source.count(spelled) for spelled in _spellings(shape.key)) > 1 and _says_twice(source, shape.key):
        return Skipped(label, f"{shape.key!r} twice, so one text would be lost", after, damaged=True)
    return found


@functools.cache
def _spellings(key: str) -> frozenset[bytes]:
    """Return how JSON may spell a key: unchanged, and with non-ASCII characters escaped."""
    return frozenset(json.dumps(key, ensure_ascii=ascii).encode(errors="surrogatepass") for ascii in (True, False))


def _says_twice(source: bytes, key: str) -> bool:
    """Return whether the object itself, not one nested in it, has `key` more than once."""
    pairs: list[tuple[str, object]] = json.loads(source, object_pairs_hook=list)
    return sum(said == key for said, _ in pairs) > 1
