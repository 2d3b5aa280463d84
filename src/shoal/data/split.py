"""Choose which documents are held out, and which of the others the tokenizer is trained on. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shoal.data.corpus.documents import Corpus, Cursor, Document, Skipped
from shoal.data.corpus.paths import count_kinds
from shoal.data.stored.manifest import SplitName
from shoal.data.stored.skips import Skips
from shoal.errors import DataError

FIELDS_AT_MOST = 100  # maximum number of field names to collect, to suggest a data.text_key


def fraction_of(text: bytes) -> tuple[float, float]:
    """
    Return two numbers in [0, 1) that depend on the text alone.

    The first decides whether the text is held out, the second whether the tokenizer's training sample includes it.
    """
    digest = _digest(text)
    return tuple(int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Split:
    """
    Assigns documents to splits. By text: those whose hash is below `border` are held out. By file: those of the first `files`.

    digests: of the texts of held-out files, to count training documents that equal one.
    """

    border: float = 0.0
    files: int = 0
    digests: frozenset[bytes] = frozenset()

    def of(self, text: bytes, after: Cursor) -> SplitName:
        """Return the split of a document. after: the cursor after it."""
        held_out = after.file < self.files if self.files else fraction_of(text)[0] < self.border
        return "val" if held_out else "train"

    def overlaps(self, text: bytes) -> bool:
        """Return whether a held-out file has a document with the text of a training document."""
        return bool(self.digests) and _digest(text) in self.digests


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def choose_split(corpus: Corpus, val_fraction: float, bad_records: int, tick: Callable[[Cursor], None]) -> Split:
    """
    Return how documents are assigned to splits: by their files if the corpus has held-out files, and else by their texts.

    By text, names, order and other texts do not matter. If a split of a small corpus would be empty, it gets the text whose
    hash is nearest to the border between the splits.
    Raises DataError if a split has no documents, if there are no two different texts for two splits, or if more than
    `bad_records` records before them are damaged.
    """
    look = _FirstLook(corpus, bad_records, tick)
    if corpus.held_out_files:
        return _split_by_file(corpus, look)
    seen: set[float] = set()
    for document in look.documents():
        seen.add(fraction_of(document.text.encode())[0])
        if min(seen) < val_fraction <= max(seen):
            return Split(val_fraction)
    if not seen:
        raise DataError(f"the corpus has no documents{look.why_none()}")
    if len(seen) == 1:
        raise DataError(
            "the corpus has one document only (or copies of one), so none can be held out; add documents to data.paths, or set "
            "data.val_paths" + (f" ({look.skips.note()})" if look.skips.count else "")
        )
    # All texts are on one side of the border: move it past the nearest one.
    return Split(sorted(seen)[1] if min(seen) >= val_fraction else max(seen))


def _split_by_file(corpus: Corpus, look: _FirstLook) -> Split:
    """Read the held-out documents, and the training documents up to the first."""
    digests, has_training = set[bytes](), False
    for document in look.documents():
        has_training = document.after.file >= corpus.held_out_files
        if has_training:
            break
        digests.add(_digest(document.text.encode()))
    if not digests:
        raise DataError(f"the held-out files have no documents{look.why_none('data.val_paths')}")
    if not has_training:
        raise DataError(f"the corpus has no documents to train on{look.why_none()}")
    return Split(files=corpus.held_out_files, digests=frozenset(digests))


@dataclass
class _FirstLook:
    """Reads documents before any is encoded, and remembers what was skipped and which fields the records have instead."""

    corpus: Corpus
    bad_records: int
    tick: Callable[[Cursor], None]
    skips: Skips = field(default_factory=Skips)
    fields: Counter[str] = field(default_factory=Counter)

    def documents(self) -> Iterator[Document]:
        """Yield documents. Raises DataError if too many records are damaged."""
        for item in self.corpus.read():
            self.tick(item.after)
            if isinstance(item, Document):
                yield item
                continue
            self.skips.add(item)
            if len(self.fields) < FIELDS_AT_MOST:
                self.fields.update(item.fields)
            self.skips.check(self.bad_records)

    def why_none(self, option: str = "data.paths") -> str:
        """Return the end of the message "the corpus has no documents": what it has instead, and which option to set."""
        said = f": {self.skips.note()}" if self.skips.count else ""
        if files := self.corpus.skipped_files():
            said += f"; files that were skipped: {count_kinds(files)}"
        if "set data." in said:  # the reason for skipping the records has a fix
            return said
        if not self.fields:
            return f"{said}; correct {option} or data.corpus"
        named = ", ".join(ascii(name) for name, _ in self.fields.most_common(10))  # first the fields with the most text
        return f"{said}. The records have text under {named}; set data.text_key to one of them"


def training_sample(
    corpus: Corpus, split: Split, sample_bytes: int, total_bytes: int, tick: Callable[[Cursor], None]
) -> Iterator[str]:
    """
    Yield training texts of about `sample_bytes` in all, chosen evenly over the corpus by their hash.

    total_bytes: size of the corpus without held-out files.
    """
    share, taken = sample_bytes / max(total_bytes, 1), 0
    for document in corpus.read(Cursor(corpus.held_out_files)):
        tick(document.after)
        if isinstance(document, Skipped):
            continue
        text = document.text.encode()
        if fraction_of(text)[1] >= share or split.of(text, document.after) != "train":
            continue
        taken += len(text)
        if taken > sample_bytes and taken > len(text):
            return
        yield document.text if document.conversation is None else document.conversation.words()
