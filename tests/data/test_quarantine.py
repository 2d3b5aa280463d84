"""Rows that cannot be read: really altered bytes and a real disk error, against the bytes that remain."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from shoal.data.dataset import BlendRows
from shoal.data.loader import Loader
from shoal.data.order.audit import audit, describe
from shoal.data.order.blend import Blend, Stage
from shoal.data.order.ledger import Header, Ledger, checksum
from shoal.data.order.quarantine import Quarantine, candidates
from shoal.data.packing.pack import PackedStream
from shoal.data.pretokenized.token_file import Contents, TokenFile, Vocabulary
from shoal.data.stored.shards import Shard, write_shard
from shoal.data.stored.stream import TokenStream
from shoal.data.where import Timeline
from shoal.errors import DataError, UnreadableError

SEQ_LEN, OF_SHARD = 8, 400  # tokens
ROWS = 3 * OF_SHARD // SEQ_LEN  # of a source: row n begins with token n * SEQ_LEN
WEIGHTS = [Stage(0, (1, 2))]


@pytest.fixture
def rows(tmp_path: Path) -> BlendRows:
    """Return two sources of three shards each; the tokens of the second continue those of the first."""
    return BlendRows([source(tmp_path, 0), source(tmp_path, 1)])


def source(folder: Path, number: int) -> PackedStream:
    shards = []
    for index in range(3):
        first = (3 * number + index) * OF_SHARD
        tokens = np.arange(first, first + OF_SHARD + (index == 2), dtype=np.uint16)
        path = folder / f"{number}-{index}.safetensors"
        shards.append(Shard(path, write_shard(path, tokens, np.array([0]), 0), tokens.dtype))
    return PackedStream(TokenStream(shards), SEQ_LEN, document_mask=False)


def alter(folder: Path, number: int, index: int) -> set[int]:
    """Flip one bit of a shard; return the rows of the blend that it makes unreadable: each that has a token there."""
    path = folder / f"{number}-{index}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    first = number * ROWS + index * OF_SHARD // SEQ_LEN
    return set(range(first - (index > 0), first + OF_SHARD // SEQ_LEN))  # the row before has its last label there


def ids_of(rows: BlendRows, order: Blend, dp_size: int, steps: int) -> list[list[int]]:
    """Return the rows that each step reads, from loaders of `dp_size` ranks; each has the tokens that its number says."""
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(dp_size):
        quarantine = Quarantine(rows, order, {})
        loader = Loader(
            rows, order, global_batch=12, micro_batch=2, dp_rank=rank, dp_size=dp_size, quarantine=quarantine
        )
        for step in found:
            for batch in loader.next_step():
                assert batch.tokens[:, 0].tolist() == [row * SEQ_LEN for row in batch.sample_ids]
                assert batch.sources is not None
                assert batch.sources.tolist() == order.sources_of(batch.sample_ids).tolist()
                step += batch.sample_ids
        loader.close()
    return found


@pytest.mark.parametrize("stages", [WEIGHTS, []], ids=["weights", "all rows once"])
def test_any_number_of_ranks_reads_the_same_substitutes(tmp_path: Path, rows: BlendRows, stages: list[Stage]) -> None:
    broken = alter(tmp_path, 1, 1) | alter(tmp_path, 0, 2)
    order = Blend(5, rows.sizes, stages)
    steps = 30
    alone = ids_of(rows, order, 1, steps)
    assert alone == ids_of(rows, order, 2, steps) == ids_of(rows, order, 3, steps)
    asked = order.rows_at(np.arange(12 * steps)).tolist()
    read = [row for step in alone for row in step]
    assert {a for a, r in zip(asked, read, strict=True) if a != r} == broken & set(asked)
    assert not broken & set(read)
    assert all(r in candidates(order, a) for a, r in zip(asked, read, strict=True) if a != r)


def test_a_row_has_candidates_of_its_own() -> None:
    order = Blend(3, [40, 300])
    for row in (0, 39, 40, 200, 339):
        found = candidates(order, row)
        assert row not in found
        assert len(set(found)) == len(found) >= 39
        assert {int(order.sources_of(each)) for each in found} == {int(order.sources_of(row))}
    assert candidates(order, 50) != candidates(order, 51)
    assert candidates(Blend(3, [1]), 0) == []


def test_what_is_known_is_not_tried_again_unless_its_substitute_fails(tmp_path: Path, rows: BlendRows) -> None:
    order = Blend(0, rows.sizes)
    quarantine = Quarantine(rows, order, {7: 9, 8: 60})
    read = quarantine.read(np.array([7, 3, 8]))
    assert (read.row_ids.tolist(), read.replaced) == ([9, 3, 60], ())
    broken = alter(tmp_path, 0, 1)
    assert 60 in broken
    read = Quarantine(source_again(tmp_path, rows), order, {7: 9, 8: 60}).read(np.array([7, 3, 8]))
    [news] = read.replaced
    assert (news.row, read.row_ids.tolist()) == (8, [9, 3, news.substitute])
    assert news.substitute not in broken


def source_again(folder: Path, rows: BlendRows) -> BlendRows:
    """Return the same rows, read from the disk as by another process."""
    for part in rows.parts:
        for shard in part._stream._parts:  # type: ignore[attr-defined]
            shard.__dict__.pop("_verified", None)
    return rows


def test_a_source_without_a_readable_row_ends_the_run(tmp_path: Path, rows: BlendRows) -> None:
    for index in range(3):
        alter(tmp_path, 1, index)
    with pytest.raises(
        DataError, match=r"no other row of its source can be read instead: .*1-0.safetensors was altered"
    ):
        Quarantine(rows, Blend(0, rows.sizes), {}).read(np.array([ROWS + 3]))


def test_a_disk_error_is_an_unreadable_row(tmp_path: Path, rows: BlendRows) -> None:
    """Linux answers EIO where a process reads its own unmapped memory, as a disk does at a bad sector."""
    path = tmp_path / "0-1.safetensors"
    path.unlink()
    os.symlink("/proc/self/mem", path)
    with pytest.raises(UnreadableError, match=r"cannot read .*0-1.safetensors: Input/output error; rebuild it"):
        rows.read([60])
    read = Quarantine(rows, Blend(0, rows.sizes), {}).read(np.array([3, 60]))
    assert read.row_ids[0] == 3
    assert [each.row for each in read.replaced] == [60]
    path.unlink()
    with pytest.raises(DataError, match="No such file") as caught:
        rows.read([60])
    assert not isinstance(caught.value, UnreadableError)  # not a matter of one row


def test_ids_outside_the_vocabulary_are_unreadable_rows(tmp_path: Path) -> None:
    ids = np.arange(401, dtype="<u2")
    ids[83] = 500
    (tmp_path / "t.bin").write_bytes(ids.tobytes())
    file = TokenFile(
        "t.bin", tmp_path / "t.bin", Contents("nanogpt", ids.dtype, 0, 401), Vocabulary("v", 450, 449, None)
    )
    rows = PackedStream(TokenStream([file]), SEQ_LEN, document_mask=True)
    read = Quarantine(rows, Blend(0, [len(rows)]), {}).read(np.arange(50))
    assert [each.row for each in read.replaced] == [10]
    assert "token 83 (byte 166) is 500, not an id of v" in read.replaced[0].why
    (tmp_path / "t.bin").write_bytes(ids.tobytes()[:200])
    with pytest.raises(UnreadableError, match=r"t\.bin was cut short while it was read"):
        rows.read([20])


# --- the ledger ----------------------------------------------------------------------------------------------

HEADER = Header(60, 1, 6, 2, "tokens", (("a", 20, None), ("b", 40, None)), ((0, (1, 2)),))


class Run:
    """A run that replaces rows, and the row that it read at each position."""

    def __init__(self, path: Path) -> None:
        self.ledger, self.known, self.read = Ledger(path), dict[int, int](), dict[int, int]()
        self.start(0)

    def start(self, step: int) -> None:
        self.step = step
        self.read = {at: row for at, row in self.read.items() if at < 6 * step}
        self.ledger.begin(HEADER, step, 6 * step, self.known)

    def replace(self, row: int, substitute: int) -> None:
        self.known[row] = substitute
        self.ledger.quarantine(row, substitute)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            places = range(6 * self.step, 6 * self.step + 6)
            ids = [self.known.get(row, row) for row in HEADER.order.rows_at(places).tolist()]
            self.read |= dict(zip(places, ids, strict=True))
            self.step += 1
            self.ledger.record(self.step, places.start, places.stop, 2.0 * checksum(ids, HEADER.bits))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run of 30 steps that replaced rows 3 and 25, was resumed before it replaced row 41, and replaced row 50 instead."""
    run = Run(tmp_path / "ledger.jsonl")
    run.take(4)
    run.replace(3, 11)
    run.take(6)
    run.replace(25, 59)
    run.take(2)
    run.replace(41, 30)
    run.take(3)
    del run.known[41]
    run.start(11)
    run.take(1)
    run.replace(50, 20)
    run.replace(25, 22)  # its first substitute failed too
    run.take(18)
    run.ledger.close()
    return run


