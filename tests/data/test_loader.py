"""The loader against rows read directly, with changing numbers of processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shoal.data.loader import FLOOR_SECONDS, RECENT, Batch, Loader, _Limit, evaluation_batches, evaluation_rows
from shoal.data.order.blend import Blend
from shoal.data.order.order import sample_at
from shoal.data.packing.pack import PackedStream, RowArrays, Rows
from shoal.data.stored.shards import Shard, write_shard
from shoal.data.stored.stream import TokenStream
from shoal.errors import DataError

NUM_ROWS, SEQ_LEN = 50, 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train-00000.safetensors"


@pytest.fixture
def rows(path: Path) -> Rows:
    return make_rows(path, document_mask=True)


def make_rows(path: Path, document_mask: bool, alter: bool = False) -> Rows:
    tokens = np.arange(NUM_ROWS * SEQ_LEN + 3, dtype=np.uint16)
    record = write_shard(path, tokens, np.arange(0, len(tokens), 5), 0)
    if alter:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    return PackedStream(TokenStream([Shard(path, record, tokens.dtype)]), SEQ_LEN, document_mask)


def steps(
    rows: Rows, dp_size: int, position: int, count: int, micro_batch: int = 2, global_batch: int = 12
) -> list[list[Batch]]:
    """Return the batches by [step][slot]; a step's slots are those of rank 0, then of rank 1, and so on."""
    ranks = []
    for rank in range(dp_size):
        loader = Loader(
            rows,
            Blend(7, [NUM_ROWS]),
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
            position=position,
        )
        ranks.append([loader.next_step() for _ in range(count)])
        assert loader.position == position + count * global_batch
        loader.close()
    return [[batch for rank in ranks for batch in rank[step]] for step in range(count)]


def test_each_sample_once_an_epoch_though_the_number_of_processes_changes(rows: Rows) -> None:
    seen: list[int] = []
    for dp_size in (1, 2, 3, 6, 2):
        for step in steps(rows, dp_size, len(seen), 5):
            seen += [sample for batch in step for sample in batch.sample_ids]
    assert len(seen) == 300
    for epoch in range(6):
        assert sorted(seen[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]) == list(range(NUM_ROWS))
    assert seen == sample_at(7, np.arange(300), NUM_ROWS).tolist()


def test_slots_are_the_same_batches_whoever_owns_them(rows: Rows) -> None:
    alone = steps(rows, 1, 24, 3)
    for dp_size in (2, 3, 6):
        for ours, theirs in zip(alone, steps(rows, dp_size, 24, 3), strict=True):
            assert [b.sample_ids for b in ours] == [b.sample_ids for b in theirs]
            assert all(torch.equal(a.labels, b.labels) for a, b in zip(ours, theirs, strict=True))


def test_a_batch_holds_its_rows(rows: Rows) -> None:
    for batch in steps(rows, 1, 0, 1)[0]:
        packed = rows.read(batch.sample_ids)
        assert batch.document_ids is not None
        assert packed.document_ids is not None
        for tensor, array in [
            (batch.tokens, packed.tokens),
            (batch.labels, packed.labels),
            (batch.positions, packed.positions),
            (batch.document_ids, packed.document_ids),
        ]:
            assert tensor.dtype == torch.int64
            np.testing.assert_array_equal(tensor.numpy(), array)
        assert batch.valid_tokens == (packed.labels != -100).sum() < 2 * SEQ_LEN
        moved = batch.to("meta")
        assert moved.tokens.is_meta
        assert moved.sample_ids == batch.sample_ids


def test_without_a_mask_there_are_no_document_ids(path: Path) -> None:
    batch = steps(make_rows(path, document_mask=False), 1, 0, 1)[0][0]
    assert batch.document_ids is None
    assert batch.valid_tokens == 2 * SEQ_LEN
    assert batch.to("cpu").document_ids is None


def test_damage_found_by_the_thread_reaches_whoever_asks(path: Path) -> None:
    loader = Loader(
        make_rows(path, True, alter=True), Blend(0, [NUM_ROWS]), global_batch=4, micro_batch=4, dp_rank=0, dp_size=1
    )
    for _ in range(2):  # the second call raises again rather than block
        with pytest.raises(DataError, match=r"train-00000.safetensors was altered"):
            loader.next_step()
    assert loader.position == 0
    loader.close()


class Faulty:
    """Rows whose reads do what a list says: fail, wait for an event, or (None) read."""

    def __init__(self, rows: Rows, plan: list[Exception | threading.Event | None]) -> None:
        self.rows, self.plan, self.seq_len = rows, plan, rows.seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        what = self.plan.pop(0) if self.plan else None
        if isinstance(what, Exception):
            raise what
        if what is not None:
            what.wait()
        return self.rows.read(row_ids)


def loader_of(rows: Rows, **options: Any) -> Loader:
    return Loader(rows, Blend(7, [NUM_ROWS]), global_batch=4, micro_batch=4, dp_rank=0, dp_size=1, **options)


def taken(loader: Loader, count: int) -> list[int]:
    return [row for _ in range(count) for batch in loader.next_step() for row in batch.sample_ids]


