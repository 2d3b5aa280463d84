"""A rank that is slowed down is reported with its phase, and no other rank is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.config.options import Config
from shoal.fault.stragglers import IN_A_ROW
from shoal.mesh.mesh import Mesh
from shoal.run.records import read_metrics
from tests.parallel.layouts import config_of
from tests.training.faulty import events, train_with
from tests.world import World

SECONDS = 0.5  # added to each slow phase: far more than other programs delay a process
BEGINS, LASTS = 3, 8  # the first slow step, and the number of slow steps
OPTIONS: dict[str, Any] = {
    "data__seq_len": 16,
    "train__global_batch": 4,
    "train__micro_batch": 2,
    "train__steps": 3 + LASTS + 8,
    "train__eval_every": 7,
    "checkpoint__every": 0,
    "fault__straggler_factor": 1.5,
    "fault__check_replicas_every": 0,
}


def slow(phase: str, rank: int) -> dict[str, Any]:
    return {"step": BEGINS, "phase": phase, "rank": rank, "fault": "slow", "seconds": SECONDS, "steps": LASTS}


def trained(mesh: Mesh, config: Config, faults: list[dict[str, Any]]) -> tuple[list[tuple[int, float]], bool]:
    """Return the losses of a run with these planned faults, and whether `Work.wait` is restored."""
    wait = dist.Work.wait
    run = train_with(mesh, config, faults)
    return [(r.step, r.loss) for r in read_metrics(run.folder.metrics_file).steps], dist.Work.wait is wait


def named_slow(config: Config) -> list[dict[str, Any]]:
    """Return the stragglers that are as slow as planned. Other programs may delay phases of milliseconds."""
    return [e for e in events(config, "straggler") if e["seconds"] >= SECONDS]


def test_the_slow_ranks_and_their_phases_are_named_within_a_few_steps(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    config = config_of(tmp_path, "slow", **OPTIONS)
    planned = {("forward", 1), ("backward", 0), ("optimizer", 1)}
    found = world(2).run(trained, config, [slow(phase, rank) for phase, rank in planned])
    assert all(as_before for _, as_before in found)
    named = named_slow(config)
    assert len(named) == len(planned)
    assert {(e["phase"], e["rank"]) for e in named} == planned
    for each in named:
        assert BEGINS + IN_A_ROW - 1 <= each["step"] <= BEGINS + LASTS - 1  # at the lower bound on an idle machine
        assert each["seconds"] >= SECONDS > each["others_seconds"]


@pytest.mark.ci
def test_it_is_said_when_it_is_over(world: Callable[[int], World], tmp_path: Path) -> None:
    config = config_of(tmp_path, "data", **OPTIONS)
    world(2).run(trained, config, [slow("data", 1)])
    [named] = named_slow(config)
    [over] = [e for e in events(config, "keeps pace") if (e["rank"], e["phase"]) == (1, "data")]
    assert (over["rank"], over["phase"]) == (named["rank"], named["phase"]) == (1, "data")
    assert over["step"] >= over["since"] + IN_A_ROW - 1 >= BEGINS + LASTS + IN_A_ROW - 1
    assert over["seconds"] < named["seconds"]


@pytest.mark.parametrize(
    ("size", "options", "phase"),
    [
        pytest.param(2, {"parallel__tp": 2, "train__micro_batch": 4}, "backward", id="tp"),
        pytest.param(2, {"parallel__dp_shard": 2}, "forward", id="fsdp", marks=pytest.mark.ci),
        pytest.param(2, {"train__repro": "bitwise"}, "optimizer", id="bitwise", marks=pytest.mark.ci),
        pytest.param(4, {"parallel__pp": 2, "train__micro_batch": 1}, "forward", id="pp", marks=pytest.mark.ci),
        pytest.param(3, {"train__micro_batch": 1}, "backward", id="2, 1 and 1 micro-batches", marks=pytest.mark.ci),
    ],
)
def test_those_that_wait_inside_of_a_phase_are_not_taken_for_slow(
    world: Callable[[int], World], tmp_path: Path, size: int, options: dict[str, Any], phase: str
) -> None:
    config = config_of(tmp_path, "run", **OPTIONS | options)
    world(size).run(trained, config, [slow(phase, 1)])
    assert [(e["rank"], e["phase"]) for e in named_slow(config)] == [(1, phase)]


@pytest.mark.ci
def test_all_are_slow_and_nobody_is_named(
    world: Callable[[int], World], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "all", **OPTIONS)
    world(2).run(trained, config, [slow(phase, rank) for rank in (0, 1) for phase in ("forward", "optimizer")])
    assert not named_slow(config)


@pytest.mark.ci
def test_nobody_looks_where_it_is_null_and_the_numbers_are_the_same(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    seen = config_of(tmp_path, "seen", **OPTIONS)
    unseen = config_of(tmp_path, "unseen", **OPTIONS | {"fault__straggler_factor": None})
    losses = [world(2).run(trained, config, [])[0][0] for config in (seen, unseen)]
    assert losses[0] == losses[1]
    faults = [slow("forward", 1)]
    world(2).run(trained, config_of(tmp_path, "slow", **OPTIONS | {"fault__straggler_factor": None}), faults)
    assert not events(config_of(tmp_path, "slow"), "straggler")


def test_the_line_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    from shoal.fault.stragglers import Change
    from shoal.metrics.busy import PARTS, Busy
    from shoal.run.console import Console
    from shoal.training.pace import Pace

    said: list[dict[str, Any]] = []
    pace = Pace(
        Busy(torch.device("cpu"), 1, measures=False), None, ["node1", "node7"], 0, PARTS, 1.0, Console(),
        lambda event, **facts: said.append({"event": event, **facts}),
    )  # fmt: skip
    pace._tell(1, True, [Change(1, 1, True, 1.94, 1.06, (120, 125)), Change(1, 4, True, 0.05, 0.032, (121, 125))])
    pace._tell(1, False, [Change(1, 1, False, 1.0, 1.0, (130, 135))])
    assert capsys.readouterr().out.splitlines() == [
        "note: rank 1 (node7) is slow: its forward takes 1.9 s, the others' 1.1 s; its optimizer takes 50 ms, the others' 32 ms "
        "(steps 120 to 125)",
        "rank 1 (node7) keeps pace again: its forward takes 1.0 s, the others' 1.0 s (steps 130 to 135)",
    ]
    assert [(e["event"], e["phase"], e["step"]) for e in said] == [
        ("straggler", "forward", 125), ("straggler", "optimizer", 125), ("keeps pace", "forward", 135),
    ]  # fmt: skip
