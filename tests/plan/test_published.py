"""The planner against steps that other projects measured and published."""

from __future__ import annotations

from scripts.check_published import ROWS, hold


def test_the_memory_of_one_replica_is_that_of_megatron() -> None:
    """The only rows in which both hold the same tensors: no shards of the optimizer's state, no logits of all tokens."""
    alike = [hold(row) for row in ROWS if row.name.endswith("TP 8")]
    assert len(alike) == 2
    assert all(abs(each.off[1]) < 0.10 for each in alike)


def test_no_published_time_is_outside_its_interval() -> None:
    found = [hold(row) for row in ROWS]
    assert all(each.seconds.holds(each.row.seconds) for each in found)