def test_a_thread_that_fails_is_replaced_where_it_was(rows: Rows) -> None:
    plan: list[Any] = [
        None,
        MemoryError("no room"),
        None,
        None,
        OSError(5, "a"),
        OSError(6, "b"),
        OSError(7, "c"),
        None,
    ]
    loader = loader_of(Faulty(rows, plan), passed_over=[(8, 12)])
    assert taken(loader, 1) == sample_at(7, np.arange(4), NUM_ROWS).tolist()
    assert loader.restarted == []
    assert taken(loader, 1) == sample_at(7, np.arange(4, 8), NUM_ROWS).tolist()
    assert loader.restarted == ["MemoryError: no room"]
    assert taken(loader, 8) == sample_at(7, np.arange(12, 44), NUM_ROWS).tolist()  # three in a row among them
    assert plan == []
    loader.close()


def test_a_thread_that_always_fails_raises_its_error(rows: Rows) -> None:
    loader = loader_of(Faulty(rows, [None, *(ValueError(str(n)) for n in range(9))]), prefetch=1)
    taken(loader, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="3"):  # the first and those of three new threads
            loader.next_step()
    assert loader.position == 4
    loader.close()


def test_a_stuck_thread_is_replaced_and_what_it_reads_late_is_dropped(rows: Rows) -> None:
    late = [threading.Event(), threading.Event()]
    before = threading.active_count()
    loader = loader_of(Faulty(rows, [None, None, *late]), stuck_seconds=0.2)
    seen = taken(loader, 3)
    assert loader.restarted[:2] == ["no step was read for 0.2 s", "no step was read for 0.4 s"]
    for each in late:
        each.set()
    while threading.active_count() > before + 1:  # the two end after their read
        threading.Event().wait(0.001)
    assert seen + taken(loader, 9) == sample_at(7, np.arange(48), NUM_ROWS).tolist()
    loader.close()


def test_data_that_never_arrives_ends_with_a_message(rows: Rows) -> None:
    never = threading.Event()
    loader = loader_of(Faulty(rows, [never] * 9), stuck_seconds=0.02)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"not advanced for 0.16 s, and 3 new reading threads .* data.stuck_seconds"
        ):
            loader.next_step()
    never.set()
    loader.close()


def test_the_limit_of_a_read_is_learned() -> None:
    limit = _Limit(300.0)
    assert [limit.seconds(n) for n in (0, 1, 2)] == [300, 600, 1200]
    for seconds in (0.1, 2.0, 0.1, 0.1, 0.1):
        limit.learn(seconds)
    assert [limit.seconds(n) for n in (0, 1)] == [20, 40]  # 10 times the slowest
    limit.learn(200.0)
    assert limit.seconds(0) == 400  # slower than the option expects
    for _ in range(RECENT):
        limit.learn(0.001)
    assert limit.seconds(0) == FLOOR_SECONDS
    assert _Limit(0.0).seconds(2) is None


def test_closing_ends_the_thread_at_once(rows: Rows) -> None:
    before = threading.active_count()
    loader = Loader(rows, Blend(0, [NUM_ROWS]), global_batch=4, micro_batch=4, dp_rank=0, dp_size=1, prefetch=1)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("cpu")], ids=str)
def test_the_thread_takes_its_processs_device_before_it_locks_memory(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A new thread's device is GPU 0, and page-locking opens a context on the current device."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda asked: calls.append((thread_name(), "set_device", asked)))

    def pin(batch: Batch) -> Batch:
        calls.append((thread_name(), "pin"))
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    loader = Loader(rows, Blend(0, [NUM_ROWS]), global_batch=4, micro_batch=2, dp_rank=0, dp_size=1, device=device)
    batches = loader.next_step()
    loader.close()
    assert len(batches) == 2
    if device.type == "cpu":
        assert calls == []
    else:
        assert calls[:3] == [("loader", "set_device", device), ("loader", "pin"), ("loader", "pin")]
        assert [call[1] for call in calls].count("set_device") == 1


def thread_name() -> str:
    return threading.current_thread().name


@pytest.mark.parametrize(("global_batch", "micro_batch", "dp_size"), [(10, 4, 1), (8, 4, 3), (4, 8, 1)])
def test_batches_that_do_not_divide_are_refused(rows: Rows, global_batch: int, micro_batch: int, dp_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"global_batch {global_batch} .* micro_batch {micro_batch}, .* {dp_size} data-parallel"
    ):
        Loader(
            rows, Blend(0, [NUM_ROWS]), global_batch=global_batch, micro_batch=micro_batch, dp_rank=0, dp_size=dp_size
        )


@pytest.mark.parametrize("dp_size", [1, 2, 3, 20])
@pytest.mark.parametrize(("max_tokens", "count"), [(None, NUM_ROWS), (100, 12), (1, 1), (10**9, NUM_ROWS)])
def test_evaluation_reads_the_same_rows_whatever_the_layout(
    rows: Rows, dp_size: int, max_tokens: int | None, count: int
) -> None:
    ranks = [list(evaluation_batches(rows, 4, rank, dp_size, max_tokens)) for rank in range(dp_size)]
    seen = [sample for batches in ranks for batch in batches for sample in batch.sample_ids]
    assert sorted(seen) == list(range(count))
    assert evaluation_rows(rows, max_tokens) == count
    assert len({len(batches) for batches in ranks}) == 1  # each rank has the same number of batches
    assert {batch.tokens.shape[0] for batches in ranks for batch in batches} == {4}
    counted = sum(int((b.labels != -100).any(1).sum()) for batches in ranks for b in batches)
    assert counted == count
