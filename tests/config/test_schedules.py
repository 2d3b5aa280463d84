"""Stages, slots and bubbles against torch's own schedules, simulated without processes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

from shoal.config.schedules import (
    SINGLE,
    V_SHAPED,
    Schedule,
    bubble_fraction,
    forward_slots,
    problems,
    rank_stages,
    stage_blocks,
    stage_rank,
    stages_per_rank,
)

MULTI: dict[Schedule, Any] = {
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
Action = tuple[str, int, int]  # kind, stage, micro-batch


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="torch.distributed.pipelining")


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 3), (3, 10), (2, 0)])
def test_a_pass_without_backward_fills_the_pipeline(schedule: Schedule, pp: int, micro_batches: int) -> None:
    stages = stages_per_rank(schedule, None)
    slots = forward_slots(pp, stages, micro_batches)
    when = {task: slot for slot, tasks in enumerate(slots) for task in tasks}
    assert sorted(when) == list(itertools.product(range(pp * stages), range(micro_batches)))
    assert all(when[stage, number] == when[stage - 1, number] + 1 for stage, number in when if stage)
    if schedule not in V_SHAPED:
        for tasks in slots:
            busy = [stage_rank(schedule, pp, stage) for stage, _ in tasks]
            assert len(busy) == len(set(busy))
        if micro_batches % pp == 0 and micro_batches:  # ranks idle only while the pipeline fills and drains
            assert len(slots) == stages * micro_batches + pp - 1


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_blocks_are_dealt_evenly_and_spare_the_ends(num_stages: int) -> None:
    for num_layers in range(num_stages, 3 * num_stages):
        blocks = stage_blocks(num_layers, num_stages)
        sizes = [len(b) for b in blocks]
        assert [i for b in blocks for i in b] == list(range(num_layers))
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)
        if num_layers % num_stages <= max(0, num_stages - 2):
            assert sizes[0] == min(sizes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_are_where_torch_has_them(schedule: Schedule, pp: int) -> None:
    for stages in (1,) if schedule in SINGLE else (2,) if schedule in V_SHAPED else (1, 2, 3):
        wanted = generate_rank_to_stage_mapping(pp, pp * stages, "v" if schedule in V_SHAPED else "loop")
        assert {rank: rank_stages(schedule, pp, stages, rank) for rank in range(pp)} == wanted
        assert all(stage_rank(schedule, pp, stage) == rank for rank, held in wanted.items() for stage in held)


def test_stages_a_process_holds_unless_it_is_said() -> None:
    assert [stages_per_rank(s, None) for s in ("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")] == [
        1, 1, 2, 2, 2,
    ]  # fmt: skip
    assert stages_per_rank("interleaved_1f1b", 3) == 3


@pytest.mark.parametrize("schedule", MULTI)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_micro_batches_that_torch_takes_are_taken(schedule: Schedule, pp: int) -> None:
    for micro_batches in range(1, 20):
        refused = [*problems(schedule, pp, None, 100, micro_batches)]
        try:
            played = list(_play(schedule, pp, stages_per_rank(schedule, None), micro_batches))
        except ValueError:
            assert refused
        else:
            assert not refused
            assert played


@pytest.mark.parametrize(("schedule", "stages"), [("interleaved_1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("zbv", 2), ("dualpipev", 2)])  # fmt: skip
@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_bubble_is_that_of_torch_s_schedule(schedule: Schedule, stages: int, pp: int) -> None:
    tried = 0
    for micro_batches in (*range(1, 17), 32):
        if any(problems(schedule, pp, stages, 100, micro_batches)):
            continue
        tried += 1
        for idle in _play(schedule, pp, stages, micro_batches):
            assert idle == pytest.approx(bubble_fraction(schedule, pp, stages, micro_batches))
    assert tried


@pytest.mark.parametrize("pp", [2, 4])
def test_bubble_of_one_stage_a_process(pp: int) -> None:
    """Check gpipe and 1f1b by formula: torch hard-codes them, so there is no list of actions to simulate."""
    for schedule, micro_batches in itertools.product(SINGLE, (pp, 2 * pp, 8 * pp)):
        wanted = (pp - 1) / (micro_batches + pp - 1)
        assert bubble_fraction(schedule, pp, 1, micro_batches) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("schedule", "pp", "pp_stages", "num_layers", "micro_batches", "words"),
    [
        ("1f1b", 1, 2, 8, 8, ["parallel.pp_stages 2", "parallel.pp is 1", "parallel.pp to 2"]),
        ("1f1b", 2, 2, 8, 8, ["parallel.pp_schedule 1f1b", "parallel.pp_stages to 1", "to interleaved_1f1b"]),
        ("gpipe", 2, 3, 8, 8, ["parallel.pp_schedule gpipe", "parallel.pp_stages to 1"]),
        ("zbv", 2, 1, 8, 8, ["parallel.pp_schedule zbv", "parallel.pp_stages to 2"]),
        ("dualpipev", 2, 4, 8, 8, ["parallel.pp_stages is 4", "parallel.pp_stages to 2"]),
        (
            "1f1b",
            8,
            None,
            6,
            8,
            ["parallel.pp 8", "model.num_layers is 6", "parallel.pp to 6", "model.num_layers to 8"],
        ),
        ("interleaved_1f1b", 2, 4, 6, 8, ["parallel.pp_stages to 3", "model.num_layers to 8"]),
        ("zbv", 4, None, 6, 8, ["parallel.pp_schedule to 1f1b", "parallel.pp to 3", "model.num_layers to 8"]),
        ("1f1b", 4, None, 8, 3, ["at least 4", "by 4/3", "parallel.pp to 3", "parallel.pp_schedule to gpipe"]),
        (
            "1f1b",
            2,
            None,
            8,
            1,
            ["multiply train.global_batch / train.micro_batch by 2", "set parallel.pp_schedule to gpipe"],
        ),
        ("interleaved_1f1b", 2, None, 8, 5, ["2 equal rounds", "by 6/5", "parallel.pp_schedule to 1f1b"]),
        ("dualpipev", 4, None, 8, 4, ["at least 8", "by 2", "parallel.pp to 2", "parallel.pp_schedule to 1f1b"]),
    ],
)
def test_refusals_name_a_way_out(
    schedule: Schedule, pp: int, pp_stages: int | None, num_layers: int, micro_batches: int, words: list[str]
) -> None:
    [message] = problems(schedule, pp, pp_stages, num_layers, micro_batches)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("schedule", V_SHAPED)
def test_a_split_backward_refuses_what_it_cannot_split(schedule: Schedule) -> None:
    compiled, checkpointed = problems(schedule, 2, None, 8, 8, compile=True, activation_checkpointing="full")
    assert "train.compile to false" in compiled
    assert "train.activation_checkpointing to none" in checkpointed
    assert not [*problems("1f1b", 2, None, 8, 8, compile=True, activation_checkpointing="full")]


def test_what_fits_is_not_refused() -> None:
    assert not [*problems("1f1b", 1, None, 1, 1)]
    assert not [*problems("gpipe", 4, 1, 4, 1)]
    assert not [*problems("1f1b", 4, None, 4, 4)]
    assert not [*problems("interleaved_1f1b", 2, 3, 6, 6)]
    assert not [*problems("zbv", 2, 2, 4, 1)]
    assert not [*problems("dualpipev", 2, None, 4, 4)]


def _play(schedule: Schedule, pp: int, stages: int, micro_batches: int) -> Iterator[float]:
    """Yield each rank's idle fraction, if forward and each half of backward take 1 time unit. Raises ValueError if torch does."""
    mine = [SimpleNamespace(stage_index=i, num_stages=pp * stages, group_size=pp, group_rank=0, submod=None) for i in range(stages)]  # fmt: skip
    order = MULTI[schedule](mine, micro_batches).pipeline_order
    left = {rank: list(_actions(order[rank])) for rank in range(pp)}
    clock, work = dict.fromkeys(left, 0), dict.fromkeys(left, 0)
    done: dict[Action, int] = {}
    while any(left.values()):
        stuck = True
        for rank, actions in left.items():
            while actions and all(need in done for need in _needs(actions[0], pp * stages)):
                kind, stage, number = actions.pop(0)
                ready = [done[need] for need in _needs((kind, stage, number), pp * stages)]
                cost = 2 if kind == "B" else 1
                work[rank] += cost
                clock[rank] = max(clock[rank], *ready, 0) + cost
                done["I" if kind == "B" else kind, stage, number] = clock[rank]
                stuck = False
        assert not stuck
    end = max(clock.values())
    for rank in range(pp):
        assert work[rank] == 3 * stages * micro_batches
        yield (end - work[rank]) / end


def _actions(order: list[Any]) -> Iterator[Action]:
    for action in order:
        if action is not None:
            for part in action.sub_actions or (action,):
                yield part.computation_type.value, part.stage_index, part.microbatch_index


def _needs(action: Action, num_stages: int) -> list[Action]:
    kind, stage, number = action
    match kind:
        case "F":
            return [("F", stage - 1, number)] if stage else []
        case "W":
            return [("I", stage, number)]
        case _:
            return [("F", stage, number)] + ([("I", stage + 1, number)] if stage < num_stages - 1 else [])
