"""Token files as other trainers write them, byte by byte from their formats' descriptions."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Documents = Sequence[Sequence[int]]
Writer = Callable[[Path, Documents, int], Path]
"""Writes documents without their ends, given the path without a suffix and the end token. Returns the file to name."""


def nanogpt(path: Path, documents: Documents, end: int) -> Path:
    path = path.with_suffix(".bin")
    path.write_bytes(b"".join(struct.pack("<H", token) for ids in documents for token in [*ids, end]))
    return path


def llm_c(path: Path, documents: Documents, end: int, magic: int = 20240520, version: int = 1) -> Path:
    tokens = [token for ids in documents for token in [end, *ids]]
    return llm_c_file(path.with_suffix(".bin"), tokens, magic, version)


def llm_c_file(path: Path, tokens: Sequence[int], magic: int, version: int) -> Path:
    code = "H" if magic == 20240520 else "I"
    head = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(head + struct.pack(f"<{len(tokens)}{code}", *tokens))
    return path


def llm_c_wide(path: Path, documents: Documents, end: int) -> Path:
    return llm_c(path, documents, end, 20240801, 7)


def raw(path: Path, documents: Documents, end: int) -> Path:
    """Write as OLMo's files are: no header, in spite of the name."""
    return nanogpt(path, documents, end).rename(path.with_suffix(".npy"))


def datatrove(path: Path, documents: Documents, end: int) -> Path:
    return nanogpt(path, documents, end).rename(path.with_suffix(".ds"))


def numpy_array(path: Path, documents: Documents, end: int) -> Path:
    tokens = [token for ids in documents for token in [*ids, end]]
    np.save(path.with_suffix(".npy"), np.array(tokens, np.int64))
    return path.with_suffix(".npy")


def megatron(
    path: Path,
    documents: Documents,
    end: int,
    code: int = 8,
    letter: str = "H",
    sequences: int = 1,
    modes: bool = False,
) -> Path:
    """Write the pair; each document is cut into this many sequences. Returns the .idx."""
    lengths, firsts, tokens = [], [0], []
    for ids in documents:
        whole = [*ids, end]
        size = -(-len(whole) // sequences)
        parts = [whole[at : at + size] for at in range(0, len(whole), size)]
        lengths += [len(part) for part in parts]
        firsts.append(len(lengths))
        tokens += whole
    width = struct.calcsize(letter)
    pointers = [width * sum(lengths[:number]) for number in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(firsts))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    index += struct.pack(f"<{len(firsts)}q", *firsts) + (bytes(len(lengths)) if modes else b"")
    path.with_suffix(".idx").write_bytes(index)
    path.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    return path.with_suffix(".idx")


def megatron_wide(path: Path, documents: Documents, end: int) -> Path:
    return megatron(path, documents, end, 4, "i", sequences=2, modes=True).with_suffix(".bin")


def megatron_int64(path: Path, documents: Documents, end: int) -> Path:
    return megatron(path, documents, end, 5, "q", sequences=3)


APPENDED: tuple[Writer, ...] = (nanogpt, raw, datatrove, numpy_array, megatron, megatron_wide, megatron_int64)
PREPENDED: tuple[Writer, ...] = (llm_c, llm_c_wide)
