"""
What follows from a pipeline's schedule: which stages a process holds, what is refused, how long it idles. No torch.

A stage is a run of blocks. `gpipe` and `1f1b` give each process one stage; `interleaved_1f1b` deals several round and
round (process 0 of 2: stages 0 and 2); `zbv` and `dualpipev` deal two in a V (process 0 of 2: stages 0 and 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"]

SINGLE: tuple[Schedule, ...] = ("gpipe", "1f1b")
V_SHAPED: tuple[Schedule, ...] = (
    "zbv",
    "dualpipev",
)  # these split backward, too: first inputs', later weights' gradients


def stages_per_rank(schedule: Schedule, pp_stages: int | None) -> int:
    """Stages a process holds, where the user may have left it open."""
    if pp_stages is not None:
        return pp_stages
    return 1 if schedule in SINGLE else 2


def rank_stages(schedule: Schedule, pp: int, stages: int, rank: int) -> list[int]:
    """Indices of the `stages` stages of the process at `rank` of `pp`, ascending."""
    if schedule in V_SHAPED:
        return [rank, 2 * pp - 1 - rank]
    return [rank + turn * pp for turn in range(stages)]


def stage_rank(schedule: Schedule, pp: int, stage: int) -> int:
    """The place along the `pp` axis of the process that holds this stage."""
    turn, place = divmod(stage, pp)
    return pp - 1 - place if schedule in V_SHAPED and turn else place


def forward_slots(pp: int, stages: int, micro_batches: int) -> list[list[tuple[int, int]]]:
    """
    Which (stage, micro-batch) run at the same time in a pass without backward, slot by slot.

    What one slot made, the next stage takes in the next slot. `pp` micro-batches go through all laps one behind the other,
    then the next `pp`: where stages are dealt round, no process has two in a slot, and none waits inside a round.
    """
    slots: dict[int, list[tuple[int, int]]] = {}
    for stage, number in itertools.product(range(pp * stages), range(micro_batches)):
        lap, place = divmod(stage, pp)
        round_, behind = divmod(number, pp)
        slots.setdefault((round_ * stages + lap) * pp + behind + place, []).append((stage, number))
    return [slots[slot] for slot in sorted(slots)]


def stage_blocks(num_layers: int, num_stages: int) -> list[range]:
    """
    The blocks of each stage, in order; no stage has two more than another.

    Where they do not divide, the stages in the middle take one more: the first has the embedding, the last the head.
    """
    short, longer = divmod(num_layers, num_stages)
    takers = [*range(1, num_stages - 1), 0][:longer]
    sizes = [short + (stage in takers) for stage in range(num_stages)]
    starts = [0, *itertools.accumulate(sizes)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def problems(
    schedule: Schedule, pp: int, pp_stages: int | None, num_layers: int, micro_batches: int,
    *, compile: bool = False, activation_checkpointing: str = "none",
) -> Iterator[str]:  # fmt: skip
    """
    Why these options cannot hold together: a sentence for each reason, with a value that would do.

    micro_batches: of one step, for each of the data-parallel parts.
    """
    if pp == 1:
        if pp_stages not in (None, 1):
            yield (
                f"parallel.pp_stages {pp_stages} cuts a pipeline, and parallel.pp is 1; "
                "leave parallel.pp_stages out, or set parallel.pp to 2"
            )
        return
    stages = stages_per_rank(schedule, pp_stages)
    if schedule in SINGLE and stages != 1:
        yield (
            f"parallel.pp_schedule {schedule} gives each process one stage, and parallel.pp_stages is {pp_stages}; "
            "set parallel.pp_stages to 1, or parallel.pp_schedule to interleaved_1f1b"
        )
        return
    if schedule in V_SHAPED and stages != 2:
        yield (
            f"parallel.pp_schedule {schedule} gives each process two stages, and parallel.pp_stages is {pp_stages}; "
            "set parallel.pp_stages to 2, or parallel.pp_schedule to interleaved_1f1b"
        )
        return
    if pp * stages > num_layers:
        yield _too_few_blocks(schedule, pp, stages, num_layers)
    if schedule in V_SHAPED and compile:  # seen with torch 2.13: "Failed to run stage backward input"
        yield (
            f"parallel.pp_schedule {schedule} splits backward, which torch cannot do with train.compile; "
            "set train.compile to false, or parallel.pp_schedule to interleaved_1f1b"
        )
    if schedule in V_SHAPED and activation_checkpointing != "none":  # seen: 12 times for a block of 12 weights
        yield (
            f"parallel.pp_schedule {schedule} takes each weight's gradient apart, and with train.activation_checkpointing "
            f"{activation_checkpointing} each would compute its whole block again; set train.activation_checkpointing to "
            "none, or parallel.pp_schedule to interleaved_1f1b"
        )
    if not _flows(schedule, pp, micro_batches):
        yield _wrong_micro_batches(schedule, pp, micro_batches)


def _too_few_blocks(schedule: Schedule, pp: int, stages: int, num_layers: int) -> str:
    ways = [f"model.num_layers to {pp * stages}"]
    if num_layers // stages > 1:
        ways.insert(0, f"parallel.pp to {num_layers // stages}")
    if schedule not in V_SHAPED and stages > 1 and num_layers >= pp:
        ways.insert(0, f"parallel.pp_stages to {num_layers // pp}")
    if schedule in V_SHAPED and num_layers >= pp:
        ways.insert(0, "parallel.pp_schedule to 1f1b")
    return (
        f"parallel.pp {pp} with parallel.pp_stages {stages} (parallel.pp_schedule {schedule}) makes {pp * stages} "
        f"stages of at least one block, and model.num_layers is {num_layers}; set {' or '.join(ways)}"
    )


def _flows(schedule: Schedule, pp: int, micro_batches: int) -> bool:
    """Whether torch's schedule takes so many micro-batches (`torch.distributed.pipelining.schedules`, 2.11 to 2.13)."""
    match schedule:
        case "1f1b":
            return micro_batches >= pp
        case "interleaved_1f1b":  # they go in rounds of at least `pp`, all as long
            return micro_batches % max(1, micro_batches // pp) == 0
        case "dualpipev":
            return micro_batches >= 2 * pp
        case _:
            return True


def _wrong_micro_batches(schedule: Schedule, pp: int, micro_batches: int) -> str:
    rule = {
        "1f1b": f"at least {pp} micro-batches, one for each stage",
        "interleaved_1f1b": f"micro-batches that divide into {micro_batches // pp} equal rounds",
        "dualpipev": f"at least {2 * pp} micro-batches, one for each stage",
    }[schedule]
    enough = next(n for n in itertools.count(micro_batches) if _flows(schedule, pp, n))
    ways = [f"make train.global_batch / train.micro_batch {Fraction(enough, micro_batches)} times what it is"]
    fewer = next((p for p in range(pp - 1, 1, -1) if _flows(schedule, p, micro_batches)), None)
    if fewer is not None:
        ways.append(f"set parallel.pp to {fewer}")
    other: Schedule = "1f1b" if _flows("1f1b", pp, micro_batches) else "gpipe"
    ways.append(f"parallel.pp_schedule to {other}" if fewer is not None else f"set parallel.pp_schedule to {other}")
    return (
        f"parallel.pp_schedule {schedule} with parallel.pp {pp} needs {rule}, and train.global_batch and "
        f"train.micro_batch make {micro_batches} a step for each data-parallel part; {', or '.join(ways)}"
    )


def bubble_fraction(schedule: Schedule, pp: int, stages: int, micro_batches: int) -> float:
    """
    The share of a step in which a process waits for others, where backward takes twice as long as forward.

    From the first process's start to the last one's end, with `stages` equal stages a process and messages that take
    no time. In units of one micro-batch's forward through one stage, a process works 3 * stages * micro_batches.

    - gpipe, 1f1b: (pp - 1) whole forwards and backwards are waited for (Narayanan et al. 2021, arXiv:2104.04473,
      section 2.2.1); the more stages a process holds, the shorter they are (section 2.2.2). Fewer micro-batches than
      `pp` leave a hole in each turn but the first.
    - zbv, dualpipev: pp - 1 forwards. Qi et al. 2024 (arXiv:2401.10241, section 6) call that zero, since a process that
      began late also ends late, and may begin its next step at once; a step that ends together (with a global norm of
      the gradient, say) does wait. With fewer micro-batches than 2 pp - 2, zbv's way down the V and up again is not
      filled. dualpipev: DeepSeek-AI 2024 (arXiv:2412.19437, section 3.2.1), as torch runs it, one thing at a time.
    """
    match schedule:
        case "zbv":
            idle = max(pp - 1, 4 * pp - 2 * micro_batches - 2)
        case "dualpipev":
            idle = pp - 1
        case _:
            idle = 3 * (pp - 1) + 3 * (stages - 1) * max(0, pp - micro_batches)
    return idle / (3 * stages * micro_batches + idle)