def test_the_audit_counts_replaced_rows_by_source_and_epoch(tmp_path: Path, run: Run) -> None:
    found = audit(tmp_path / "ledger.jsonl")
    assert found.passed, found.problems
    assert found.quarantined == {"a": [(3, 11)], "b": [(5, 2), (30, 0)]}
    asked = HEADER.order.rows_at(range(180)).tolist()
    counted = {"a": 0, "b": 0}
    for at, row in enumerate(asked):
        counted["ab"[row >= 20]] += row != run.read[at]
    assert {n: sum(e.replaced for e in epochs.values()) for n, epochs in found.sources.items()} == counted
    assert sum(e.trained + e.replaced for epochs in found.sources.values() for e in epochs.values()) == 180
    text = "\n".join(describe(found))
    assert "quarantined: row 5 of b, replaced by row 2" in text
    assert "19 of 20 samples, each once, 1 replaced" in text
    assert text.endswith(
        "PASS: each sample that was not skipped, passed over or replaced was trained on once per epoch so far"
    )
    assert json.loads(json.dumps(found.as_json()))["quarantined"]["a"] == [[3, 11]]


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("step 13 did not train on the samples", lambda lines: [each for each in lines if each != {"quarantined": [3, 11]}]),
        ("did not train", lambda lines: [{"quarantined": [3, 12]} if each == {"quarantined": [3, 11]} else each for each in lines]),
        ("row 3 was replaced by row 30, which is not another row of its source", lambda lines: [lines[0], {"quarantined": [3, 30]}]),
        ("row 3 was replaced by row 3,", lambda lines: [lines[0], {"quarantined": [3, 3]}]),
        ("row 99 was replaced by row 3,", lambda lines: [lines[0], {"quarantined": [99, 3]}]),
    ],
)  # fmt: skip
def test_the_audit_fails_if_other_rows_were_read(tmp_path: Path, run: Run, says: str, change: object) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))  # type: ignore[operator]
    found = audit(path)
    assert not found.passed
    assert says in "\n".join(found.problems)


def test_the_timeline_knows_which_row_was_read(tmp_path: Path, run: Run) -> None:
    timeline, header = Timeline.of_ledger(tmp_path / "ledger.jsonl", micro_batch=2)
    places = range(180)
    assert timeline.read_at(places, header.order.rows_at(places)).tolist() == [run.read[at] for at in places]
