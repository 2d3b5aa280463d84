"""
Reads the numbers of many JSON lines at once: lines of one shape become a matrix. No torch.

Almost all lines of a log have the same keys in the same order. Their numbers are then one list of JSON, which is several times
faster to read than a dictionary a line. A line that is alone in its shape is read as any JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.run.jsonl import object_of

FEW: Final = 8  # lines of one shape that are read one by one
NUMBERS: Final = b"0123456789.+-eE"


@dataclass(frozen=True)
class Block:
    """
    Lines with the same keys.

    lines: their numbers in the file's part. names: their keys, those of a nested object as "outer/inner".
    values: of shape [lines, names]; null is NaN, and also in `nulls`, the names that are null.
    """

    lines: NDArray[np.int64]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    nulls: frozenset[str] = frozenset()


def read_numbers(data: bytes) -> tuple[list[Block], int]:
    """
    Return the numbers of whole lines of JSON in blocks, and the number of lines without a JSON object.

    Skip values other than numbers.
    """
    lines = data.split(b"\n")[:-1]
    shapes: dict[bytes, list[int]] = {}
    for number, shape in enumerate(data.translate(None, NUMBERS).split(b"\n")[:-1]):
        shapes.setdefault(shape, []).append(number)
    blocks, unread = [], 0
    for numbers in shapes.values():
        block = _matrix(lines, numbers) if len(numbers) > FEW else None
        if block is not None:
            blocks.append(block)
            continue
        singles = list(_one_by_one(lines, numbers))
        unread += len(numbers) - len(singles)
        blocks += singles
    return blocks, unread


def _matrix(lines: Sequence[bytes], numbers: Sequence[int]) -> Block | None:
    """Return the lines as one block; None if they do not have the same keys, or values that are neither number nor null."""
    sample = object_of(lines[numbers[0]])
    if sample is None:
        return None
    leaves = dict(_leaves(sample))
    names = tuple(leaves)
    parts = b"\n".join([lines[n] for n in numbers]).split(b'"')
    keys = lines[numbers[0]].split(b'"')[1::2]
    if parts[1::2] != keys * len(numbers):
        return None
    # What is between two keys is a value and a comma; a nested object's key has only ":{"
    text = b"".join(parts[2::2]).translate(bytes.maketrans(b"\n", b","), b":{} ")
    try:
        found = np.array(json.loads(b"[" + text + b"]"), dtype=np.float64)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    if found.shape != (len(numbers) * len(names),):
        return None
    nulls = frozenset(name for name, value in leaves.items() if value is None)
    return Block(np.array(numbers), names, found.reshape(len(numbers), len(names)), nulls)


def _one_by_one(lines: Sequence[bytes], numbers: Sequence[int]) -> Iterator[Block]:
    for number in numbers:
        found = object_of(lines[number])
        if found is not None:
            leaves = dict(_leaves(found))
            values = np.array([[_number(value) for value in leaves.values()]], dtype=np.float64)
            nulls = frozenset(name for name, value in leaves.items() if value is None)
            yield Block(np.array([number]), tuple(leaves), values, nulls)


def _leaves(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers and nulls of an object, and of the objects in it, in their order."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", each) for inner, each in value.items() if _is_number(each))
        elif _is_number(value):
            yield name, value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf")
