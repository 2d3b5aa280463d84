"""
Token shards: safetensors files, each block of tokens verified on first read. No torch.

    train-00000.safetensors
        starts  int64  [documents]   where each document starts, in tokens of this shard
        answers int64  [spans, 2]    only for conversations: [first, stop) of each learned span, in tokens of this shard
        checks  uint32 [blocks]      zlib.crc32 of each 64 KiB of the tokens' bytes
        tokens  uint16 or uint32 [n] documents end to end, each with its begin and end tokens

The bytes before the tokens (the "head") have a CRC in the manifest. A block of tokens is compared with its CRC when it
is first read. So opening is cheap, and altered bytes are never trained on.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.stored.files import write_atomically
from shoal.data.stored.stream import Spans, Starts, Tokens
from shoal.errors import DataError, UnreadableError
from shoal.hub.header import LENGTH_BYTES, header_bytes
from shoal.system.byte_file import ByteFile

BLOCK_BYTES = 1 << 16
CURE = "rebuild it with `shoal prepare RECIPE --data.rebuild true`"
SAFETENSORS_NAMES = {"uint16": "U16", "uint32": "U32", "int64": "I64"}


@dataclass(frozen=True)
class ShardRecord:
    """
    A shard's entry in the manifest. `bytes` is the file's size, `head_crc32` the CRC of all bytes before the tokens.

    answers: number of learned spans; None if every token is learned, and then `learned_tokens` and `learned_bytes` too.
    """

    name: str
    bytes: int
    tokens: int
    documents: int
    text_bytes: int
    head_crc32: int
    sha256: str
    answers: int | None = None
    learned_tokens: int | None = None
    learned_bytes: int | None = None


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the narrowest dtype that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_shard(
    path: Path,
    tokens: Tokens,
    starts: Starts,
    text_bytes: int,
    answers: Spans | None = None,
    learned_bytes: int | None = None,
) -> ShardRecord:
    """
    Write a shard atomically. Raises DataError if writing fails.

    answers: [spans, 2], the learned spans, ascending; None if every token is learned. learned_bytes: their text's size.
    """
    body = _bytes_of(tokens)
    checks = np.array([zlib.crc32(block) for block in _blocks(body)], np.uint32)
    # Widest element first, so that each tensor is aligned to its element size.
    index: dict[str, npt.NDArray[Any]] = {"starts": starts}
    if answers is not None:
        index["answers"] = answers
    index["checks"] = checks
    tensors = index | {"tokens": tokens}
    described = {name: (SAFETENSORS_NAMES[tensor.dtype.name], tensor.shape) for name, tensor in tensors.items()}
    metadata = {"format": "shoal tokens", "block_bytes": str(BLOCK_BYTES)}
    # spaced, because `data_id` hashes these bytes and existing shards have the spaces
    header = header_bytes(described, metadata, spaced=True)
    head = header + b"".join(tensor.tobytes() for tensor in index.values())
    write_atomically(path, (head, body))
    sha256 = hashlib.sha256(head)
    sha256.update(body)
    size = len(head) + len(body)
    record = ShardRecord(path.name, size, len(tokens), len(starts), text_bytes, zlib.crc32(head), sha256.hexdigest())
    if answers is None:
        return record
    learned = int((answers[:, 1] - answers[:, 0]).sum())
    return replace(record, answers=len(answers), learned_tokens=learned, learned_bytes=learned_bytes)


def _bytes_of(tokens: Tokens) -> memoryview:
    return tokens.view(np.uint8).data


def _blocks(body: memoryview) -> list[memoryview]:
    return [body[at : at + BLOCK_BYTES] for at in range(0, len(body), BLOCK_BYTES)]


class Shard:
    """A shard on disk. Its size is checked on opening, its head on first use, its tokens block by block."""

    def __init__(self, path: Path, record: ShardRecord, dtype: np.dtype[np.unsignedinteger[Any]]) -> None:
        self.path, self.num_tokens, self.num_documents = path, record.tokens, record.documents
        self._record, self._dtype = record, dtype
        self._file = ByteFile(path, str(path), CURE)
        self._body = record.bytes - record.tokens * dtype.itemsize  # where the tokens begin
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot open {path}: {error.strerror}; {CURE}") from error
        if size != record.bytes:
            raise DataError(f"{path} has {size:,} bytes, not the {record.bytes:,} that were written; {CURE}")

    def read(self, start: int, stop: int) -> Tokens:
        """Return verified tokens [start, stop). Raises UnreadableError if bytes were altered or the disk fails there."""
        width = self._dtype.itemsize
        first, last = start * width // BLOCK_BYTES, (stop * width - 1) // BLOCK_BYTES
        for block in range(first, last + 1):
            if not self._verified[block]:
                self._verify(block)
        return self._load(start, stop)

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending. Raises UnreadableError if they were altered."""
        all_starts = self._head[0]
        low, high = np.searchsorted(all_starts, [start, stop])
        return all_starts[low:high]

    def answers(self, start: int, stop: int) -> Spans | None:
        """Return the learned spans in [start, stop), cut to it; None if every token is learned. Raises DataError if altered."""
        spans = self._head[2]
        if spans is None:
            return None
        low, high = np.searchsorted(spans[:, 1], start, "right"), np.searchsorted(spans[:, 0], stop)
        return np.clip(spans[low:high], start, stop)

    def _verify(self, block: int) -> None:
        per_block = BLOCK_BYTES // self._dtype.itemsize
        start, stop = block * per_block, min((block + 1) * per_block, self.num_tokens)
        if zlib.crc32(_bytes_of(self._load(start, stop))) != self._head[1][block]:
            raise UnreadableError(
                f"{self.path} was altered: tokens {start:,} to {stop:,} do not match their checksum; {CURE}"
            )
        self._verified[block] = True

    def _load(self, start: int, stop: int) -> Tokens:
        width = self._dtype.itemsize
        return np.frombuffer(self._file.read(self._body + start * width, self._body + stop * width), self._dtype)

    @cached_property
    def _verified(self) -> npt.NDArray[np.bool_]:
        return np.zeros(len(self._head[1]), np.bool_)

    @cached_property
    def _head(self) -> tuple[Starts, npt.NDArray[np.uint32], Spans | None]:
        """
        The `starts`, `checks` and `answers` tensors.

        Raises UnreadableError, before parsing them, if the head's CRC does not match.
        """
        head = self._file.read(0, self._body)
        if zlib.crc32(head) != self._record.head_crc32:
            raise UnreadableError(f"{self.path} was altered: its header or index does not match its checksum; {CURE}")
        at = LENGTH_BYTES + int.from_bytes(head[:LENGTH_BYTES], "little")
        starts = np.frombuffer(head, np.int64, self._record.documents, at)
        at += starts.nbytes
        if self._record.answers is None:
            return starts, np.frombuffer(head, np.uint32, -1, at), None
        answers = np.frombuffer(head, np.int64, 2 * self._record.answers, at).reshape(-1, 2)
        return starts, np.frombuffer(head, np.uint32, -1, at + answers.nbytes), answers
