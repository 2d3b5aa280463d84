"""
The ledger of samples: a proof that each was trained on once an epoch, whatever died. No torch.

`ledger.jsonl`, written by the first process alone and only ever added to, has two kinds of lines. Where steps go on, at
a start, a resume and a rollback, one that takes back all steps after `after`:

    {"after": 40, "position": 640, "rows": 900, "seed": 0, "global_batch": 16, "copies": 1, "data_id": "..."}

and one for each step, of the positions [first, stop) of `order.sample_at`, or for positions that no step gets:

    {"step": 41, "first": 640, "stop": 656, "skipped": false, "sum": 8861029183215}
    {"passed_over": [656, 720]}

`sum` says what the processes really had: each takes the checksum of the samples in its own micro-batches, and the step's
all-reduce adds them up. Each process counts, also those that share samples along `pp`, `cp` or `tp`: `copies` is how many.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.data.order import sample_at
from shoal.run.jsonl import PatientLines, whole_lines

MOST_BITS: Final = 40  # two different steps have equal sums once in 2^40
FLOAT64_BITS: Final = 53  # integers up to 2^53 and their sums are exact
_AT_ONCE: Final = 1 << 20  # samples
_SHOWN: Final = 10  # of a kind of things that may be many
# Of MurmurHash3's 64-bit finalizer (Appleby 2011), and an odd number that keeps sample 0 from being nothing. Not the mix
# of `order.py`: a mistake there must not hide itself here.
_OFFSET, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_SHIFT: Final = np.uint64(33)


def bits_for(samples: int) -> int:
    """
    How many bits of a sample's mix are summed, so that the sum over `samples` (global batch times copies) is exact in float64.

    Each is below 2^bits, so the sum is below samples x 2^bits, at most 2^53: 40 bits up to 2^13 samples, one less each
    time they double. Raises ValueError beyond 2^45, where nothing would be left.
    """
    bits = min(MOST_BITS, FLOAT64_BITS - (samples - 1).bit_length())
    if bits < 8:
        raise ValueError(f"the checksum of {samples} samples does not fit into float64")
    return bits


def checksum(sample_ids: npt.ArrayLike, bits: int) -> int:
    """The sum of a `bits`-bit mix of each id, whatever their order. Exact in float64, alone and summed over processes."""
    return int(_mixed(np.asarray(sample_ids, np.int64), bits).sum())


def _mixed(sample_ids: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint64]:
    x = np.atleast_1d(sample_ids).astype(np.uint64) + _OFFSET
    x = (x ^ (x >> _SHIFT)) * _MIX_1
    x = (x ^ (x >> _SHIFT)) * _MIX_2
    return (x ^ (x >> _SHIFT)) >> np.uint64(64 - bits)


@dataclass(frozen=True)
class Header:
    """What the order of samples is a function of, and how often each is in a sum."""

    rows: int
    seed: int
    global_batch: int
    copies: int  # processes that have the same samples: pp x cp x tp
    data_id: str

    @property
    def bits(self) -> int:
        return bits_for(self.global_batch * self.copies)


class Ledger:
    """Writes `ledger.jsonl`; the first process's alone. Nothing raises for a disk's sake: see `problem`."""

    def __init__(self, path: Path, header: Header) -> None:
        self._lines, self._header = PatientLines(path), header
        self._stop = 0  # of the step before

    @property
    def problem(self) -> str | None:
        """What keeps lines from being written, for a person; they wait in memory."""
        return self._lines.problem

    def begin(self, step: int, position: int) -> None:
        """Steps go on after `step`, whose samples stop at `position`: what is written of later ones is taken back."""
        self._stop = position
        self._lines.add({"after": step, "position": position, **asdict(self._header)})

    def record(
        self,
        step: int,
        first: int,
        stop: int,
        total: float,
        *,
        skipped: bool = False,
        windows: Sequence[tuple[int, int]] = (),
    ) -> None:
        """
        A step on positions [first, stop), whose checksums add up to `total`. skipped: it changed nothing.

        windows: [first, stop) of positions that no step may have a part of. A jump is written as passed over where it ends
        with one of these; any other is left for the audit to find.
        """
        if first > self._stop and any(first == end for _, end in windows):
            self._lines.add({"passed_over": [self._stop, first]})
        self._stop = stop
        self._lines.add({"step": step, "first": first, "stop": stop, "skipped": skipped, "sum": int(total)})

    def sync(self) -> None:
        """Outlives a power cut from here on: for when a checkpoint does."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


