"""
The ledger of samples: a record from which `audit.py` proves that each was trained on once per epoch. No torch.

Rank 0 alone writes `ledger.jsonl`, and only appends. At a start, a resume and a rollback it writes a line that revokes all
steps after `after`:

    {"after": 40, "position": 640, "rows": 900, "seed": 0, "global_batch": 16, "copies": 1, "data_id": "...", "sources": []}

It writes a line for each step, and a line for positions that no step uses:

    {"step": 41, "first": 640, "stop": 656, "skipped": false, "sum": 8861029183215}
    {"step": 42, "first": 656, "stop": 672, "skipped": true, "empty": true, "sum": 4140629518330}
    {"passed_over": [672, 720]}
    {"quarantined": [17, 204]}

A step trains on the rows that `Blend.rows_at` gives for positions [first, stop). `empty`: the step was skipped because none of
its labels is learned. `sources` describes a blend. Row 17 could not be read: in the steps of the lines after this one, up to the
next line with "after", row 204 was read in its place.

`sum` records which samples the ranks really read: each rank computes the checksum of its own micro-batches, and the step's
all-reduce adds the checksums. Each of the ranks that share a sample along `pp`, `cp` or `tp` adds its checksum, so the sum
counts the sample `copies` times.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.data.order.blend import Blend, Stage
from shoal.run.jsonl import PatientLines

MOST_BITS: Final = 40  # two different sets of samples have the same sum once in 2^40
FLOAT64_BITS: Final = 53  # integers up to 2^53 and their sums are exact
# The constants of MurmurHash3's 64-bit finalizer (Appleby 2011), and an odd offset, since the finalizer maps 0 to 0.
# Not the mix of `order.py`, so that a bug there cannot hide here.
_OFFSET, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_SHIFT: Final = np.uint64(33)


def bits_for(samples: int) -> int:
    """
    Return how many bits of each hash to sum, so that the sum over `samples` (global batch x copies) is exact in float64.

    Each hash is below 2^bits, so the sum is below samples x 2^bits, which must not exceed 2^53. That is 40 bits up to
    2^13 samples, and one bit fewer per doubling. Raises ValueError beyond 2^45 samples, which leave fewer than 8 bits.
    """
    bits = min(MOST_BITS, FLOAT64_BITS - (samples - 1).bit_length())
    if bits < 8:
        raise ValueError(f"the checksum of {samples} samples does not fit into float64")
    return bits


def checksum(sample_ids: npt.ArrayLike, bits: int) -> int:
    """Return the sum of each id's `bits`-bit hash. The order of ids does not matter, and sums over ranks are exact in float64."""
    return int(hashes(np.asarray(sample_ids, np.int64), bits).sum())


def hashes(sample_ids: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint64]:
    """Return the `bits`-bit hash of each id."""
    x = np.atleast_1d(sample_ids).astype(np.uint64) + _OFFSET
    x = (x ^ (x >> _SHIFT)) * _MIX_1
    x = (x ^ (x >> _SHIFT)) * _MIX_2
    return (x ^ (x >> _SHIFT)) >> np.uint64(64 - bits)


@dataclass(frozen=True)
class Header:
    """
    Everything the order of samples depends on, and how many times each sample counts in a sum.

    sources: (name, rows, maximum epochs or null) of each source of a blend; none if there is one source. stages: the shares
    of the sources from a position on, as (position, shares); none without weights.
    """

    rows: int
    seed: int
    global_batch: int
    copies: int  # processes that read the same samples: pp x cp x tp
    data_id: str
    sources: Sequence[tuple[str, int, float | None]] = ()
    stages: Sequence[tuple[int, Sequence[int]]] = ()

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Header:
        """Return the header that a line holds; older lines have no sources."""
        return cls(**{name: line[name] for name in cls.__dataclass_fields__ if name in line})

    @property
    def bits(self) -> int:
        return bits_for(self.global_batch * self.copies)

    @cached_property
    def order(self) -> Blend:
        """The order of samples. Raises ValueError if the stages are invalid."""
        sizes = [rows for _, rows, _ in self.sources] or [self.rows]
        epochs = [inf if most is None else most for _, _, most in self.sources]
        return Blend(self.seed, sizes, [Stage(first, tuple(shares)) for first, shares in self.stages], epochs)

    @property
    def lanes(self) -> list[str]:
        """The names of the rows that are shuffled together: of each source with weights, else one without a name."""
        return [name for name, _, _ in self.sources] if self.stages else [""]


def last_data_id(path: Path) -> str:
    """Return the id of the tokens that the last steps of a ledger were trained on; "" if it has none or cannot be read."""
    header = b""
    with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as lines:
        for line in lines:
            if line.startswith(b'{"after"'):  # only these few lines are parsed: a ledger has a line for each step
                header = line
        return str(json.loads(header)["data_id"])
    return ""


class Ledger:
    """Writes `ledger.jsonl`, on rank 0 alone. Disk errors do not raise: see `problem`."""

    def __init__(self, path: Path) -> None:
        self._lines = PatientLines(path)
        self._stop = 0  # end of the previous step's positions

    @property
    def problem(self) -> str | None:
        """Why lines cannot be written, as a message; None if they can. Unwritten lines are kept in memory."""
        return self._lines.problem

    def begin(
        self, header: Header, step: int, position: int, quarantined: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """
        Record that steps continue after `step`, whose samples stop at `position`. This revokes later steps' lines.

        quarantined: rows that cannot be read, each with its substitute.
        """
        self._stop = position
        self._lines.add({"after": step, "position": position, **asdict(header)})
        for row, substitute in quarantined.items():
            self.quarantine(row, substitute)

    def quarantine(self, row: int, substitute: int) -> None:
        """Record that `substitute` is read instead of `row` from the next recorded step on."""
        self._lines.add({"quarantined": [row, substitute]})

    def record(
        self,
        step: int,
        first: int,
        stop: int,
        total: float,
        *,
        skipped: bool = False,
        empty: bool = False,
        windows: Sequence[tuple[int, int]] = (),
    ) -> None:
        """
        Record a step on the samples at positions [first, stop).

        total: the sum of the samples' checksums over all ranks. skipped: whether the step left the weights unchanged. empty:
        whether it did so because none of its labels is learned.

        windows: [first, stop) ranges of positions that no step may use. A gap that ends where such a range ends is recorded
        as passed over; the audit reports any other gap.
        """
        if first > self._stop and any(first == end for _, end in windows):
            self._lines.add({"passed_over": [self._stop, first]})
        self._stop = stop
        why = {"empty": True} if empty else {}
        self._lines.add({"step": step, "first": first, "stop": stop, "skipped": skipped, **why, "sum": int(total)})

    def sync(self) -> None:
        """Flush to disk, so that lines survive a power cut; call it when a checkpoint is saved."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()
