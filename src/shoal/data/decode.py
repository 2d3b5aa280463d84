"""Prepared tokens -> text. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shoal.data.prepare import Prepared
from shoal.data.stored.manifest import SplitName
from shoal.errors import DataError

SAMPLE_PIECES = 32  # number of evenly spaced pieces of a text that is too long


def held_out_text(prepared: Prepared, at_most: int | None = None) -> bytes:
    """
    Return the text of the val split, or about `at_most` bytes of it, to compare with gzip or xz.

    Raises DataError for conversations, of which a model may learn a part only, for WikiText, or if the whole text was decoded and its length
    shows that the tokenizer does not restore texts exactly. For token files that is not known: the text is what their tokens
    decode to.
    """
    if prepared.manifest.has_conversations:
        raise DataError("gzip and xz are not compared on conversations, of which only a part is learned")
    if prepared.manifest.options.get("wikitext"):
        raise DataError("gzip and xz are not compared on WikiText, whose bytes are counted before detokenizing")
    if at_most is not None and prepared.counts["val"].text_bytes > at_most:
        return sample_of(prepared, "val", at_most)
    text = _text(prepared, "val", [(0, prepared.streams["val"].num_tokens)])
    if prepared.counts["val"].shards and len(text) != prepared.counts["val"].text_bytes:
        raise DataError("this tokenizer does not restore texts exactly; set data.tokenizer to bpe or bytes")
    return text


def sample_of(prepared: Prepared, split: SplitName, at_most: int) -> bytes:
    """Return a split's text; if it is longer than `at_most` bytes, about that many in evenly spaced pieces."""
    num_tokens, text_bytes = prepared.streams[split].num_tokens, prepared.counts[split].text_bytes
    if text_bytes <= at_most:
        return _text(prepared, split, [(0, num_tokens)])
    length = max(1, num_tokens * at_most // (text_bytes * SAMPLE_PIECES))
    firsts = [piece * num_tokens // SAMPLE_PIECES for piece in range(SAMPLE_PIECES)]
    return _text(prepared, split, [(first, min(first + length, num_tokens)) for first in firsts])[:at_most]


def _text(prepared: Prepared, split: SplitName, spans: Sequence[tuple[int, int]]) -> bytes:
    """Return the text of tokens [first, last) of each span, without the tokens that begin and end documents."""
    stream, tokenizer = prepared.streams[split], prepared.tokenizer
    ends = {tokenizer.eot_id, tokenizer.bos_id}
    texts = []
    for first, last in spans:
        starts = [first, *(start for start in stream.starts(first, last).tolist() if start > first), last]
        for low in range(0, len(starts) - 1, 64):
            pieces = [stream.read(a, b).tolist() for a, b in pairwise(starts[low : low + 65])]
            texts += tokenizer.decode_batch([_between(ids, ends) for ids in pieces])
    return "".join(texts).encode()


def _between(ids: list[int], ends: set[int | None]) -> list[int]:
    first = ids[0] in ends
    return ids[first : len(ids) - (ids[-1] in ends and len(ids) > first)]
