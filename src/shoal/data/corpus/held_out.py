"""A corpus with held-out files of its own. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Document, Skipped


class HeldOutFirst:
    """
    The documents of held-out files, then those of training files.

    Held-out files come first, so that of two equal documents the held-out one is the earlier.
    """

    def __init__(self, held_out: Corpus, training: Corpus) -> None:
        self._held_out, self._training = held_out, training
        self._border = len(held_out.listing())

    @property
    def held_out_files(self) -> int:
        return self._border

    def listing(self) -> list[CorpusFile]:
        return [*self._held_out.listing(), *self._training.listing()]

    def digest(self, index: int) -> str:
        if index < self._border:
            return self._held_out.digest(index)
        return self._training.digest(index - self._border)

    def skipped_files(self) -> Mapping[str, int]:
        return Counter(self._held_out.skipped_files()) + Counter(self._training.skipped_files())

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        """Yield the items after `start`. The cursors of training files follow those of held-out files."""
        if start == START:
            next(iter(self._training.read()), None)  # a missing column is an error now, not after the held-out files
        if start.file < self._border:
            yield from self._held_out.read(start)
            start = Cursor(self._border)
        for item in self._training.read(replace(start, file=start.file - self._border)):
            yield self._moved(item)

    def _moved(self, item: Document | Skipped) -> Document | Skipped:
        after = Cursor(item.after.file + self._border, item.after.document, item.after.offset)
        if isinstance(item, Skipped):
            return Skipped(item.name, item.reason, after, item.fields, item.damaged)
        # written out, because `replace` takes three times as long, for each document
        return Document(item.name, item.text, after, item.conversation, item.counted_bytes)
