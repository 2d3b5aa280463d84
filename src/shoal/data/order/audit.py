"""
The audit of a ledger: whether it proves that each sample was trained on once per epoch, through crashes and rollbacks. No torch.

It needs only the ledger (`ledger.py`), neither the data nor the model.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from shoal.data.order.ledger import Header, hashes
from shoal.run.jsonl import whole_lines

_AT_ONCE: Final = 1 << 20  # samples whose checksums are computed together
_SHOWN: Final = 10  # maximum lines of each kind in the report


class Window(NamedTuple):
    """
    Positions [first, stop) used by a step, or passed over if `step` is None.

    quarantined: the rows that could not be read then, each with the row that was read instead. empty: whether the step was
    skipped because none of its labels is learned.
    """

    step: int | None
    first: int
    stop: int
    skipped: bool = False
    quarantined: Mapping[int, int] = MappingProxyType({})
    empty: bool = False

    @property
    def trained(self) -> bool:
        return self.step is not None and not self.skipped


@dataclass
class Epoch:
    """Counts of an epoch's samples: trained on, trained on again, skipped, passed over, and replaced because they could not be read."""

    trained: int = 0
    again: int = 0
    skipped: int = 0
    passed_over: int = 0
    replaced: int = 0


@dataclass
class Audit:
    """
    The result of auditing a ledger.

    quarantined: (row, row read instead) by source, each numbered in its source. problems: the first ten reasons why the ledger does not prove that each sample was trained on once per epoch.
    more_problems: the number of further reasons. first_wrong: the first step with a problem.
    """

    rows: int = 0
    lives: int = 0
    steps: int = 0
    taken_again: int = 0
    samples: int = 0
    epochs: dict[int, Epoch] = field(default_factory=dict)  # of one source, or of sources without weights
    sources: dict[str, dict[int, Epoch]] = field(default_factory=dict)  # epochs of each source of a blend with weights
    source_rows: dict[str, int] = field(default_factory=dict)
    skipped: list[Window] = field(default_factory=list)
    passed_over: list[Window] = field(default_factory=list)
    quarantined: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    first_wrong: int | None = None
    more_problems: int = 0

    @property
    def passed(self) -> bool:
        return not self.problems

    def complain(self, problem: str, step: int | None = None) -> None:
        """Record a problem. step: the step that has the problem; None if no single step has it."""
        if step is not None:
            self.first_wrong = step if self.first_wrong is None else min(step, self.first_wrong)
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)
        else:
            self.more_problems += 1

    def as_json(self) -> dict[str, Any]:
        windows = {
            "skipped": [{"step": w.step, "first": w.first, "stop": w.stop, "empty": w.empty} for w in self.skipped],
            "passed_over": [{"first": w.first, "stop": w.stop} for w in self.passed_over],
        }
        return {"passed": self.passed, **asdict(self), **windows}


def audit(path: Path, *, rows: int | None = None, seed: int | None = None) -> Audit:
    """
    Check every line of `ledger.jsonl`, also those of revoked steps. Raises OSError if the file cannot be read.

    rows, seed: values that the ledger must have; None skips the check.
    """
    found, history = Audit(), _History()
    header: Header | None = None
    pending: list[tuple[Window, int]] = []
    for line in whole_lines(path):
        if "after" in line:
            _check_sums(found, header, pending)
            pending.clear()
            found.lives += 1
            header = _next_header(found, header, line)
            found.taken_again += history.take_back(line["after"], line["position"])
            history.quarantined = {}
        elif header is None:
            found.complain("the first lines are missing, so the sums cannot be checked")
            return found
        elif "quarantined" in line:
            if _is_substitute(found, header, *line["quarantined"]):
                history.replace(*line["quarantined"])
        elif "passed_over" in line:
            history.windows.append(Window(None, *line["passed_over"]))
        else:
            window = Window(
                line["step"],
                line["first"],
                line["stop"],
                line["skipped"],
                history.quarantined,
                line.get("empty", False),
            )
            history.windows.append(window)
            if window.stop - window.first != header.global_batch:
                what = f"{window.stop - window.first} samples, not {header.global_batch}"
                found.complain(f"step {window.step} has {what}", window.step)
            pending.append((window, line["sum"]))
            if len(pending) * header.global_batch >= _AT_ONCE:
                _check_sums(found, header, pending)
                pending.clear()
    _check_sums(found, header, pending)
    if header is None:
        found.complain("the ledger is empty")
        return found
    for name, wanted, written in (("rows", rows, header.rows), ("seed", seed, header.seed)):
        if wanted is not None and wanted != written:
            found.complain(f"the ledger has {name} {written}, but the run has {wanted}")
    found.rows = header.rows
    _check_history(found, history.windows)
    _count(found, history.windows, header)
    _count_replaced(found, history.windows, header)
    return found


