"""
Join the lines of WikiText, which are rows or lines of its files, into pages, and undo its tokenization. No torch.

Both as lm-evaluation-harness does in its task `wikitext`, so that bits per byte can be compared: a model reads the detokenized
text, and the bytes are those of the page before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Document, Skipped
from shoal.errors import DataError
from shoal.system.output import on_one_line

MAX_PAGE_CHARACTERS = 1 << 26  # the longest page of WikiText-103 has some 100,000
# What WikiText's tokenizer separated, and how it is written. In this order: a later pair may apply to an earlier one's result.
SEPARATED = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
BRACKETS = tuple(
    (re.compile(rf"{opens}\s*([^{closes}]*?)\s*{closes}"), rf"{written[0]}\1{written[1]}")
    for opens, closes, written in (
        (r"\(", r"\)", "()"),
        (r"\[", r"\]", "[]"),
        ("{", "}", "{}"),
        ('"', '"', '""'),
        ("'", "'", "''"),
    )
)
MARKUP = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
BLANK = " "  # a blank line in WikiText's own files; tables have an empty text instead


class WikiText:
    """
    The pages of a corpus whose documents are lines: from one ` = Title = ` to the next, in the order of its files.

    The files are one sequence of lines, since a page of a table may begin in one file and end in the next. Pages are those of
    lm-evaluation-harness, byte for byte: https://huggingface.co/datasets/EleutherAI/wikitext_document_level
    """

    held_out_files = 0

    def __init__(self, lines: Corpus) -> None:
        self._lines = lines

    def listing(self) -> list[CorpusFile]:
        return self._lines.listing()

    def digest(self, index: int) -> str:
        return self._lines.digest(index)

    def skipped_files(self) -> Mapping[str, int]:
        return self._lines.skipped_files()

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        page, name, after, characters = list[str](), "", start, 0
        for item in self._lines.read(start):
            if isinstance(item, Skipped):
                yield item
            else:
                line = item.text.removesuffix("\n") or BLANK
                if is_title(line):
                    yield from _document(page, name, after)
                    page, characters = [], 0
                name = name if page else item.name
                page.append(line)
                characters += len(line)
                if characters > MAX_PAGE_CHARACTERS:
                    raise DataError(
                        f"{on_one_line(name)}: no ` = Title = ` follows in {MAX_PAGE_CHARACTERS:,} characters, so this is not "
                        "WikiText; set data.wikitext to false"
                    )
            after = item.after
        yield from _document(page, name, after)


def is_title(line: str) -> bool:
    """Return whether a line is the title of a page: ` = Title = `, but not ` = = Section = = `."""
    text = line.strip()
    marked = text.startswith("= ") and text.endswith(" =") and len(text) > len("= =")
    return marked and not text.startswith("= =") and not text.endswith("= =")


def _document(page: list[str], name: str, after: Cursor) -> Iterator[Document]:
    """Yield the page, unless it is blank: what precedes the first title."""
    text = "\n".join(page)
    if text.strip():
        yield Document(name, detokenize(text), after, counted_bytes=len(text.encode()))


def detokenize(page: str) -> str:
    """Return a page as it is written: "1 @,@ 000 ( meters )" becomes "1,000 (meters)"."""
    for separated, written in SEPARATED:
        page = page.replace(separated, written)
    for bracket, written in BRACKETS:
        page = bracket.sub(written, page)
    for marked, written in MARKUP:
        page = page.replace(marked, written)
    return page
