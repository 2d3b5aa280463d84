"""
Rows -> batches of tensors, a step at a time, read ahead by a thread.

The loader's whole state is `position`: samples consumed since the start of training. Which sample is at
a position is `order.sample_at`, which knows nothing of processes, so a run may go on with any number of them.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from shoal.config.layout import deal
from shoal.data.order import sample_at
from shoal.data.pack import IGNORED_LABEL, Rows

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Tensors are int64 [batch, seq]; `document_ids` is None where documents are not kept apart."""

    tokens: Tensor
    labels: Tensor  # the next token, or -100 where nothing is to be predicted
    positions: Tensor
    document_ids: Tensor | None
    sample_ids: tuple[int, ...]  # the rows' numbers
    valid_tokens: int  # labels that count

    def ignored(self) -> Batch:
        """The same shapes, and nothing that counts: a turn for a process that has none of its own."""
        return _count_only(self, 0)

    def to(self, device: torch.device | str) -> Batch:
        """On `device`; from pinned memory without waiting for the copy."""
        tokens, labels, positions = (
            t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.positions)
        )
        ids = None if self.document_ids is None else self.document_ids.to(device, non_blocking=True)
        return Batch(tokens, labels, positions, ids, self.sample_ids, self.valid_tokens)

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a GPU copies while it computes."""
        ids = None if self.document_ids is None else self.document_ids.pin_memory()
        tokens, labels, positions = (t.pin_memory() for t in (self.tokens, self.labels, self.positions))
        return Batch(tokens, labels, positions, ids, self.sample_ids, self.valid_tokens)


def make_batch(rows: Rows, row_ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Batch:
    """The rows of these numbers. Raises DataError where their bytes were altered."""
    arrays = rows.read(row_ids)
    return Batch(
        torch.from_numpy(arrays.tokens),
        torch.from_numpy(arrays.labels),
        torch.from_numpy(arrays.positions),
        None if arrays.document_ids is None else torch.from_numpy(arrays.document_ids),
        tuple(row_ids.tolist()),
        int((arrays.labels != IGNORED_LABEL).sum()),
    )


class Loader:
    """
    This rank's micro-batches of each optimizer step.

    `device`: that will get them; for CUDA they are in pinned memory. `passed_over`: [first, stop) of positions that no step
    has a part of. `at("read")` is called before each step is read.

    A step has `global_batch // micro_batch` slots, micro-batches in a fixed order; a rank owns a contiguous run of
    them (`layout.deal`). Raises ValueError where there are fewer than ranks.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
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
                f"global_batch {global_batch} is no multiple of micro_batch {micro_batch}, or gives {dp_size} ranks less than one each"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not in range({dp_size})")
        self.position = position
        """Samples up to the end of the last step that was handed out, over all ranks."""
        self.first = position
        """Where that step began."""
        self.rows = rows
        self._at = at
        self._seed, self._device, self._passed_over = seed, device, sorted(passed_over)
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._slots = deal(slots, dp_size)[dp_rank]
        self._ready: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="loader", daemon=True)
        self._thread.start()

    def next_step(self) -> list[Batch]:
        """The next optimizer step; blocks only if reading ahead was too slow. Raises what reading raised."""
        if self._closed.is_set():
            raise RuntimeError("the loader is closed")
        step = self._ready.get()
        if isinstance(step, BaseException):
            self._ready.put(step)  # the thread has ended: asked again, say the same rather than wait for ever
            raise step
        self.first, batches = step
        self.position = self.first + self._global_batch
        return batches

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # make room for a thread that waits to hand over a step
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _read_ahead(self, position: int) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread's own, else the first
            while not self._closed.is_set():
                self._at("read")
                position = self._after_windows(position)
                self._ready.put((position, self._step_at(position)))
                position += self._global_batch
        except BaseException as error:  # everything: it is raised in the thread that asks
            self._ready.put(error)

    def _after_windows(self, position: int) -> int:
        """Where a step may begin from `position` on, that has no sample which is to be passed over."""
        for first, stop in self._passed_over:
            if position < stop and position + self._global_batch > first:
                position = stop
        return position

    def samples(self, position: int) -> list[int]:
        """The rows of the step that begins at `position`, over all ranks."""
        places = np.arange(position, position + self._global_batch)
        found: list[int] = sample_at(self._seed, places, len(self.rows)).tolist()
        return found

    def batches_at(self, position: int) -> list[Batch]:
        """This rank's part of the step that begins at `position`, once more. Reads it now."""
        return self._step_at(position)

    def _step_at(self, position: int) -> list[Batch]:
        """A pure function of the position."""
        first, stop = (position + slot * self._micro_batch for slot in (self._slots.start, self._slots.stop))
        row_ids = sample_at(self._seed, np.arange(first, stop), len(self.rows))
        batches = (make_batch(self.rows, ids) for ids in row_ids.reshape(-1, self._micro_batch))
        return [batch.pin_memory() if self._device.type == "cuda" else batch for batch in batches]


def evaluation_rows(rows: Rows, max_tokens: int | None) -> int:
    """How many rows an evaluation reads: as many as fit in `max_tokens`, at least one; None: all."""
    if max_tokens is None:
        return len(rows)
    return min(len(rows), max(1, max_tokens // rows.seq_len))


def evaluation_batches(
    rows: Rows, micro_batch: int, dp_rank: int, dp_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """
    The first rows in order, each on exactly one rank: the same rows whatever `dp_size` is.

    Ranks take turns, and all get equally many batches of one size: what is missing at the end is filled with rows
    that do not count.
    """
    count = evaluation_rows(rows, max_tokens)
    batches = -(-count // micro_batch)
    for turn in range(-(-batches // dp_size)):
        first = (turn * dp_size + dp_rank) * micro_batch
        ids = np.arange(first, first + micro_batch)
        batch = make_batch(rows, np.minimum(ids, count - 1))
        yield batch if ids[-1] < count else _count_only(batch, max(0, count - first))


def _count_only(batch: Batch, rows: int) -> Batch:
    """The same shapes, in which only the first `rows` rows count."""
    labels = batch.labels.clone()
    labels[rows:] = IGNORED_LABEL
    valid = int((labels != IGNORED_LABEL).sum())
    return dataclasses.replace(batch, labels=labels, sample_ids=batch.sample_ids[:rows], valid_tokens=valid)
