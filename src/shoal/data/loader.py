"""
Rows -> batches of tensors, one optimizer step at a time, prefetched by a thread.

The loader's whole state is `position`: samples consumed since the start of training. `Blend.rows_at` maps a position
to a row, whatever the number of processes, so a run can resume with any number of them. For the same reason a reading thread
that fails or hangs can be replaced: a new one starts at the position after the last step that was delivered.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.config.layout import split_slots
from shoal.data.order.blend import Blend
from shoal.data.order.quarantine import Quarantine, ReadRows, Replaced
from shoal.data.packing.pack import IGNORED_LABEL, Ints, RowArrays, Rows
from shoal.errors import DataError, ShoalError
from shoal.system.byte_file import reopen

_CPU: Final = torch.device("cpu")

MOST_RESTARTS: Final = 3  # of the reading thread without a step between them
RECENT: Final = 100  # reads to learn their usual time from
FEW: Final = 5  # reads needed before it is known
SLOWER: Final = 10  # times the slowest recent read: allows for other programs on the same cores or disk
FLOOR_SECONDS: Final = (
    10.0  # less than the launcher's limit for a step, so that a stuck read costs no restart of the workers
)
CLOSE_SECONDS: Final = 2.0  # longest wait for a thread that is reading when the loader closes


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Tensors are int64 [batch, seq] unless said; `document_ids` is None if there is no document mask."""

    tokens: Tensor
    labels: Tensor  # the next token, or -100 to ignore
    positions: Tensor
    document_ids: Tensor | None
    sample_ids: tuple[int, ...]  # numbers of the rows that were read, substitutes included
    valid_tokens: int  # labels that are not ignored
    sources: Tensor | None = None  # [batch], the source of each row; None if there is one source
    row_tokens: tuple[int, ...] = ()  # valid tokens of each row
    replaced: tuple[Replaced, ...] = ()  # rows that could not be read, those that were not known before

    def ignored(self) -> Batch:
        """Return a batch of the same shapes with every label ignored, for a rank with fewer micro-batches than the others."""
        return _count_only(self, 0)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`, asynchronously if this batch is in pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: change(tensor)
            for name in ("tokens", "labels", "positions", "document_ids", "sources")
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **tensors)


def make_batch(read: ReadRows, sources: npt.NDArray[np.int64] | None = None) -> Batch:
    """Return a batch of rows that were read. sources: the source of each row; None if there is one source."""
    arrays = read.arrays
    row_tokens = (arrays.labels != IGNORED_LABEL).sum(1).tolist()
    return Batch(
        torch.from_numpy(arrays.tokens),
        torch.from_numpy(arrays.labels),
        torch.from_numpy(arrays.positions),
        None if arrays.document_ids is None else torch.from_numpy(arrays.document_ids),
        tuple(read.row_ids.tolist()),
        sum(row_tokens),
        None if sources is None else torch.from_numpy(sources),
        tuple(row_tokens),
        read.replaced,
    )


class _Step(NamedTuple):
    """A step that was read: the position of its first sample, this rank's batches, and how long reading them took."""

    first: int
    batches: list[Batch]
    seconds: float


class _Thread:
    """
    A thread that reads steps ahead into its own queue, so that steps read after its replacement are dropped.

    steps: the steps from the loader's position on.
    """

    def __init__(self, steps: Iterator[_Step], prefetch: int) -> None:
        self.ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=prefetch)
        self.closed = threading.Event()
        self._steps = steps
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """End the thread; abandon it if it has not ended after `seconds`."""
        self.closed.set()
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            try:  # make room for the thread if it blocks on a full queue
                self.ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self) -> None:
        try:
            while not self.closed.is_set():
                self.ready.put(next(self._steps))
        except BaseException as error:  # everything: `next_step` handles it in the caller's thread
            self.ready.put(error)


class _Limit:
    """How long to wait for a step's rows. most: `data.stuck_seconds`."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._recent: deque[float] = deque(maxlen=RECENT)

    def learn(self, seconds: float) -> None:
        """Note how long reading a step took."""
        self._recent.append(seconds)

    def seconds(self, restarts: int) -> float | None:
        """Return the limit after `restarts` in a row, each of which doubles it; None for no limit."""
        if not self._most:
            return None
        slowest = max(self._recent, default=0.0)
        usual = self._most if len(self._recent) < FEW else max(FLOOR_SECONDS, SLOWER * slowest)
        return max(min(self._most, usual), 2 * slowest) * 2.0**restarts


class Loader:
    """
    This rank's micro-batches of each optimizer step.

    order: which row is at each position. device: the device that the batches will be copied to; for CUDA, they are in pinned memory. passed_over: [first, stop)
    ranges of positions that no step uses. at: a function called with "read" before each step is read.

    quarantine: replaces rows that cannot be read; None raises DataError for them. stuck_seconds: longest time to wait for a step
    before the reading thread is replaced; 0 for no limit.

    A step has `global_batch // micro_batch` slots: micro-batches in a fixed order. A rank owns consecutive slots
    (`layout.split_slots`). Raises ValueError if `global_batch` is not a multiple of `micro_batch`, or if there are fewer slots
    than ranks.
    """

    def __init__(
        self,
        rows: Rows,
        order: Blend,
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        passed_over: Sequence[tuple[int, int]] = (),
        at: Callable[[str], None] = lambda phase: None,
        prefetch: int = 2,
        device: torch.device = _CPU,
        quarantine: Quarantine | None = None,
        stuck_seconds: float = 0.0,
    ) -> None:
        slots = global_batch // micro_batch
        if global_batch % micro_batch or slots < dp_size:
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of micro_batch {micro_batch}, or has fewer micro-batches "
                f"than the {dp_size} data-parallel ranks"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not in range({dp_size})")
        self.position = position
        """Samples consumed over all ranks, up to the end of the last step returned."""
        self.first = position
        """Position of the first sample of the last step returned."""
        self.rows, self.order = rows, order
        self._at = at
        self._device, self._passed_over = device, sorted(passed_over)
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._slots = split_slots(slots, dp_size)[dp_rank]
        self._quarantine = quarantine
        self._prefetch, self._limit = prefetch, _Limit(stuck_seconds)
        self._restarts: list[str] = []  # reasons, since the last step
        self.restarted: list[str] = []
        """Why the reading thread was replaced before the last step returned; usually empty."""
        self._closed = False
        self._thread = self._start()

    def next_step(self) -> list[Batch]:
        """
        Return this rank's part of the next step; wait only if prefetching is too slow.

        A reading thread that fails or hangs is replaced, up to `MOST_RESTARTS` times in a row. Raises its error after that, and
        at once an error that a user can fix.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        step = self._next()
        self._limit.learn(step.seconds)
        self.restarted, self._restarts = self._restarts, []
        self.first = step.first
        self.position = self.first + self._global_batch
        return step.batches

    def _next(self) -> _Step:
        """Return the next step, from a new thread if necessary."""
        while True:
            limit = self._limit.seconds(len(self._restarts))
            try:
                step = self._thread.ready.get(timeout=limit)
            except queue.Empty:
                assert limit is not None
                self._replace(f"no step was read for {limit:.3g} s", _stuck(limit))
                continue
            if not isinstance(step, BaseException):
                return step
            if isinstance(step, ShoalError) or not isinstance(step, Exception):
                self._thread.ready.put(step)  # raise it again at the next call rather than block forever
                raise step
            self._replace(f"{type(step).__name__}: {step}", step)

    def _replace(self, why: str, error: Exception) -> None:
        """Start a new thread at the first position that was not delivered. Raises `error` after `MOST_RESTARTS` in a row."""
        self._thread.close(0.0)
        if len(self._restarts) == MOST_RESTARTS:
            self._thread.ready.put(error)
            raise error
        self._restarts.append(why)
        reopen()
        self._thread = self._start()

    def _start(self) -> _Thread:
        return _Thread(self._steps(self.position), self._prefetch)

    def close(self) -> None:
        """Stop the thread. May be called twice."""
        self._closed = True
        self._thread.close(CLOSE_SECONDS)

    def _steps(self, position: int) -> Iterator[_Step]:
        """Read this rank's part of each step from `position` on."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread; the default is GPU 0
        while True:
            begin = time.monotonic()
            self._at("read")
            position = self._after_windows(position)
            batches = self._step_at(position)
            yield _Step(position, batches, time.monotonic() - begin)
            position += self._global_batch

    def _after_windows(self, position: int) -> int:
        """Return the first position, at or after `position`, from which a step uses no position in `passed_over`."""
        for first, stop in self._passed_over:
            if position < stop and position + self._global_batch > first:
                position = stop
        return position

    def samples(self, position: int) -> list[int]:
        """Return the numbers of the rows that the step at `position` reads, over all ranks."""
        places = np.arange(position, position + self._global_batch)
        found: list[int] = self.order.rows_at(places).tolist()
        return [self._quarantine.instead(row) for row in found] if self._quarantine else found

    def batches_at(self, position: int) -> list[Batch]:
        """Reread this rank's part of the step that begins at `position`, without prefetching."""
        return self._step_at(position)

    def _step_at(self, position: int) -> list[Batch]:
        """Read this rank's part of the step at `position`: a pure function of the position."""
        first, stop = (position + slot * self._micro_batch for slot in (self._slots.start, self._slots.stop))
        row_ids = self.order.rows_at(np.arange(first, stop)).reshape(-1, self._micro_batch)
        sources = self.order.sources_of(row_ids) if len(self.order.sizes) > 1 else [None] * len(row_ids)
        batches = (make_batch(self._read(ids), of) for ids, of in zip(row_ids, sources, strict=True))
        return [batch.pin_memory() if self._device.type == "cuda" else batch for batch in batches]

    def _read(self, row_ids: npt.NDArray[np.int64]) -> ReadRows:
        return self._quarantine.read(row_ids) if self._quarantine else ReadRows(self.rows.read(row_ids), row_ids)


