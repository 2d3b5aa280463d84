"""A generated corpus, for runs without data. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from shoal.data.corpus.documents import START, CorpusFile, Cursor, Document, Skipped


class DummyCorpus:
    """Generated sentences that a model can learn: a pure function of the document's number."""

    _ADJECTIVES = ("blue", "small", "loud", "old", "quick", "salty", "bright", "calm")
    _NOUNS = ("herring", "tide", "harbour", "lantern", "net", "gull", "current", "reef")
    _VERBS = ("follows", "passes", "finds", "hides from", "outruns", "circles", "remembers", "waits for")

    held_out_files = 0

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def listing(self) -> list[CorpusFile]:
        return [CorpusFile("dummy", self._documents, 0)]

    def digest(self, index: int) -> str:
        return "generated"

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        for number in range(start.document, self._documents):
            yield Document(f"dummy {number}", self._text(number), Cursor(0, number + 1, number + 1))

    def skipped_files(self) -> Mapping[str, int]:
        return {}

    def _text(self, number: int) -> str:
        draw = random.Random(number)
        sentences = []
        for _ in range(draw.randint(4, 24)):
            first, second = draw.choice(self._NOUNS), draw.choice(self._NOUNS)
            sentences.append(f"The {draw.choice(self._ADJECTIVES)} {first} {draw.choice(self._VERBS)} the {second}.")
        return f"Story {number}. " + " ".join(sentences) + "\n"