def _is_substitute(found: Audit, header: Header, row: int, substitute: int) -> bool:
    """Return whether a row was replaced by another row of its source, and complain if not."""
    order = header.order
    within = row != substitute and min(row, substitute) >= 0 and max(row, substitute) < order.num_rows
    if within and len(set(order.sources_of([row, substitute]).tolist())) == 1:
        return True
    found.complain(f"row {row} was replaced by row {substitute}, which is not another row of its source")
    return False


def _next_header(found: Audit, before: Header | None, line: dict[str, Any]) -> Header:
    header = Header.of_line(line)
    for name in ("rows", "seed", "data_id"):
        if before is not None and getattr(before, name) != getattr(header, name):
            was, now = getattr(before, name), getattr(header, name)
            found.complain(f"{name} was {was} and is {now} after step {line['after']}", line["after"] + 1)
    if before is not None and _blend_until(before, line["position"]) != _blend_until(header, line["position"]):
        found.complain(f"the blend of the steps up to {line['after']} is another after a resume", line["after"])
    return header


def _blend_until(header: Header, position: int) -> Any:
    """Return what the order of positions below `position` depends on."""
    return [list(s) for s in header.sources], [list(s) for first, *s in header.stages if first < position]


@dataclass
class _History:
    """The windows of steps that were not revoked, in order."""

    windows: list[Window] = field(default_factory=list)
    quarantined: dict[int, int] = field(default_factory=dict)  # for the next window

    def replace(self, row: int, substitute: int) -> None:
        """Note that `substitute` is read instead of `row` from the next window on."""
        if self.windows and self.windows[-1].quarantined is self.quarantined:
            self.quarantined = dict(self.quarantined)
        self.quarantined[row] = substitute

    def take_back(self, step: int, position: int) -> int:
        """Drop windows of steps after `step` and windows that end beyond `position`; return how many were steps."""
        count = 0
        while self.windows:
            last = self.windows[-1]
            if last.stop <= position and (last.step is None or last.step <= step):
                break
            count += last.step is not None
            self.windows.pop()
        return count


def _check_sums(found: Audit, header: Header | None, lines: Sequence[tuple[Window, int]]) -> None:
    """Compare each step's sum with that of the samples at its positions."""
    lines = [(window, total) for window, total in lines if window.stop > window.first >= 0]
    if header is None or not lines:
        return
    sizes = [window.stop - window.first for window, _ in lines]
    positions = np.concatenate([np.arange(window.first, window.stop) for window, _ in lines])
    rows = header.order.rows_at(positions)
    firsts = list(itertools.accumulate(sizes[:-1], initial=0))
    for (window, _), first, size in zip(lines, firsts, sizes, strict=True):
        if window.quarantined:
            of_step = rows[first : first + size]
            of_step[:] = [window.quarantined.get(row, row) for row in of_step.tolist()]
    sums = np.add.reduceat(hashes(rows, header.bits), firsts)
    for (window, total), expected in zip(lines, sums.tolist(), strict=True):
        if total != expected * header.copies:
            found.complain(
                f"step {window.step} did not train on the samples at positions {window.first} to {window.stop - 1}",
                window.step,
            )


def _check_history(found: Audit, windows: Sequence[Window]) -> None:
    """Check that steps and positions are consecutive from the first on."""
    step, position = 0, 0
    for window in windows:
        if window.first != position:
            what = "were passed over" if window.first > position else "are repeated"
            low, high = sorted((window.first, position))
            where = f"positions {low} to {high - 1} {what}"
            at = step + 1 if window.step is None else window.step
            found.complain(f"{where} before step {at}, and no line explains it", at)
        if window.step is not None:
            if window.step != step + 1:
                found.complain(f"step {window.step} comes after step {step}", min(window.step, step + 1))
            step = window.step
        position = window.stop


def _count(found: Audit, windows: Sequence[Window], header: Header) -> None:
    """Count the samples of each epoch: trained on, trained on again, skipped and passed over."""
    windows = sorted(windows, key=lambda w: w.first)
    for window in windows:
        if window.step is None:
            found.passed_over.append(window)
        elif window.skipped:
            found.skipped.append(window)
        found.steps += window.step is not None
        found.samples += window.trained * (window.stop - window.first)
    if not windows:
        return
    ends = header.order.taken_at([end for w in windows for end in (w.first, w.stop)]).reshape(len(windows), 2, -1)
    for lane, (name, rows) in enumerate(zip(header.lanes, header.order.lanes, strict=True)):
        own = [
            window._replace(first=first, stop=stop)
            for window, (first, stop) in zip(windows, ends[:, :, lane].tolist(), strict=True)
        ]
        epochs = _count_lane(own, rows)
        if name:
            found.sources[name], found.source_rows[name] = epochs, rows
        else:
            found.epochs = epochs


