"""Read text files: a file is a document, or several; or a separator line divides it. Files of any size are streamed. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.data.corpus.documents import Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import without_mark
from shoal.data.corpus.streams import TOO_LONG, Stream, numbered_lines, stream_reader

PIECE_BYTES = 1 << 20  # longer text files become several documents, to bound memory


def text_reader(piece_bytes: int = PIECE_BYTES) -> Reader:
    """Return a reader that makes one document of a file, or several of at most `piece_bytes`, each ending at a line end if possible."""
    return stream_reader(lambda stream, name, start: _read_pieces(stream, name, start, piece_bytes))


def separated_reader(separator: str, piece_bytes: int = PIECE_BYTES) -> Reader:
    """Return a reader that makes a document of the lines between two lines that consist of `separator`."""
    line = separator.strip().encode()
    return stream_reader(lambda stream, name, start: _read_separated(stream, name, start, line, piece_bytes))


def line_reader() -> Reader:
    """Return a reader that makes a document of each line, empty ones included, without its line end."""
    return stream_reader(_read_lines)


def _read_pieces(stream: Stream, name: str, start: Cursor, piece_bytes: int) -> Iterator[Document | Skipped]:
    stream.seek(start.offset)
    index, offset = start.document, start.offset
    ahead = stream.read(piece_bytes + 1)
    whole = offset == 0 and len(ahead) <= piece_bytes
    while ahead:
        piece = ahead if whole else _cut(ahead[:piece_bytes], piece_bytes)
        begin, offset = offset, offset + len(piece)
        text = piece if begin else without_mark(piece)
        if text:
            index += 1
            label = name if whole else f"{name} (bytes {begin} to {offset})"
            yield _parse_piece(text, label, Cursor(start.file, index, stream.place(offset)))
        ahead = ahead[len(piece) :]
        ahead += stream.read(piece_bytes + 1 - len(ahead))


def _read_separated(
    stream: Stream, name: str, start: Cursor, separator: bytes, piece_bytes: int
) -> Iterator[Document | Skipped]:
    """Yield a document per part. A part of more than `piece_bytes` becomes several documents; blank parts are skipped."""
    stream.seek(start.offset)
    index, offset, ahead, at, ended = start.document, start.offset, b"", 0, False
    while True:
        if not ended and len(ahead) - at <= piece_bytes:
            more = stream.read(2 * piece_bytes)
            ahead, at, ended = ahead[at:] + more, 0, not more
            continue
        if at == len(ahead):
            return
        piece, after = _next_part(ahead, at, separator, piece_bytes, ended)
        begin, offset, at = offset, offset + after - at, after
        text = piece if begin else without_mark(piece)
        index += 1
        label, cursor = f"{name} (bytes {begin} to {offset})", Cursor(start.file, index, stream.place(offset))
        if text.strip():
            yield _parse_piece(text, label, cursor)
        elif at < len(ahead):  # what follows the last separator is not a document if it is blank
            yield Skipped(label, "empty text", cursor)


def _next_part(ahead: bytes, at: int, separator: bytes, piece_bytes: int, ended: bool) -> tuple[bytes, int]:
    """
    Return the part that begins at `at`, and where the next one begins.

    Depends on nothing before `at`, so reading can resume there. A line longer than half a piece may therefore be cut just
    before the separator's text, which then counts as a separator line.
    """
    limit = at + piece_bytes
    search = at
    while (found := ahead.find(separator, search, limit)) >= 0:
        line, end = max(at, ahead.rfind(b"\n", at, found) + 1), ahead.find(b"\n", found, limit) + 1
        if not end and ended and len(ahead) <= limit:
            end = len(ahead)
        if end and ahead[line:end].strip() == separator:
            return ahead[at:line], end
        search = found + len(separator)
    if ended and len(ahead) <= limit:
        return ahead[at:], len(ahead)
    piece = _cut(ahead[at:limit], piece_bytes)
    return piece, at + len(piece)


def _read_lines(stream: Stream, name: str, start: Cursor) -> Iterator[Document | Skipped]:
    for line, too_long, after in numbered_lines(stream, start):
        label = f"{name}:{after.document}"
        yield Skipped(label, TOO_LONG, after) if too_long else _parse_piece(line.rstrip(b"\r\n"), label, after)


def _parse_piece(piece: bytes, label: str, after: Cursor) -> Document | Skipped:
    if 0 in piece:
        return Skipped(f"{label}, byte {piece.index(0)}", "zero bytes, which no text has", after)
    try:
        return Document(label, piece.decode("utf-8"), after)
    except UnicodeDecodeError as error:
        return Skipped(f"{label}, byte {error.start}", "not UTF-8", after, damaged=True)


def _cut(window: bytes, piece_bytes: int) -> bytes:
    """Return the longest prefix of `window` that ends a paragraph, else a line, else a character."""
    if len(window) < piece_bytes:
        return window
    for ending in (b"\n\n", b"\n"):
        end = window.rfind(ending, len(window) // 2)
        if end >= 0:
            return window[: end + len(ending)]
    end = len(window)
    while end > len(window) - 4 and window[end - 1] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        end -= 1
    if window[end - 1] >= 0xC0:  # first byte of a character that may be incomplete
        end -= 1
    return window[:end] or window