# --- the audit -----------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Positions [first, stop), of a step, or (None) of none."""

    step: int | None
    first: int
    stop: int
    skipped: bool = False

    @property
    def trained(self) -> bool:
        return self.step is not None and not self.skipped


@dataclass
class Epoch:
    """Samples of an epoch: how many were trained on, were so more than once, or not, and why not."""

    trained: int = 0
    again: int = 0
    skipped: int = 0
    passed_over: int = 0


@dataclass
class Audit:
    """
    What a ledger proves.

    problems: why it does not prove that each sample was trained on once an epoch; the first ten, and how many more.
    first_wrong: the first step that has one.
    """

    rows: int = 0
    lives: int = 0
    steps: int = 0
    taken_again: int = 0
    samples: int = 0
    epochs: dict[int, Epoch] = field(default_factory=dict)
    skipped: list[Window] = field(default_factory=list)
    passed_over: list[Window] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    first_wrong: int | None = None
    more_problems: int = 0

    @property
    def passed(self) -> bool:
        return not self.problems

    def complain(self, problem: str, step: int | None = None) -> None:
        if step is not None:
            self.first_wrong = step if self.first_wrong is None else min(step, self.first_wrong)
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)
        else:
            self.more_problems += 1

    def as_json(self) -> dict[str, Any]:
        windows = {
            "skipped": [{"step": w.step, "first": w.first, "stop": w.stop} for w in self.skipped],
            "passed_over": [{"first": w.first, "stop": w.stop} for w in self.passed_over],
        }
        return {"passed": self.passed, **asdict(self), **windows}


def audit(path: Path, *, rows: int | None = None, seed: int | None = None) -> Audit:
    """
    Recompute every line of `ledger.jsonl`, also of steps that were taken back. Raises `OSError` where there is none.

    rows, seed: where given, the ledger's own must be these.
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
        elif header is None:
            found.complain("the first lines are missing: there is nothing to compare the sums with")
            return found
        elif "passed_over" in line:
            history.windows.append(Window(None, *line["passed_over"]))
        else:
            window = Window(line["step"], line["first"], line["stop"], line["skipped"])
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
        found.complain("there are no lines")
        return found
    for name, wanted, written in (("rows", rows, header.rows), ("seed", seed, header.seed)):
        if wanted is not None and wanted != written:
            found.complain(f"the ledger is of {name} {written}, and the run has {wanted}")
    found.rows = header.rows
    _check_history(found, history.windows)
    _count(found, history.windows)
    return found


def _next_header(found: Audit, before: Header | None, line: dict[str, Any]) -> Header:
    header = Header(**{name: line[name] for name in Header.__dataclass_fields__})
    for name in ("rows", "seed", "data_id"):
        if before is not None and getattr(before, name) != getattr(header, name):
            was, now = getattr(before, name), getattr(header, name)
            found.complain(f"{name} was {was} and is {now} after step {line['after']}", line["after"] + 1)
    return header


@dataclass
class _History:
    """The windows of steps that were not taken back, in the order in which they were taken."""

    windows: list[Window] = field(default_factory=list)

    def take_back(self, step: int, position: int) -> int:
        """What comes after `step`, at `position`, was not; how many steps."""
        count = 0
        while self.windows:
            last = self.windows[-1]
            if last.stop <= position and (last.step is None or last.step <= step):
                break
            count += last.step is not None
            self.windows.pop()
        return count


def _check_sums(found: Audit, header: Header | None, lines: Sequence[tuple[Window, int]]) -> None:
    """Each step's sum against that of the samples which belong at its positions."""
    lines = [(window, total) for window, total in lines if window.stop > window.first >= 0]
    if header is None or not lines:
        return
    sizes = [window.stop - window.first for window, _ in lines]
    positions = np.concatenate([np.arange(window.first, window.stop) for window, _ in lines])
    mixed = _mixed(sample_at(header.seed, positions, header.rows), header.bits)
    sums = np.add.reduceat(mixed, list(itertools.accumulate(sizes[:-1], initial=0)))
    for (window, total), expected in zip(lines, sums.tolist(), strict=True):
        if total != expected * header.copies:
            found.complain(
                f"step {window.step} trained on other samples than those at positions {window.first} to {window.stop - 1}",
                window.step,
            )


