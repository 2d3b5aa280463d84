"""
The consequences of a pipeline schedule: the stages of each rank, rejected options, the bubble. No torch.

A stage is a contiguous range of blocks. `gpipe` and `1f1b` give each rank one stage. `interleaved_1f1b` assigns several
round-robin (rank 0 of 2: stages 0 and 2). `zbv` and `dualpipev` assign two in a V (rank 0 of 2: stages 0 and 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"]

SINGLE: tuple[Schedule, ...] = ("gpipe", "1f1b")
# These also split backward: gradients of inputs first, gradients of weights later.
V_SHAPED: tuple[Schedule, ...] = ("zbv", "dualpipev")


def stages_per_rank(schedule: Schedule, pp_stages: int | None) -> int:
    """Return the stages per rank; for `pp_stages` None, the schedule's default."""
    if pp_stages is not None:
        return pp_stages
    return 1 if schedule in SINGLE else 2


def rank_stages(schedule: Schedule, pp: int, stages: int, rank: int) -> list[int]:
    """Return the indices of the stages on pipeline rank `rank` of `pp`, ascending. stages: number of stages per rank."""
    if schedule in V_SHAPED:
        return [rank, 2 * pp - 1 - rank]
    return [rank + turn * pp for turn in range(stages)]


def stage_rank(schedule: Schedule, pp: int, stage: int) -> int:
    """Return the coordinate along the `pp` axis of the process that holds this stage."""
    turn, place = divmod(stage, pp)
    return pp - 1 - place if schedule in V_SHAPED and turn else place


def forward_slots(pp: int, stages: int, micro_batches: int) -> list[list[tuple[int, int]]]:
    """
    Return the (stage, micro-batch) pairs of each time slot of a pass without backward.

    A slot's outputs are the next stage's inputs in the next slot. A round is `pp` micro-batches: it runs through all laps
    (stages 0 to pp - 1, then pp to 2 pp - 1, ...) before the next round. With round-robin stages, no process then has two
    pairs in a slot, nor idles within a round.
    """
    slots: dict[int, list[tuple[int, int]]] = {}
    for stage, number in itertools.product(range(pp * stages), range(micro_batches)):
        lap, place = divmod(stage, pp)
        round_, behind = divmod(number, pp)
        slots.setdefault((round_ * stages + lap) * pp + behind + place, []).append((stage, number))
    return [slots[slot] for slot in sorted(slots)]


def stage_blocks(num_layers: int, num_stages: int) -> list[range]:
    """
    Return the blocks of each stage, in order; their sizes differ by at most one.

    A remainder goes to the middle stages before the first, since the first stage also computes the embedding; the last stage,
    which computes the head, gets none.
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
    Yield one sentence per incompatibility of these options, each with a valid value.

    micro_batches: number of micro-batches per step and data-parallel rank.
    """
    if pp == 1:
        if pp_stages not in (None, 1):
            yield (
                f"parallel.pp_stages {pp_stages} needs a pipeline, but parallel.pp is 1; "
                "remove parallel.pp_stages, or set parallel.pp to 2"
            )
        return
    stages = stages_per_rank(schedule, pp_stages)
    if schedule in SINGLE and stages != 1:
        yield (
            f"parallel.pp_schedule {schedule} gives each process one stage, but parallel.pp_stages is {pp_stages}; "
            "set parallel.pp_stages to 1, or parallel.pp_schedule to interleaved_1f1b"
        )
        return
    if schedule in V_SHAPED and stages != 2:
        yield (
            f"parallel.pp_schedule {schedule} gives each process two stages, but parallel.pp_stages is {pp_stages}; "
            "set parallel.pp_stages to 2, or parallel.pp_schedule to interleaved_1f1b"
        )
        return
    if pp * stages > num_layers:
        yield _too_few_blocks(schedule, pp, stages, num_layers)
    if schedule in V_SHAPED and compile:  # torch 2.13 fails: "Failed to run stage backward input"
        yield (
            f"parallel.pp_schedule {schedule} splits backward, which torch does not support with train.compile; "
            "set train.compile to false, or parallel.pp_schedule to interleaved_1f1b"
        )
    # Measured: a block of 12 weights is recomputed 12 times
    if schedule in V_SHAPED and activation_checkpointing != "none":
        yield (
            f"parallel.pp_schedule {schedule} computes each weight's gradient separately, and with "
            f"train.activation_checkpointing {activation_checkpointing} each would recompute its whole block; set "
            "train.activation_checkpointing to none, or parallel.pp_schedule to interleaved_1f1b"
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
        f"parallel.pp {pp} with parallel.pp_stages {stages} (parallel.pp_schedule {schedule}) needs {pp * stages} "
        f"stages of at least one block, but model.num_layers is {num_layers}; set {' or '.join(ways)}"
    )


