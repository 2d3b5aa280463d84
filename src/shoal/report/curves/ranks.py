"""
The ranks of a run over its measured steps: which one is slow, since when, and in which phase. No torch.

    ranks = RankMap.open(folder.path)
    view = ranks.view(columns=256, rows=256)
    slow = ranks.slow()

`cache/curves/ranks` in the run's folder has what was read of `ranks.jsonl`, as `curves.py` does for the metrics.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.report.curves.cached_log import CachedLog
from shoal.report.curves.growing import Growing
from shoal.report.curves.pyramid import Ints
from shoal.report.curves.stored import DamagedError, StoredArrays, write_arrays

PHASES: Final = ("data", "forward", "backward", "reduce", "optimizer", "between")
SLOW_RATIO: Final = 1.2  # busy this many times as long as the median rank
SLOW_LINES: Final = 3  # measured steps in a row that make a rank slow; a single one may be chance
RATIO_UNIT: Final = 50  # a cell of the map is a byte: this many times the ratio, so ratios up to 5.1 differ
SAVED_FROM: Final = 1 << 20

Bytes = NDArray[np.uint8]
Singles = NDArray[np.float32]


@dataclass(frozen=True)
class SlowRank:
    """
    A rank that was slower than the median rank for some measured steps in a row.

    phase: where it lost the most time. factor: its busy time as a multiple of the median rank's. last_step: None if it
    still is.
    """

    rank: int
    phase: str
    factor: float
    first_step: int
    last_step: int | None


@dataclass(frozen=True)
class RankView:
    """
    A window of the map, reduced so that the slowest rank and step of each cell remain.

    step: the last measured step of each column. ratio: [rows, columns], busy time as a multiple of the median rank's.
    phase: [rows, columns], index into `PHASES` of the phase that explains it. ranks_per_row: ranks in a row of the map.
    busy_seconds, median_seconds: of the slowest and the median rank, in the slowest step of each column.
    """

    step: Ints
    ratio: Singles
    phase: Bytes
    ranks: int
    ranks_per_row: int
    busy_seconds: Singles
    median_seconds: Singles

    def as_json(self) -> dict[str, Any]:
        """Return the view for JSON; `ratio` and `phase` are bytes in base64, row by row."""
        ratio = np.clip(np.round(self.ratio * RATIO_UNIT), 0, 255).astype(np.uint8)
        return {
            "step": self.step.tolist(),
            "ranks": self.ranks,
            "rows": len(self.ratio),
            "ranks_per_row": self.ranks_per_row,
            "phases": PHASES,
            "ratio_unit": RATIO_UNIT,
            "ratio": base64.b64encode(ratio.tobytes()).decode(),
            "phase": base64.b64encode(self.phase.tobytes()).decode(),
            "busy_seconds": [float(f"{each:.6g}") for each in self.busy_seconds],
            "median_seconds": [float(f"{each:.6g}") for each in self.median_seconds],
        }


@dataclass
class _Lines:
    """What was read: of each line its step, and by rank the busy time of each phase, its ratio and its slowest phase."""

    step: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    busy: Singles = field(default_factory=lambda: np.empty((0, len(PHASES), 0), np.float32))
    ratio: Singles = field(default_factory=lambda: np.empty((0, 0), np.float32))
    phase: Bytes = field(default_factory=lambda: np.empty((0, 0), np.uint8))

    def extended(self, step: Ints, busy: Singles) -> _Lines:
        """Return these lines and more: lines of steps that are taken again replace the earlier ones."""
        kept = int(np.searchsorted(self.step, step[0])) if len(step) else len(self.step)
        ranks = max(self.busy.shape[2], busy.shape[2])
        ratio, phase = _explained(busy)
        return _Lines(
            np.concatenate([self.step[:kept], step]),
            np.concatenate([_wide(self.busy[:kept], ranks, np.nan), _wide(busy, ranks, np.nan)]),
            np.concatenate([_wide(self.ratio[:kept], ranks, 0), _wide(ratio, ranks, 0)]),
            np.concatenate([_wide(self.phase[:kept], ranks, 0), _wide(phase, ranks, 0)]),
        )


def _wide(array: NDArray[Any], ranks: int, value: float) -> NDArray[Any]:
    """Return the array with `ranks` entries on its last axis; a run may restart with more ranks or fewer."""
    missing = ranks - array.shape[-1]
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=value) if missing else array


def _explained(busy: Singles) -> tuple[Singles, Bytes]:
    """Return by line and rank the busy time as a multiple of the median rank's, and the phase that adds most to it."""
    if not busy.size:
        return np.zeros((len(busy), busy.shape[2]), np.float32), np.zeros((len(busy), busy.shape[2]), np.uint8)
    total = np.nansum(busy, axis=1)
    ratio = np.nan_to_num(total / np.maximum(_median(total)[:, None], 1e-9))
    phase = np.nan_to_num(busy - _median(busy)[:, :, None], nan=-np.inf).argmax(axis=1)
    return ratio.astype(np.float32), phase.astype(np.uint8)


