"""A document as tokens. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.data.stored.stream import Spans, Tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """
    A document's tokens, with the tokens that begin and end it.

    text_bytes: UTF-8 bytes of its text, without special tokens. answers: the learned spans, [spans, 2] in tokens of this
    document, and learned_bytes the size of their text; None if every token is learned. flaws: what is wrong with it.
    """

    ids: Tokens
    text_bytes: int
    answers: Spans | None = None
    learned_bytes: int | None = None
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A conversation that cannot be learned. Those rejected for the same cause share one `reason`; `detail` is its own."""

    reason: str
    detail: str = ""
