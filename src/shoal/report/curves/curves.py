"""
The curves of a run: any window of any metric, with the minimum, maximum and mean of every point in it. No torch.

    curves = Curves.open(folder.path)
    window = curves.window("loss", 0, 100_000, columns=800)

`cache/curves/metrics` in the run's folder has what was read of `metrics.jsonl`; only new lines are read again. Readers build
it beside the log: it may be deleted at any time, and where it cannot be written it is kept in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.report.curves.cached_log import CachedLog
from shoal.report.curves.growing import Growing
from shoal.report.curves.numbers import Block, read_numbers
from shoal.report.curves.pyramid import COUNT, HIGH, LOW, TOTAL, Floats, Ints, bucket_width
from shoal.report.curves.stored import DamagedError, StoredArrays, write_arrays
from shoal.report.curves.table import NOT_SERIES, Table

SAVED_FROM: Final = 1 << 16  # bytes of new lines that are worth a file; fewer are read again in a few milliseconds
STEPS, EVALUATIONS = "steps", "evaluations"


@dataclass(frozen=True)
class Window:
    """
    Buckets of a metric, in order of steps; a bucket of one point has low = high = mean.

    step, tokens, seconds: the place of each bucket's middle point. seconds: time in steps so far, without idle time.
    low, high, mean: of the finite points of the bucket; NaN if it has none. count: points in the bucket.
    gaps: those of them that are NaN or infinite.

    start, width: the first bucket's first point, counted from the curve's beginning, and the points of a whole bucket.
    Buckets begin at multiples of `width`, so while a run trains only the last one changes, and new ones come after it.
    """

    step: Ints
    tokens: Ints
    seconds: Floats
    low: Floats
    high: Floats
    mean: Floats
    count: Ints
    gaps: Ints
    start: int = 0
    width: int = 1

    def __len__(self) -> int:
        return len(self.step)


class Curves(CachedLog):
    """The curves of one run, from its `metrics.jsonl`. May be used by several threads."""

    LOG = "metrics"

    def refresh(self, progress: Callable[[float], None] = lambda share: None) -> bool:
        """Read the new lines of the log, or the whole log if it was rewritten; return whether anything is new."""
        with self._lock:
            try:
                return self._refresh(progress)
            except DamagedError:  # an array of the cache that new lines were to be added to
                self._forget()
                return self._refresh(progress)
            except FileNotFoundError:
                had = bool(self._read.size)
                self._forget()
                return had

    def names(self) -> list[str]:
        """Return the metrics there are, such as "loss", "split_seconds/forward" or "val_loss"; those of a replica after the first as "NAME@1"."""
        with self._lock:
            return [
                name + kind.partition("@")[1] + kind.partition("@")[2]
                for kind, table in self._tables.items()
                for name in table.names
            ]

    @property
    def generation(self) -> str:
        """A text that changes when earlier curves change, not when points are added: the log was rewritten."""
        return f"{self._generation}-{self._read.inode}"

    @property
    def unread(self) -> int:
        """The number of lines without a record: cut short by a crash, or damaged."""
        return self._unread

    @property
    def last_step(self) -> int:
        """The last step of the log; 0 if there is none."""
        with self._lock:
            return max((int(table.step[-1]) for table in self._tables.values() if len(table)), default=0)

    @property
    def version(self) -> str:
        """A text that changes when the curves do."""
        return f"{self._generation}-{self._read.inode}-{self._read.size}"

    def window(self, name: str, first_step: int = 0, last_step: int | None = None, columns: int = 800) -> Window:
        """
        Return the points of steps first_step..last_step (default: all) in at most `columns` buckets, which hold all of them.

        A metric that the run does not have has no points.
        """
        with self._lock:
            try:
                return self._window(name, first_step, last_step, columns)
            except DamagedError:
                self._forget()
                self.refresh()
                return self._window(name, first_step, last_step, columns)

    def _window(self, name: str, first_step: int, last_step: int | None, columns: int) -> Window:
        table, series_name = self._table_of(name)
        series = table.series(series_name)
        rows = series.rows if series.rows is None else series.all_rows()
        steps = table.step[: len(series.pyramid)] if rows is None else table.step[rows]
        first = int(np.searchsorted(steps, first_step))
        stop = len(steps) if last_step is None else int(np.searchsorted(steps, last_step, side="right"))
        starts, found = series.pyramid.window(first, max(first, stop), columns)
        ends = np.append(starts[1:], max(first, stop)) if len(starts) else starts
        middle = (starts + ends - 1) // 2 if rows is None else rows[(starts + ends - 1) // 2]
        none = found[COUNT] == 0
        finite = np.where(none, 1, found[COUNT])
        return Window(
            step=table.step[middle],
            tokens=table.tokens[middle],
            seconds=self._seconds(table, middle),
            low=np.where(none, np.nan, found[LOW]),
            high=np.where(none, np.nan, found[HIGH]),
            mean=np.where(none, np.nan, found[TOTAL] / finite),
            count=ends - starts,
            gaps=(ends - starts) - found[COUNT].astype(np.int64),
            start=first,
            width=bucket_width(first, stop, columns),
        )

    def _table_of(self, name: str) -> tuple[Table, str]:
        """Return the table that has a metric, and the metric's name in it."""
        plain, at, replica = name.rpartition("@")
        for kind, table in self._tables.items():
            kind_replica = kind.partition("@")[2]
            if at and kind_replica == replica and plain in table.names:
                return table, plain
            if not kind_replica and name in table.names:
                return table, name
        return Table(), name

    def _seconds(self, table: Table, rows: Ints) -> Floats:
        """Return the time in steps at these rows. Evaluations have none of their own: theirs is that of their step."""
        for kind, each in self._tables.items():
            partner = self._tables.get(kind.replace(EVALUATIONS, STEPS, 1))
            if each is table and kind.startswith(EVALUATIONS) and partner is not None and len(partner):
                return np.interp(table.step[rows], partner.step, partner.seconds)
        return table.seconds[rows]

    # --- reading the log ----------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._tables: dict[str, Table] = {STEPS: Table(), EVALUATIONS: Table()}
        self._read = Growing()
        self._unread = 0
        self._saved_size = 0
        self._generation += 1

    def _refresh(self, progress: Callable[[float], None]) -> bool:
        before = self.version
        if not self._read.is_start_of(self._log):
            self._forget()
        for data in self._read.new_lines(self._log, progress):
            blocks, unread = read_numbers(data)
            self._unread += unread + self._add(blocks)
        self._save()
        return self.version != before

    def _add(self, blocks: list[Block]) -> int:
        """Add the records of these blocks to their tables; return how many lines have no step."""
        kinds: dict[str, list[Block]] = {}
        lost = 0
        for block in blocks:
            good = _with_steps(block)
            lost += len(block.lines) - len(good.lines)
            for kind, part in _by_kind(good) if len(good.lines) else []:
                kinds.setdefault(kind, []).append(part)
        self._drop_repeated(kinds)
        for kind, parts in kinds.items():
            if parts := [part for part in parts if len(part.lines)]:
                self._tables.setdefault(kind, Table()).add(parts)
        return lost

    def _drop_repeated(self, kinds: dict[str, list[Block]]) -> None:
        """
        Drop records of steps that were taken again later, here and in the tables.

        A resume removes them from the log, but not from a log that cannot be rewritten. A record of a step also drops the
        evaluations from that step on; they are made again.
        """
        from_step: dict[str, tuple[Ints, Ints]] = {}
        for kind, parts in kinds.items():
            lines, steps = _steps_in_order(parts)
            from_step[kind] = lines, steps
        for kind, parts in kinds.items():
            others = [from_step[kind]]
            steps_kind = kind.replace(EVALUATIONS, STEPS, 1)
            if steps_kind != kind and steps_kind in from_step:
                others.append(from_step[steps_kind])
            for lines, steps in others:
                parts[:] = [_kept(part, lines, steps) for part in parts]
                if len(steps):
                    self._tables.setdefault(kind, Table())
                    self._tables[kind].cut_from(int(steps.min()))
            if steps_kind == kind and len(from_step[kind][1]):
                evaluations = kind.replace(STEPS, EVALUATIONS, 1)
                if evaluations in self._tables and evaluations not in kinds:
                    self._tables[evaluations].cut_from(int(from_step[kind][1].min()))

    # --- the cache ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Take what the cache has, if it is of this log."""
        with contextlib.suppress(DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = StoredArrays(self._cache)
            read = Growing.noted(stored.notes["read"])
            # Another reader may have replaced the file that this one wrote: never go back
            if read.size >= self._read.size and read.is_start_of(self._log):
                tables = {kind: Table(stored, kind, series) for kind, series in stored.notes["tables"].items()}
                self._unread = int(stored.notes["unread"])
                self._tables, self._read, self._saved_size = tables, read, read.size

    def _save(self) -> None:
        """Write the cache if enough is new; a folder that cannot be written keeps none."""
        if self._read.size - self._saved_size < max(SAVED_FROM, self._saved_size // 8):
            return
        keys: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for kind, table in self._tables.items():
            keys[kind], own = table.as_arrays(kind)
            arrays |= own
        notes = {"read": self._read.as_notes(), "unread": self._unread, "tables": keys}
        self._saved_size = self._read.size  # also if it fails: the next try is when there is much more
        with contextlib.suppress(OSError):
            write_arrays(self._cache, notes, arrays)
            self._load()  # mapped from the file, the arrays need no memory of this process


def names_at_the_end(log: Path) -> list[str]:
    """Return the metrics in the last lines of a log that was not read yet; none if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - SAVED_FROM))
            blocks, _ = read_numbers(file.read().partition(b"\n")[2])
    except OSError:
        return []
    found = [part for block in blocks for _, part in _by_kind(_with_steps(block))]
    return list(
        dict.fromkeys(name for part in found for name in part.names if name not in part.nulls | set(NOT_SERIES))
    )


def _with_steps(block: Block) -> Block:
    """Return the lines that have a step."""
    if "step" not in block.names:
        return Block(block.lines[:0], block.names, block.values[:0], block.nulls)
    steps = block.values[:, block.names.index("step")]
    good = np.isfinite(steps) & (steps >= 0)
    return block if good.all() else Block(block.lines[good], block.names, block.values[good], block.nulls)


def _by_kind(block: Block) -> list[tuple[str, Block]]:
    """Return the block by kind of line: of steps or evaluations, and by replica, as "steps@1" after the first one."""
    kind = STEPS
    if "val_loss" in block.names:
        kind = EVALUATIONS
        names = tuple("val_time" if name == "time" else name for name in block.names)
        block = Block(block.lines, names, block.values, block.nulls)
    if "replica" not in block.names:
        return [(kind, block)]
    replicas = block.values[:, block.names.index("replica")]
    found = []
    for replica in np.unique(replicas[np.isfinite(replicas)]):
        at = replicas == replica
        part = Block(block.lines[at], block.names, block.values[at], block.nulls)
        found.append((f"{kind}@{int(replica)}" if replica else kind, part))
    return found


def _steps_in_order(parts: list[Block]) -> tuple[Ints, Ints]:
    """Return the lines' numbers in order, and for each the smallest step from there on."""
    lines = np.concatenate([part.lines for part in parts])
    steps = np.concatenate([part.values[:, part.names.index("step")] for part in parts]).astype(np.int64)
    order = np.argsort(lines)
    return lines[order], np.minimum.accumulate(steps[order][::-1])[::-1]


def _kept(part: Block, lines: Ints, smallest: Ints) -> Block:
    """Return the lines of `part` without those at or after a step that one of `lines` after them takes."""
    if not len(part.lines) or not len(lines):
        return part
    after = np.searchsorted(lines, part.lines, side="right")
    later = np.where(after < len(lines), smallest[np.minimum(after, len(lines) - 1)], np.iinfo(np.int64).max)
    good = part.values[:, part.names.index("step")] < later
    return part if good.all() else Block(part.lines[good], part.names, part.values[good], part.nulls)
