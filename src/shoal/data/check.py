"""Read all prepared tokens and check them, which training does only for the rows that it reads. No torch."""

from __future__ import annotations

from typing import Final

from shoal.data.prepare import Prepared, Progress, no_progress
from shoal.data.stored.manifest import SPLITS

WINDOW_TOKENS: Final = 1 << 22


def check_tokens(prepared: Prepared, progress: Progress = no_progress) -> str:
    """
    Read every token: a shard's are compared with its checksums, a token file's with the vocabulary. Return a line on it.

    Raises DataError, naming the file, if something is wrong.
    """
    total, done, documents = sum(prepared.streams[name].num_tokens for name in SPLITS), 0, 0
    for name in SPLITS:
        stream = prepared.streams[name]
        for start in range(0, stream.num_tokens, WINDOW_TOKENS):
            stop = min(start + WINDOW_TOKENS, stream.num_tokens)
            progress("all tokens", done, total)
            stream.read(start, stop)
            documents += len(stream.starts(start, stop))
            done += stop - start
    shards = sum(len(prepared.counts[name].shards) for name in SPLITS)
    if shards:
        return f"checked: all {total:,} tokens of {shards:,} shards match their checksums; {documents:,} documents"
    return f"checked: all {total:,} ids are in the vocabulary of {prepared.vocab_size:,}; {documents:,} documents"