def _median(values: NDArray[Any]) -> NDArray[Any]:
    """Return the lower median over the last axis, so that of two ranks the slow one is compared with the fast one."""
    middle = (values.shape[-1] - 1) // 2
    found: NDArray[Any] = np.partition(np.nan_to_num(values, nan=np.inf), middle, axis=-1)[..., middle]
    return np.where(np.isfinite(found), found, 0)


class RankMap(CachedLog):
    """The measured steps of all ranks of one run, from its `ranks.jsonl`. May be used by several threads."""

    LOG = "ranks"

    def refresh(self, progress: Callable[[float], None] = lambda share: None) -> bool:
        """Read the new lines of the log, or the whole log if it was rewritten; return whether anything is new."""
        before = self.version
        with self._lock, contextlib.suppress(FileNotFoundError):
            if not self._read.is_start_of(self._log):
                self._forget()
            for data in self._read.new_lines(self._log, progress):
                self._add(data)
            self._save()
        return self.version != before

    @property
    def version(self) -> str:
        """A text that changes when the ranks do."""
        return f"{self._generation}-{self._read.inode}-{self._read.size}"

    @property
    def ranks(self) -> int:
        """The largest number of ranks of a line; 0 if nothing was measured."""
        return int(self._lines.ratio.shape[1])

    @property
    def steps(self) -> Ints:
        """The measured steps."""
        return self._lines.step

    @property
    def memory(self) -> Mapping[str, Sequence[int]]:
        """Memory of each rank in bytes, of the last line: `memory_bytes`, `peak_memory_bytes` and, on GPUs, `reserved_bytes`, `peak_reserved_bytes`."""
        return self._memory

    def view(self, first: int = 0, last: int | None = None, *, columns: int = 256, rows: int = 256) -> RankView:
        """Return the measured steps in first..last (default: all) in at most `columns` x `rows` cells."""
        with self._lock:
            lines = self._lines
        start = int(np.searchsorted(lines.step, first))
        stop = len(lines.step) if last is None else int(np.searchsorted(lines.step, last, side="right"))
        ends = np.unique(np.linspace(start, max(start, stop), min(columns, max(stop - start, 0)) + 1).astype(int))
        per_row = -(-max(self.ranks, 1) // rows)
        cells = [_cell(lines, a, b, per_row) for a, b in itertools.pairwise(ends)]
        high = -(-self.ranks // per_row)
        slowest = [a + int(lines.ratio[a:b].max(axis=1).argmax()) for a, b in itertools.pairwise(ends)]
        total = np.nansum(lines.busy[slowest], axis=1)
        return RankView(
            step=lines.step[ends[1:] - 1],
            ratio=np.stack([ratio for ratio, _ in cells], axis=1) if cells else np.empty((high, 0), np.float32),
            phase=np.stack([phase for _, phase in cells], axis=1) if cells else np.empty((high, 0), np.uint8),
            ranks=self.ranks,
            ranks_per_row=per_row,
            busy_seconds=total.max(axis=1, initial=0),
            median_seconds=_median(total) if total.size else np.zeros(len(cells), np.float32),
        )

    def slow(self) -> list[SlowRank]:
        """Return the ranks that were slow for several measured steps in a row, the slowest first."""
        with self._lock:
            lines = self._lines
        if self.ranks < 2:
            return []
        flagged = lines.ratio >= SLOW_RATIO
        enough = min(SLOW_LINES, len(flagged))
        candidates = np.flatnonzero(flagged.sum(axis=0) >= enough)
        found = [slow for rank in candidates if (slow := _slow(lines, int(rank), flagged[:, rank], enough))]
        return sorted(found, key=lambda each: -each.factor)

    def timeline(self, step: int | None = None, *, most: int = 32) -> dict[str, Any]:
        """
        Return the phases of one measured step, the last one up to `step`: busy seconds of each rank by phase, and its wait.

        most: ranks to return: the slowest, and others at equal distances. The wait is until the slowest rank is done.
        """
        with self._lock:
            lines = self._lines
        at = len(lines.step) - 1 if step is None else int(np.searchsorted(lines.step, step, side="right")) - 1
        if at < 0 or not self.ranks:
            return {"step": None, "ranks": [], "busy_seconds": {}, "wait_seconds": []}
        busy = np.nan_to_num(lines.busy[at])
        total = busy.sum(axis=0)
        slowest = np.argsort(-lines.ratio[at], kind="stable")[: most // 2]
        others = np.linspace(0, self.ranks - 1, min(most, self.ranks)).astype(int)
        shown = np.sort(np.array(list(dict.fromkeys([*slowest.tolist(), *others.tolist()]))[:most]))
        return {
            "step": int(lines.step[at]),
            "ranks": shown.tolist(),
            "busy_seconds": {phase: _rounded(busy[i, shown]) for i, phase in enumerate(PHASES) if busy[i].any()},
            "wait_seconds": _rounded(total.max() - total[shown]),
        }

    def as_json(
        self, first: int = 0, last: int | None = None, *, columns: int = 256, rows: int = 256
    ) -> dict[str, Any]:
        """Return the map, the slow ranks, the phases of the last measured step in the window and the memory, for JSON."""
        return {
            **self.view(first, last, columns=columns, rows=rows).as_json(),
            "slow": [asdict(each) for each in self.slow()],
            "timeline": self.timeline(last),
            "memory": self.memory,
        }

    # --- reading the log and the cache --------------------------------------------------------------------

    def _forget(self) -> None:
        self._lines = _Lines()
        self._memory: dict[str, list[int]] = {}
        self._read = Growing()
        self._saved_size = 0
        self._generation += 1

    def _add(self, data: bytes) -> None:
        """Add the records of these lines; lines of steps taken again replace the earlier ones."""
        records: list[dict[str, Any]] = []
        for line in data.splitlines():
            with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                busy = _busy(record["busy_seconds"])
                memory = {
                    key: record[key] for key in record if key.endswith("_bytes") and isinstance(record[key], list)
                }
                while records and records[-1]["step"] >= record["step"]:
                    records.pop()
                records.append({"step": int(record["step"]), "busy": busy, "memory": memory})
        if not records:
            return
        ranks = max(each["busy"].shape[1] for each in records)
        self._lines = self._lines.extended(
            np.array([each["step"] for each in records]),
            np.stack([_wide(each["busy"], ranks, np.nan) for each in records]),
        )
        self._memory = records[-1]["memory"]

    def _load(self) -> None:
        with contextlib.suppress(DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = StoredArrays(self._cache)
            read = Growing.noted(stored.notes["read"])
            if read.size >= self._read.size and read.is_start_of(self._log):
                self._lines = _Lines(*(stored.array(name) for name in ("step", "busy", "ratio", "phase")))
                self._memory, self._read, self._saved_size = stored.notes["memory"], read, read.size

    def _save(self) -> None:
        """Write the cache if enough is new; a folder that cannot be written keeps none."""
        if self._read.size - self._saved_size < max(SAVED_FROM, self._saved_size // 8):
            return
        self._saved_size = self._read.size
        with contextlib.suppress(OSError):
            notes = {"read": self._read.as_notes(), "memory": self._memory}
            write_arrays(self._cache, notes, vars(self._lines))
            self._load()


def _busy(found: Mapping[str, Sequence[float]]) -> Singles:
    """Return busy seconds as [phases, ranks]; a phase that is not in `PHASES` counts as the last, "between"."""
    ranks = max(map(len, found.values()))
    busy = np.zeros((len(PHASES), ranks), np.float32)
    for phase, seconds in found.items():
        at = PHASES.index(phase) if phase in PHASES else len(PHASES) - 1
        busy[at, : len(seconds)] += np.array(seconds, dtype=np.float32)
    return busy


def _cell(lines: _Lines, start: int, stop: int, per_row: int) -> tuple[Singles, Bytes]:
    """Return of the lines [start, stop) the largest ratio of each row of ranks, and its phase."""
    ratio = lines.ratio[start:stop]
    worst = ratio.argmax(axis=0)
    by_rank, phase = ratio.max(axis=0), np.take_along_axis(lines.phase[start:stop], worst[None], axis=0)[0]
    by_row = _wide(by_rank, -(-len(by_rank) // per_row) * per_row, 0).reshape(-1, per_row)
    rank = by_row.argmax(axis=1) + per_row * np.arange(len(by_row))
    return by_row.max(axis=1), phase[np.minimum(rank, len(phase) - 1)]


def _slow(lines: _Lines, rank: int, flagged: NDArray[np.bool_], enough: int) -> SlowRank | None:
    """Return when a rank was slow in at least `enough` lines in a row; None if it never was."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flagged, [False]]).astype(np.int8)))
    stretches = [(a, b) for a, b in edges.reshape(-1, 2).tolist() if b - a >= enough]
    if not stretches:
        return None
    at = np.concatenate([np.arange(a, b) for a, b in stretches])
    end = stretches[-1][1]
    return SlowRank(
        rank=rank,
        phase=PHASES[int(np.bincount(lines.phase[at, rank]).argmax())],
        factor=round(float(np.median(lines.ratio[at, rank])), 3),
        first_step=int(lines.step[stretches[0][0]]),
        last_step=None if end == len(flagged) else int(lines.step[end - 1]),
    )


def _rounded(values: NDArray[Any]) -> list[float]:
    return [float(f"{each:.6g}") for each in values]