def _stuck(seconds: float) -> DataError:
    return DataError(
        f"reading the training data has not advanced for {seconds:.3g} s, and {MOST_RESTARTS} new reading threads did not help; "
        "check the disk or the network file system of data.folder; data.stuck_seconds 0 waits without a limit"
    )


def evaluation_rows(rows: Rows, max_tokens: int | None) -> int:
    """Return how many rows an evaluation reads: as many as fit in `max_tokens`, at least one. None reads all."""
    if max_tokens is None:
        return len(rows)
    return min(len(rows), max(1, max_tokens // rows.seq_len))


def evaluation_batches(
    rows: Rows,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    max_tokens: int | None = None,
    read: Callable[[Ints, npt.NDArray[np.bool_]], RowArrays] | None = None,
) -> Iterator[Batch]:
    """
    Yield this rank's micro-batches of an evaluation. Each row is on exactly one rank. The rows do not depend on `dp_size`.

    Micro-batches go to the ranks in round-robin order. All ranks get the same number of batches, of the same size; rows with
    ignored labels pad the end. read: reads rows, given their numbers and whether each is one of the evaluation's or padding;
    None reads them from `rows`.
    """
    count = evaluation_rows(rows, max_tokens)
    batches = -(-count // micro_batch)
    for turn in range(-(-batches // dp_size)):
        first = (turn * dp_size + dp_rank) * micro_batch
        ids = np.arange(first, first + micro_batch)
        within = np.minimum(ids, count - 1)
        arrays = rows.read(within) if read is None else read(within, ids < count)
        batch = make_batch(ReadRows(arrays, within))
        yield batch if ids[-1] < count else _count_only(batch, max(0, count - first))


def _count_only(batch: Batch, rows: int) -> Batch:
    """Return `batch` with the labels after the first `rows` rows ignored."""
    labels = batch.labels.clone()
    labels[rows:] = IGNORED_LABEL
    row_tokens = (labels != IGNORED_LABEL).sum(1).tolist()
    return dataclasses.replace(
        batch,
        labels=labels,
        sample_ids=batch.sample_ids[:rows],
        valid_tokens=sum(row_tokens),
        row_tokens=tuple(row_tokens),
    )