def _count_replaced(found: Audit, windows: Sequence[Window], header: Header) -> None:
    """List the rows that were replaced, and count them by epoch instead of as trained."""
    windows, order = sorted(windows, key=lambda w: w.first), header.order
    firsts = [window.first for window in windows]
    instead: dict[int, int] = {}
    for quarantined in {id(window.quarantined): window.quarantined for window in windows}.values():
        instead.update(quarantined)
    names = [name for name, _, _ in header.sources] or [""]
    for row, substitute in sorted(instead.items()):
        (source, own), (_, instead_of_it) = map(order.locate, (row, substitute))
        found.quarantined.setdefault(names[source], []).append((own, instead_of_it))
        lane = source if header.stages else 0
        epochs = found.sources[names[source]] if header.stages else found.epochs
        _, positions = order.positions_of(row, windows[-1].stop)
        for position in positions.tolist():
            window = windows[bisect_right(firsts, position) - 1]
            if window.trained and position < window.stop and row in window.quarantined:
                epoch = epochs[int(order.taken_at(position)[0, lane]) // order.lanes[lane]]
                epoch.trained, epoch.replaced = epoch.trained - 1, epoch.replaced + 1


def _count_lane(windows: Sequence[Window], rows: int) -> dict[int, Epoch]:
    """Count by epoch the samples of rows that are shuffled together. windows: sorted, in samples of these rows."""
    epochs: dict[int, Epoch] = {}
    seen = 0  # end of the trained windows so far
    for window in windows:
        for number, first, stop in _by_epoch(window, rows):
            epoch = epochs.setdefault(number, Epoch())
            if window.trained:
                epoch.trained += stop - max(first, min(seen, stop))
                epoch.again += max(0, min(seen, stop) - first)
            elif window.skipped:
                epoch.skipped += stop - first
            else:
                epoch.passed_over += stop - first
        if window.trained:
            seen = max(seen, window.stop)
    return epochs


def _by_epoch(window: Window, rows: int) -> Iterator[tuple[int, int, int]]:
    """Split a window at epoch boundaries; yield (epoch, first, stop) of each part."""
    first = window.first
    while first < window.stop:
        stop = min(window.stop, (first // rows + 1) * rows)
        yield first // rows, first, stop
        first = stop


def describe(found: Audit) -> list[str]:
    """Return lines for a terminal: the counts, the problems, and PASS or FAIL."""
    lines = [
        f"{found.steps:,} steps in {found.lives:,} {'start' if found.lives == 1 else 'starts'} trained on {found.samples:,} "
        f"samples from {found.rows:,} rows; {found.taken_again:,} steps were repeated after a resume or rollback"
    ]
    for name, epochs in ({"": found.epochs} | found.sources).items():
        lines += _epochs_in_words(epochs, found.source_rows.get(name, found.rows), f"{name}, " if name else "")
    lines += _some([
        f"skipped: step {w.step}, positions {w.first} to {w.stop - 1}{', no label is learned' * w.empty}"
        for w in found.skipped
    ])  # fmt: skip
    lines += _some([f"passed over: positions {w.first} to {w.stop - 1}" for w in found.passed_over])
    lines += _some([
        f"quarantined: row {row}{of}, replaced by row {substitute}"
        for of, pairs in ((f" of {name}" if name else "", pairs) for name, pairs in found.quarantined.items())
        for row, substitute in pairs
    ])  # fmt: skip
    if found.passed:
        excepted = " that was not skipped or passed over" if found.skipped or found.passed_over else ""
        excepted = " that was not skipped, passed over or replaced" if found.quarantined else excepted
        return [*lines, f"PASS: each sample{excepted} was trained on once per epoch so far"]
    more = [f"and {found.more_problems:,} more"] if found.more_problems else []
    where = "" if found.first_wrong is None else f" from step {found.first_wrong} on"
    return [
        *lines,
        *found.problems,
        *more,
        f"FAIL: the ledger does not prove that each sample was trained on once{where}",
    ]


def _epochs_in_words(epochs: dict[int, Epoch], rows: int, of: str) -> list[str]:
    """Return a line for the epochs that are complete, and one for each other epoch. of: the source, to begin each line with."""
    whole = [n for n, e in epochs.items() if e == Epoch(trained=rows)]
    lines = [f"{of}{_span('epoch', whole)}: each of the {rows:,} samples once"] if whole else []
    return lines + [
        f"{of}epoch {number}: {_epoch_in_words(epoch, rows, last=number == max(epochs))}"
        for number, epoch in sorted(epochs.items())
        if number not in whole
    ]


def _epoch_in_words(epoch: Epoch, rows: int, *, last: bool) -> str:
    parts = [f"{epoch.trained:,} of {rows:,} samples{' so far' if last else ''}"]
    parts += [f"{epoch.again:,} of them AGAIN"] if epoch.again else ["each once"]
    parts += [f"{epoch.skipped:,} skipped"] if epoch.skipped else []
    parts += [f"{epoch.passed_over:,} passed over"] if epoch.passed_over else []
    parts += [f"{epoch.replaced:,} replaced"] if epoch.replaced else []
    missing = rows - epoch.trained - epoch.skipped - epoch.passed_over - epoch.replaced
    return ", ".join([*parts, f"{missing:,} NEVER"] if missing > 0 and not last else parts)


def _some(lines: list[str]) -> list[str]:
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else lines


def _span(word: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    return f"{len(numbers):,} {word}s ({min(numbers)} to {max(numbers)})"
