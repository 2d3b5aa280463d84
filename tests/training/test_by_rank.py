"""`ranks.jsonl` holds the measurements of each rank, and costs no collective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.metrics.busy import PARTS
from shoal.run.records import read_ranks
from shoal.training.loop import take_steps
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.world import World

OPTIONS: dict[str, Any] = {
    "train__steps": 6,
    "train__eval_every": 4,
    "train__eval_tokens": 96,
    "data__seq_len": 16,
    "checkpoint__every": 0,
}


def measured(mesh: Mesh, config: Config) -> tuple[dict[int, dict[str, float]], dict[int, int], int]:
    """Return by step this rank's own busy seconds and resident memory, and the number of all-reduces of a run."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    busy, resident, reduces = {}, {}, 0
    take, reduce = run.watch.pace.busy.take, dist.all_reduce

    def taken(step: int) -> dict[str, float]:
        resident[step] = int(psutil.Process().memory_info().rss)
        busy[step] = take(step)
        return busy[step]

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal reduces
        reduces += 1
        return reduce(*args, **options)

    run.watch.pace.busy.take = taken  # type: ignore[method-assign]
    dist.all_reduce = counted
    try:
        take_steps(run)
    finally:
        dist.all_reduce = reduce
        run.close()
    return busy, resident, reduces


@pytest.mark.parametrize("factor", [None, pytest.param(1.5, id="stragglers are looked for too", marks=pytest.mark.ci)])
def test_each_rank_is_recorded_as_it_measured_itself(
    world: Callable[[int], World], tmp_path: Path, factor: float | None
) -> None:
    config = config_of(tmp_path, "two", **OPTIONS, fault__straggler_factor=factor, metrics__split_every=2)
    by_rank = world(2).run(measured, config)
    records = read_ranks(tmp_path / "runs" / "two" / "ranks.jsonl")
    assert [each.step for each in records] == [2, 4]  # no step follows the last one, to send its numbers
    for each in records:
        assert list(each.busy_seconds) == list(PARTS)
        for rank, (busy, resident, _) in enumerate(by_rank):
            own = {part: seconds[rank] for part, seconds in each.busy_seconds.items()}
            assert own == pytest.approx({part: busy[each.step].get(part, 0.0) for part in PARTS}, abs=1e-6)
            assert all(own[part] > 0 for part in ("data", "forward", "backward", "optimizer"))
            assert each.memory_bytes[rank] == pytest.approx(resident[each.step], abs=8 * 2**20)
            assert each.peak_memory_bytes[rank] >= each.memory_bytes[rank]
        assert [len(each.memory_bytes), len(each.peak_memory_bytes)] == [2, 2]
        assert each.reserved_bytes is None
    assert records[0].busy_seconds["between"] != [0.0, 0.0]
    assert records[1].busy_seconds["between"] == [0.0, 0.0]  # an evaluation follows step 4

    unmeasured = config_of(tmp_path, "one-line", **OPTIONS, fault__straggler_factor=factor, metrics__split_every=100)
    assert world(2).run(measured, unmeasured)[0][2] == by_rank[0][2]  # as many all-reduces


def test_a_process_alone_is_recorded_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "alone", **OPTIONS)
    own, _, _ = measured(ALONE, config)
    [line] = read_ranks(tmp_path / "runs" / "alone" / "ranks.jsonl")
    assert (line.step, list(own)) == (2, [2])
    assert line.busy_seconds["forward"] == pytest.approx([own[2]["forward"]], abs=1e-6)
