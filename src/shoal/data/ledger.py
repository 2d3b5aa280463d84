"""
The ledger of samples: a proof that each was trained on once per epoch, through crashes and rollbacks. No torch.

Rank 0 alone writes `ledger.jsonl`, and only appends. At a start, a resume and a rollback it writes a line that revokes all
steps after `after`:

    {"after": 40, "position": 640, "rows": 900, "seed": 0, "global_batch": 16, "copies": 1, "data_id": "...", "sources": []}

It writes a line for each step, and a line for positions that no step uses:

    {"step": 41, "first": 640, "stop": 656, "skipped": false, "sum": 8861029183215}
    {"passed_over": [656, 720]}

A step trains on the rows that `Blend.rows_at` gives for positions [first, stop). `sources` describes a blend.

`sum` records which samples the ranks really read: each rank computes the checksum of its own micro-batches, and the step's
all-reduce adds the checksums. Each of the ranks that share a sample along `pp`, `cp` or `tp` adds its checksum, so the sum
counts the sample `copies` times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.data.blend import Blend, Stage
from shoal.run.jsonl import PatientLines, whole_lines

MOST_BITS: Final = 40  # two different sets of samples have the same sum once in 2^40
FLOAT64_BITS: Final = 53  # integers up to 2^53 and their sums are exact
_AT_ONCE: Final = 1 << 20  # samples whose checksums are computed together
_SHOWN: Final = 10  # maximum lines of each kind in the audit's report
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
    return int(_mixed(np.asarray(sample_ids, np.int64), bits).sum())


def _mixed(sample_ids: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint64]:
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


class Ledger:
    """Writes `ledger.jsonl`, on rank 0 alone. Disk errors do not raise: see `problem`."""

    def __init__(self, path: Path) -> None:
        self._lines = PatientLines(path)
        self._stop = 0  # end of the previous step's positions

    @property
    def problem(self) -> str | None:
        """Why lines cannot be written, as a message; None if they can. Unwritten lines are kept in memory."""
        return self._lines.problem

    def begin(self, header: Header, step: int, position: int) -> None:
        """Record that steps continue after `step`, whose samples stop at `position`. This revokes later steps' lines."""
        self._stop = position
        self._lines.add({"after": step, "position": position, **asdict(header)})

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
        Record a step on the samples at positions [first, stop).

        total: the sum of the samples' checksums over all ranks. skipped: whether the step left the weights unchanged.

        windows: [first, stop) ranges of positions that no step may use. A gap that ends where such a range ends is recorded
        as passed over; the audit reports any other gap.
        """
        if first > self._stop and any(first == end for _, end in windows):
            self._lines.add({"passed_over": [self._stop, first]})
        self._stop = stop
        self._lines.add({"step": step, "first": first, "stop": stop, "skipped": skipped, "sum": int(total)})

    def sync(self) -> None:
        """Flush to disk, so that lines survive a power cut; call it when a checkpoint is saved."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


# --- the audit -----------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Positions [first, stop) used by a step, or passed over if `step` is None."""

    step: int | None
    first: int
    stop: int
    skipped: bool = False

    @property
    def trained(self) -> bool:
        return self.step is not None and not self.skipped


@dataclass
class Epoch:
    """Counts of an epoch's samples: trained on, trained on again, skipped and passed over."""

    trained: int = 0
    again: int = 0
    skipped: int = 0
    passed_over: int = 0


@dataclass
class Audit:
    """
    The result of auditing a ledger.

    problems: the first ten reasons why the ledger does not prove that each sample was trained on once per epoch.
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
            "skipped": [{"step": w.step, "first": w.first, "stop": w.stop} for w in self.skipped],
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
        elif header is None:
            found.complain("the first lines are missing, so the sums cannot be checked")
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
        found.complain("the ledger is empty")
        return found
    for name, wanted, written in (("rows", rows, header.rows), ("seed", seed, header.seed)):
        if wanted is not None and wanted != written:
            found.complain(f"the ledger has {name} {written}, but the run has {wanted}")
    found.rows = header.rows
    _check_history(found, history.windows)
    _count(found, history.windows, header)
    return found


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
    mixed = _mixed(header.order.rows_at(positions), header.bits)
    sums = np.add.reduceat(mixed, list(itertools.accumulate(sizes[:-1], initial=0)))
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
    lines += _some([f"skipped: step {w.step}, positions {w.first} to {w.stop - 1}" for w in found.skipped])
    lines += _some([f"passed over: positions {w.first} to {w.stop - 1}" for w in found.passed_over])
    if found.passed:
        excepted = " that was not skipped or passed over" if found.skipped or found.passed_over else ""
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
    missing = rows - epoch.trained - epoch.skipped - epoch.passed_over
    return ", ".join([*parts, f"{missing:,} NEVER"] if missing > 0 and not last else parts)


def _some(lines: list[str]) -> list[str]:
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else lines


def _span(word: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    return f"{len(numbers):,} {word}s ({min(numbers)} to {max(numbers)})"
