"""
Megatron-LM's index: where each sequence of the .bin file begins, and which sequences make a document. No torch.

    "MMIDIDX\\0\\0"  9 bytes
    version        uint64  1
    dtype          uint8   1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    sequences      uint64
    indices        uint64  documents + 1
    lengths        int32 [sequences]   tokens in each sequence
    pointers       int64 [sequences]   each sequence's offset in the .bin file, in bytes
    documents      int64 [indices]     the first sequence of each document, and the number of sequences
    modes          int8  [sequences]   only in indexes of several modalities
"""

from __future__ import annotations

import bisect
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np

from shoal.data.pretokenized.token_file import Contents, Starts
from shoal.errors import DataError
from shoal.system.byte_file import ByteFile
from shoal.system.number_file import NumberFile, search_near

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
FLOATS = {6: "float64", 7: "float32"}
CHECKED_AT_A_TIME, MOST_CHECKED = 1 << 20, 1 << 24  # sequences


class MegatronIndex:
    """The index of a .bin file. On opening, its size, first and last entries are checked; `check` checks all of it."""

    def __init__(self, name: str, path: Path, bin_name: str, bin_bytes: int) -> None:
        self._name, self._bin_name, self._bin_bytes = name, bin_name, bin_bytes
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"{name} is not an index of Megatron-LM: it does not begin with MMIDIDX; {self._cure}")
        _, version, code, self._sequences, self._indices = HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{name} has version {version}; shoal reads version 1")
        if code in FLOATS:
            raise DataError(f"{name} says that {bin_name} holds {FLOATS[code]} numbers, which are not token ids")
        if code not in DTYPES:
            raise DataError(f"{name} has the dtype code {code}, which Megatron-LM does not define; {self._cure}")
        self.dtype = np.dtype(DTYPES[code])
        numbers, after = ByteFile(path, name, self._cure), HEADER.size + 4 * self._sequences
        self._lengths = NumberFile(numbers, "<i4", HEADER.size, self._sequences)
        self._pointers = NumberFile(numbers, "<i8", after, self._sequences)
        self._documents = NumberFile(numbers, "<i8", after + 8 * self._sequences, self._indices)
        self._check_sizes(path.stat().st_size)

    @property
    def contents(self) -> Contents:
        """Where the ids of the .bin file are."""
        return Contents("megatron", self.dtype, 0, self._bin_bytes // self.dtype.itemsize)

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending. Reads only their entries."""
        low = self.documents_before(start)
        high = search_near(self._start_of, stop, low, self._indices - 1)
        first = self._documents.read(low, high)
        first = first[first < self._sequences]  # documents without sequences, at the end, start where the tokens end
        if (first < 0).any() or (np.diff(first) < 0).any():
            self._refuse(f"its documents {low:,} to {high:,} are not in order")
        found = self._pointers.take(first) // self.dtype.itemsize
        if len(found) and (found[0] < start or found[-1] >= stop or (np.diff(found) < 0).any()):
            self._refuse(f"its documents {low:,} to {high:,} are not in order")
        return found

    def documents_before(self, token: int) -> int:
        """Return how many documents start before a token."""
        return bisect.bisect_left(range(self._indices - 1), token, key=self._start_of)

    def check(self) -> None:
        """
        Check that sequences follow each other without gaps, and documents too. Raises DataError otherwise.

        An index too large to check in about a second is left to the checks of `starts`.
        """
        if self._sequences > MOST_CHECKED:
            return
        expected = 0
        for low in range(0, self._sequences, CHECKED_AT_A_TIME):
            lengths = self._lengths.read(low, low + CHECKED_AT_A_TIME) * self.dtype.itemsize
            ends = expected + np.cumsum(lengths)
            wrong = (self._pointers.read(low, low + CHECKED_AT_A_TIME) != ends - lengths) | (lengths < 0)
            if wrong.any():
                self._refuse(f"sequence {low + int(np.argmax(wrong)):,} does not follow the one before it")
            expected = int(ends[-1])
        for low in range(0, self._indices, CHECKED_AT_A_TIME):
            if (np.diff(self._documents.read(low, low + CHECKED_AT_A_TIME + 1)) < 0).any():
                self._refuse("its documents are not in order")

    def _start_of(self, document: int) -> int:
        """Return a document's first token. Raises DataError if the index names a sequence that it lacks."""
        sequence = self._documents[document]
        if sequence == self._sequences:  # an empty document at the end
            return self._bin_bytes // self.dtype.itemsize
        if not 0 <= sequence < self._sequences:
            self._refuse(f"document {document:,} begins with sequence {sequence:,} of {self._sequences:,}")
        pointer: int = self._pointers[sequence]
        if not 0 <= pointer <= self._bin_bytes or pointer % self.dtype.itemsize:
            self._refuse(f"sequence {sequence:,} begins at byte {pointer:,} of {self._bin_bytes:,}")
        return pointer // self.dtype.itemsize

    def _check_sizes(self, size: int) -> None:
        needed = HEADER.size + 12 * self._sequences + 8 * self._indices
        if size not in (needed, needed + self._sequences):
            raise DataError(
                f"{self._name} has {size:,} bytes, but its header needs {needed:,} ({self._sequences:,} sequences, "
                f"{self._indices:,} document indices); {self._cure}"
            )
        if self._bin_bytes % self.dtype.itemsize:
            self._refuse(
                f"{self._bin_bytes:,} bytes are not a multiple of the {self.dtype.itemsize} bytes of {self.dtype}"
            )
        if not self._sequences or not self._indices:
            self._refuse("it has no documents")
        end = self._pointers[-1] + self._lengths[-1] * self.dtype.itemsize
        if self._pointers[0] != 0 or end != self._bin_bytes:
            self._refuse(f"its sequences are bytes {self._pointers[0]:,} to {end:,} of {self._bin_bytes:,}")
        if self._documents[0] != 0 or self._documents[-1] != self._sequences:
            self._refuse(
                f"its documents are sequences {self._documents[0]:,} to {self._documents[-1]:,} of {self._sequences:,}"
            )

    def _refuse(self, why: str) -> NoReturn:
        raise DataError(f"{self._name} does not fit {self._bin_name}: {why}; {self._cure}")

    @property
    def _cure(self) -> str:
        return "copy both files again, or make them again with Megatron-LM's preprocess_data.py"
