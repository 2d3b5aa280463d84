"""Count the bytes of text in a stream of tokens: exactly for some million tokens, else estimated. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shoal.data.stored.stream import Stream, Tokens
from shoal.data.tokens.byte_lengths import ByteLengths
from shoal.data.tokens.tokenize import Tokenizer

EXACT_TOKENS: Final = 1 << 24  # streams of up to this many tokens are read whole
WINDOW_TOKENS: Final = 1 << 20
SAMPLES, SAMPLE_TOKENS = 512, 1 << 12  # evenly spaced pieces of a longer stream


@dataclass(frozen=True)
class TextCount:
    """Bytes of text and documents of a stream. sampled_tokens: the tokens that the estimate is from; None if all were read."""

    text_bytes: int
    documents: int
    sampled_tokens: int | None


def count_text_bytes(stream: Stream, lengths: ByteLengths, tokenizer: Tokenizer) -> TextCount:
    """
    Count the bytes of text of a stream without decoding it; tokens at documents' ends have none.

    Raises DataError if a token that is read is not in the vocabulary.
    """
    exact = stream.num_tokens <= EXACT_TOKENS
    tokens = text_bytes = documents = 0
    for start, stop in _windows(stream.num_tokens) if exact else _samples(stream.num_tokens):
        ids, starts = stream.read(start, stop), stream.starts(start, stop)
        tokens += stop - start
        text_bytes += int(lengths.of[ids].sum())
        documents += len(starts)
        if lengths.drops_space:
            text_bytes -= sum(_drops_space(stream, ids, start, int(at), lengths, tokenizer) for at in starts)
    if exact:
        return TextCount(max(1, text_bytes), documents, None)
    scale = stream.num_tokens / tokens
    return TextCount(max(1, round(text_bytes * scale)), round(documents * scale), tokens)


def _windows(num_tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_tokens, WINDOW_TOKENS):
        yield start, min(start + WINDOW_TOKENS, num_tokens)


def _samples(num_tokens: int) -> Iterator[tuple[int, int]]:
    for sample in range(SAMPLES):
        start = (num_tokens - SAMPLE_TOKENS) * sample // (SAMPLES - 1)
        yield start, start + SAMPLE_TOKENS


def _drops_space(stream: Stream, ids: Tokens, begin: int, at: int, lengths: ByteLengths, tokenizer: Tokenizer) -> bool:
    """Return whether decoding drops the space before the document that starts at token `at`. ids: tokens from `begin` on."""
    first = int(ids[at - begin])
    if first not in (tokenizer.eot_id, tokenizer.bos_id):
        return bool(lengths.after_space[first])
    if at + 1 == stream.num_tokens or len(stream.starts(at + 1, at + 2)):
        return False  # the document is empty
    return bool(lengths.after_space[int(stream.read(at + 1, at + 2)[0])])
