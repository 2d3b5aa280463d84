"""The header of a safetensors file: names, dtypes and shapes of its tensors, read and written. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8  # size of the header's length, at the start of the file
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LFS_POINTER = b"version https://git-lfs"

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


# The supported dtypes of weights: safetensors' name -> the name in torch and config.json.
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class Entry:
    """A tensor's file, dtype and shape."""

    file: Path
    dtype: str  # as safetensors names it: "F32", "BF16"
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return _tensor_bytes(self.dtype, self.shape)


def _tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    return (BITS[dtype] * prod(shape) + 7) // 8


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, spaced: bool = False
) -> bytes:
    """
    Return the bytes of a safetensors file before its data: the header's length, then the header.

    tensors: name -> (dtype, shape), in the order of the data. spaced: whether to put spaces between JSON tokens.
    Spaces at the end align the data to 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + _tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=None if spaced else (",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(path: Path) -> dict[str, Entry]:
    """
    Return the tensors of a safetensors file by name, in the order of the header.

    Format (https://huggingface.co/docs/safetensors): eight bytes of length, a JSON object, then the data. Raises
    `ValueError` if the file is not a complete safetensors file; its message continues a sentence that begins with the file's
    name. Raises `OSError` if the file cannot be read.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(LENGTH_BYTES, len(LFS_POINTER)))
        if start == LFS_POINTER:
            raise ValueError("is a Git LFS pointer instead of the weights")
        if len(start) < LENGTH_BYTES:
            raise ValueError(f"is cut short: it has {file_bytes} bytes")
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("is not a safetensors file")
        file.seek(LENGTH_BYTES)
        text = file.read(length)
    data_start = LENGTH_BYTES + length
    if len(text) < length:
        raise ValueError(f"is cut short: it has {file_bytes:,} bytes, but its header alone has {data_start:,}")
    fields = _parse(text)
    fields.pop("__metadata__", None)
    entries = {}
    spans = []
    for name, field in fields.items():
        entries[name], span = _entry(path, name, field)
        spans.append(span)
    _check_spans(spans, file_bytes - data_start)
    return entries


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `ValueError` if `text` is not a JSON object, or repeats a name in an object."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(f"names {name} twice")
        found[name] = value
    return found


class _TwiceError(ValueError):
    pass


def _parse(text: bytes) -> dict[str, Any]:
    try:
        return parse_object(text)
    except _TwiceError:
        raise
    except ValueError:
        raise ValueError("is not a safetensors file: its header cannot be read") from None


def _entry(path: Path, name: str, field: Any) -> tuple[Entry, tuple[int, int]]:
    """Return a tensor and its byte range in the data, (start, end)."""
    try:
        dtype, shape, (start, end) = field["dtype"], field["shape"], field["data_offsets"]
        sound = isinstance(dtype, str) and _are_counts([start, end]) and isinstance(shape, list) and _are_counts(shape)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"has a header without a valid location of {name}")
    if dtype not in BITS:
        raise ValueError(f"holds {name} in {dtype}, an unknown dtype")
    entry = Entry(path, dtype, tuple(shape))
    if end - start != entry.bytes:
        raise ValueError(f"has {end - start} bytes for {name}, which is {dtype} with shape {shape}")
    return entry, (start, end)


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_spans(spans: list[tuple[int, int]], data_bytes: int) -> None:
    """Raise `ValueError` unless every byte of the data belongs to exactly one tensor."""
    spans = [(0, 0), *sorted(spans)]
    if any(first[1] != second[0] for first, second in pairwise(spans)):
        raise ValueError("has a header whose tensors overlap or leave gaps")
    stated = spans[-1][1]
    if data_bytes < stated:
        raise ValueError(f"is cut short: it has {data_bytes:,} bytes of weights, but its header says {stated:,}")
    if data_bytes > stated:
        raise ValueError(f"has {data_bytes - stated:,} bytes more than its header says")