def _flows(schedule: Schedule, pp: int, micro_batches: int) -> bool:
    """
    Return whether torch's schedule accepts this number of micro-batches.

    The rules are those of `torch.distributed.pipelining.schedules`, 2.11 to 2.13.
    """
    match schedule:
        case "1f1b":
            return micro_batches >= pp
        case "interleaved_1f1b":  # in rounds of equal length, at least `pp` micro-batches each
            return micro_batches % max(1, micro_batches // pp) == 0
        case "dualpipev":
            return micro_batches >= 2 * pp
        case _:
            return True


def _wrong_micro_batches(schedule: Schedule, pp: int, micro_batches: int) -> str:
    rule = {
        "1f1b": f"at least {pp} micro-batches, one per stage",
        "interleaved_1f1b": f"a number of micro-batches that divides into {micro_batches // pp} equal rounds",
        "dualpipev": f"at least {2 * pp} micro-batches, one per stage",
    }[schedule]
    enough = next(n for n in itertools.count(micro_batches) if _flows(schedule, pp, n))
    ways = [f"multiply train.global_batch / train.micro_batch by {Fraction(enough, micro_batches)}"]
    fewer = next((p for p in range(pp - 1, 1, -1) if _flows(schedule, p, micro_batches)), None)
    if fewer is not None:
        ways.append(f"set parallel.pp to {fewer}")
    other: Schedule = "1f1b" if _flows("1f1b", pp, micro_batches) else "gpipe"
    ways.append(f"parallel.pp_schedule to {other}" if fewer is not None else f"set parallel.pp_schedule to {other}")
    return (
        f"parallel.pp_schedule {schedule} with parallel.pp {pp} needs {rule}, but train.global_batch and "
        f"train.micro_batch give {micro_batches} per step and data-parallel rank; {', or '.join(ways)}"
    )


def bubble_fraction(schedule: Schedule, pp: int, stages: int, micro_batches: int) -> float:
    """
    Return the bubble: the fraction of a step that a rank idles, if backward takes twice as long as forward.

    The step lasts from the first rank's start to the last rank's end, with `stages` equal stages per rank and no communication
    time. In units of one micro-batch's forward through one stage, a rank computes for 3 * stages * micro_batches.

    - gpipe, 1f1b: a rank idles for (pp - 1) whole forwards and backwards (Narayanan et al. 2021, arXiv:2104.04473,
      section 2.2.1); more stages per rank make each forward and backward shorter (section 2.2.2). With fewer micro-batches
      than `pp`, a rank also idles before each of its stages but the first.
    - zbv, dualpipev: pp - 1 forwards. Qi et al. 2024 (arXiv:2401.10241, section 6) count these as zero: a rank that
      starts late also ends late, and may start its next step at once. A step that ends with a collective (such as a
      global gradient norm) does wait. With fewer micro-batches than 2 pp - 2, zbv's path down and up the V has gaps.
      dualpipev: DeepSeek-AI 2024 (arXiv:2412.19437, section 3.2.1), as torch runs it, without overlapping
      forward and backward.
    """
    match schedule:
        case "zbv":
            idle = max(pp - 1, 4 * pp - 2 * micro_batches - 2)
        case "dualpipev":
            idle = pp - 1
        case _:
            idle = 3 * (pp - 1) + 3 * (stages - 1) * max(0, pp - micro_batches)
    return idle / (3 * stages * micro_batches + idle)