def _check_history(found: Audit, windows: Sequence[Window]) -> None:
    """Steps follow each other, and so do their positions, from the very first on."""
    step, position = 0, 0
    for window in windows:
        if window.first != position:
            what = "were passed over" if window.first > position else "come again"
            low, high = sorted((window.first, position))
            where = f"positions {low} to {high - 1} {what}"
            at = step + 1 if window.step is None else window.step
            found.complain(f"{where} before step {at}, and no line says so", at)
        if window.step is not None:
            if window.step != step + 1:
                found.complain(f"step {window.step} comes after step {step}", min(window.step, step + 1))
            step = window.step
        position = window.stop


def _count(found: Audit, windows: Sequence[Window]) -> None:
    """How many samples of each epoch were trained on, and how many of them again."""
    seen = 0  # where the trained windows so far stop: they began no later than those that follow
    for window in sorted(windows, key=lambda w: w.first):
        if window.step is None:
            found.passed_over.append(window)
        elif window.skipped:
            found.skipped.append(window)
        found.steps += window.step is not None
        found.samples += window.trained * (window.stop - window.first)
        for number, first, stop in _by_epoch(window, found.rows):
            epoch = found.epochs.setdefault(number, Epoch())
            if window.trained:
                epoch.trained += stop - max(first, min(seen, stop))
                epoch.again += max(0, min(seen, stop) - first)
            elif window.skipped:
                epoch.skipped += stop - first
            else:
                epoch.passed_over += stop - first
        if window.trained:
            seen = max(seen, window.stop)


def _by_epoch(window: Window, rows: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, first, stop) of the parts of a window."""
    first = window.first
    while first < window.stop:
        stop = min(window.stop, (first // rows + 1) * rows)
        yield first // rows, first, stop
        first = stop


def describe(found: Audit) -> list[str]:
    """Lines for a terminal: what was found, and PASS or FAIL."""
    lines = [
        f"{found.steps:,} steps in {found.lives:,} {'life' if found.lives == 1 else 'lives'} trained on {found.samples:,} "
        f"samples of {found.rows:,}; {found.taken_again:,} steps were taken back, and again"
    ]
    whole = [n for n, e in found.epochs.items() if e == Epoch(trained=found.rows)]
    if whole:
        lines.append(f"{_span('epoch', whole)}: each of {found.rows:,} samples once")
    for number, epoch in sorted(found.epochs.items()):
        if number not in whole:
            lines.append(f"epoch {number}: {_epoch_in_words(epoch, found.rows, last=number == max(found.epochs))}")
    lines += _some([f"skipped: step {w.step}, positions {w.first} to {w.stop - 1}" for w in found.skipped])
    lines += _some([f"passed over: positions {w.first} to {w.stop - 1}" for w in found.passed_over])
    if found.passed:
        excepted = " that was not skipped or passed over" if found.skipped or found.passed_over else ""
        return [*lines, f"PASS: each sample{excepted} was trained on once an epoch, as far as the run has come"]
    more = [f"and {found.more_problems:,} more"] if found.more_problems else []
    where = "" if found.first_wrong is None else f" from step {found.first_wrong} on"
    return [
        *lines,
        *found.problems,
        *more,
        f"FAIL: the ledger does not prove that each sample was trained on once{where}",
    ]


def _epoch_in_words(epoch: Epoch, rows: int, *, last: bool) -> str:
    parts = [f"{epoch.trained:,} of {rows:,} samples{' so far' if last else ''}"]
    parts += [f"{epoch.again:,} of them AGAIN"] if epoch.again else ["each once"]
    parts += [f"{epoch.skipped:,} skipped"] if epoch.skipped else []
    parts += [f"{epoch.passed_over:,} passed over"] if epoch.passed_over else []
    missing = rows - epoch.trained - epoch.skipped - epoch.passed_over
    return ", ".join([*parts, f"{missing:,} NEVER"] if missing > 0 and not last else parts)


def _some(lines: list[str]) -> list[str]:
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else lines


def _span(word: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    return f"{len(numbers):,} {word}s ({min(numbers)} to {max(numbers)})"
