"""
Rows -> batches of tensors, one optimizer step at a time, prefetched by a thread.

The loader's whole state is `position`: samples consumed since the start of training. `Blend.rows_at` maps a position
to a row, whatever the number of processes, so a run can resume with any number of them.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.config.layout import split_slots
from shoal.data.blend import Blend
from shoal.data.pack import IGNORED_LABEL, Rows

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Tensors are int64 [batch, seq] unless said; `document_ids` is None if there is no document mask."""

    tokens: Tensor
    labels: Tensor  # the next token, or -100 to ignore
    positions: Tensor
    document_ids: Tensor | None
    sample_ids: tuple[int, ...]  # row numbers
    valid_tokens: int  # labels that are not ignored
    sources: Tensor | None = None  # [batch], the source of each row; None if there is one source
    row_tokens: tuple[int, ...] = ()  # valid tokens of each row

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


def make_batch(rows: Rows, row_ids: npt.NDArray[np.int64], sources: npt.NDArray[np.int64] | None = None) -> Batch:
    """
    Return a batch of the rows with these numbers. Raises DataError if their bytes were altered.

    sources: the source of each row; None if there is one source.
    """
    arrays = rows.read(row_ids)
    row_tokens = (arrays.labels != IGNORED_LABEL).sum(1).tolist()
    return Batch(
        torch.from_numpy(arrays.tokens),
        torch.from_numpy(arrays.labels),
        torch.from_numpy(arrays.positions),
        None if arrays.document_ids is None else torch.from_numpy(arrays.document_ids),
        tuple(row_ids.tolist()),
        sum(row_tokens),
        None if sources is None else torch.from_numpy(sources),
        tuple(row_tokens),
    )


class Loader:
    """
    This rank's micro-batches of each optimizer step.

    order: which row is at each position. device: the device that the batches will be copied to; for CUDA, they are in pinned memory. passed_over: [first, stop)
    ranges of positions that no step uses. at: a function called with "read" before each step is read.

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
        self._ready: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="loader", daemon=True)
        self._thread.start()

    def next_step(self) -> list[Batch]:
        """Return this rank's part of the next step; wait only if prefetching is too slow. Raises any error from reading ahead."""
        if self._closed.is_set():
            raise RuntimeError("the loader is closed")
        step = self._ready.get()
        if isinstance(step, BaseException):
            self._ready.put(step)  # the thread has ended: raise it again at the next call rather than block forever
            raise step
        self.first, batches = step
        self.position = self.first + self._global_batch
        return batches

    def close(self) -> None:
        """Stop the thread. May be called twice."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # make room for the thread if it blocks on a full queue
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _read_ahead(self, position: int) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # per thread; the default is GPU 0
            while not self._closed.is_set():
                self._at("read")
                position = self._after_windows(position)
                self._ready.put((position, self._step_at(position)))
                position += self._global_batch
        except BaseException as error:  # everything: `next_step` raises it in the caller's thread
            self._ready.put(error)

    def _after_windows(self, position: int) -> int:
        """Return the first position, at or after `position`, from which a step uses no position in `passed_over`."""
        for first, stop in self._passed_over:
            if position < stop and position + self._global_batch > first:
                position = stop
        return position

    def samples(self, position: int) -> list[int]:
        """Return the row numbers of the step that begins at `position`, over all ranks."""
        places = np.arange(position, position + self._global_batch)
        found: list[int] = self.order.rows_at(places).tolist()
        return found

    def batches_at(self, position: int) -> list[Batch]:
        """Reread this rank's part of the step that begins at `position`, without prefetching."""
        return self._step_at(position)

    def _step_at(self, position: int) -> list[Batch]:
        """Read this rank's part of the step at `position`: a pure function of the position."""
        first, stop = (position + slot * self._micro_batch for slot in (self._slots.start, self._slots.stop))
        row_ids = self.order.rows_at(np.arange(first, stop)).reshape(-1, self._micro_batch)
        sources = self.order.sources_of(row_ids) if len(self.order.sizes) > 1 else [None] * len(row_ids)
        batches = (make_batch(self.rows, *each) for each in zip(row_ids, sources, strict=True))
        return [batch.pin_memory() if self._device.type == "cuda" else batch for batch in batches]


def evaluation_rows(rows: Rows, max_tokens: int | None) -> int:
    """Return how many rows an evaluation reads: as many as fit in `max_tokens`, at least one. None reads all."""
    if max_tokens is None:
        return len(rows)
    return min(len(rows), max(1, max_tokens // rows.seq_len))


def evaluation_batches(
    rows: Rows, micro_batch: int, dp_rank: int, dp_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """
    Yield this rank's micro-batches of an evaluation. Each row is on exactly one rank. The rows do not depend on `dp_size`.

    Micro-batches go to the ranks in round-robin order. All ranks get the same number of batches, of the same size; rows with
    ignored labels pad the end.
    """
    count = evaluation_rows(rows, max_tokens)
    batches = -(-count // micro_batch)
    for turn in range(-(-batches // dp_size)):
        first = (turn * dp_size + dp_rank) * micro_batch
        ids = np.arange(first, first + micro_batch)
        batch = make_batch(rows, np.minimum(ids, count - 1))
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
