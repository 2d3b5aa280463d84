"""Which layouts of a config fit into the memory of given devices, and what they send. No torch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from shoal.config.families import FAMILIES
from shoal.config.layout import AXES, Layout
from shoal.config.options import Config, Parallel
from shoal.config.presets import resolve_shape
from shoal.config.schedules import Schedule, rank_stages, stage_blocks
from shoal.plan.machine import Machine
from shoal.plan.rehearse.layers import Kernels
from shoal.plan.rehearse.step import Case, Rehearsal, rehearse
from shoal.plan.rehearse.work import Work
from shoal.resolve.layout_checks import refusals
from shoal.system.cpu import has_tiles

CUDA_GRANULE = 512  # bytes; the caching allocator rounds each request up to them
# Blocks of a stage that are rehearsed. The first and the last differ from the others; each more adds the same to a phase's peak
FEW = (3, 4)


@dataclass(frozen=True)
class Need:
    """
    What a step of `config` in `layout` needs.

    parts: the memory of the rank that needs the most, in bytes. works: what the ranks of a pipeline that differ compute and send.
    """

    config: Config
    layout: Layout
    parts: Mapping[str, int]
    works: Sequence[Work]

    @property
    def sent(self) -> dict[str, int]:
        """The bytes that the rank which sends the most sends in a step, by axis."""
        found = [work.sent(axis_sizes(self.layout)) for work in self.works]
        return max(found, key=lambda sent: sum(sent.values()))

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, machine: Machine) -> bool:
        """Return whether a device's memory suffices."""
        return self.total <= machine.usable_bytes


def need_of(
    config: Config, layout: Layout, *, cuda: bool, few: Sequence[int] = FEW, copies: bool | None = None
) -> Need:
    """
    Return what a rank of `config` in `layout` needs.

    config: one that `why_unknown` accepts, with a vocabulary size and a dtype other than auto. few: how many blocks of a stage are
    rehearsed, twice. copies: whether messages are copied; None: as gloo does on CPUs.
    """
    case = Case.of(dataclasses.replace(config, model=resolve_shape(config.model)))
    turns = math.ceil(config.train.global_batch // config.train.micro_batch / layout.dp)
    width = 4 if config.train.dtype == "float32" else 2
    kernels = Kernels(cuda, width, tiles=not cuda and has_tiles(), copies=not cuda if copies is None else copies)
    once = partial(_rehearsed, kernels=kernels, granule=CUDA_GRANULE if cuda else 1)
    found = [_extended(once, case, layout, turns, rank, few) for rank in _ranks(case, layout)]
    return Need(
        config, layout, max((parts for parts, _ in found), key=lambda p: sum(p.values())), [w for _, w in found]
    )


def axis_sizes(layout: Layout) -> dict[str, int]:
    """Return the ranks along the axes of a layout's messages."""
    both = {"shard": layout.dp_shard * layout.cp, "batch": layout.dp_replicate * layout.cp}
    return both | {name: getattr(layout, name) for name in AXES}


_rehearsed = functools.lru_cache(maxsize=1024)(rehearse)


def why_unknown(config: Config) -> str | None:
    """Return why the memory of this config is not known; None if it is."""
    model, train = config.model, config.train
    if not FAMILIES[model.family].native:
        return (
            f"model.family {model.family}: only the memory of shoal's own families is known; those are gpt2 and llama"
        )
    if train.compile:
        return "train.compile: the memory of compiled blocks is not known; plan without it, which needs more"
    for option, value, usual in (
        ("train.repro", train.repro, "fast"),
        ("parallel.cpu_offload", config.parallel.cpu_offload, False), ("model.dropout", model.dropout, 0.0),
    ):  # fmt: skip
        if value != usual:
            return f"{option} {value}: its memory is not known; plan with {usual}"
    if train.activation_checkpointing == "budget":
        return "train.activation_checkpointing budget: its memory is not known; plan with none, selective or full"
    if isinstance(config.parallel.reshard_after_forward, int):
        return "parallel.reshard_after_forward with a number: its memory is not known; plan with always or never"
    return None


@dataclass(frozen=True)
class Short:
    """A rehearsal that represents a longer one: of fewer blocks of a stage, a shorter pipeline, and fewer micro-batches."""

    blocks: int | None  # of a stage; None: all
    pp: int
    micro_batches: int


def _extended(
    once: partial[Rehearsal], case: Case, layout: Layout, turns: int, rank: int, few: Sequence[int]
) -> tuple[dict[str, int], Work]:
    """
    Rehearse few blocks of a short pipeline, and extend each phase's peak, and the work, to what there is.

    A peak is linear in the blocks, and in the micro-batches that a pipeline holds at a time.
    """
    stages = layout.pp * case.stages if layout.pp > 1 else 1
    blocks = case.sizes.num_layers / stages
    counts: Sequence[int | None] = few if blocks > max(few) else (None,)
    depths, deeper = _depths(case.schedule, layout.pp, turns, whole=case.sizes.num_layers % stages == 0)
    results = [[_rehearse(once, case, layout, Short(count, *depth), rank) for count in counts] for depth in depths]
    grow = 0 if counts[0] is None else _blocks(case, layout, rank) - counts[0]
    # in an order that is the same each time
    phases = sorted(set.intersection(*(set(r.peaks) for row in results for r in row)))
    extended = []
    for phase in phases:
        parts = {part for row in results for r in row for part in r.peaks[phase].parts} | {"messages"}
        at_depths = [
            {
                part: _line([r.peaks[phase].parts.get(part, 0) - _buffers(r, part, depth[1]) for r in row], grow)
                for part in parts
            }
            for row, depth in zip(results, depths, strict=True)
        ]
        peak = {part: round(_line([found[part] for found in at_depths], deeper)) for part in parts}
        peak["messages"] += (results[0][0].buffers + results[0][0].sent) * turns
        extended.append(peak)
    most = max(extended, key=lambda parts: sum(parts.values()))
    works = [row[0].work.toward(row[-1].work, grow) for row in results]
    turns_of_first, turns_of_last = depths[0][1], depths[-1][1]
    if turns_of_first < turns_of_last:
        work = works[0].toward(works[1], (turns - turns_of_first) / (turns_of_last - turns_of_first))
    else:
        work = works[0].times(turns / turns_of_first)
    return {part: size for part, size in most.items() if size > 0}, work


def _ranks(case: Case, layout: Layout) -> Sequence[int]:
    """Return the ranks of a pipeline that differ: the first, the last, and the first of those between that has the most blocks."""
    between = range(1, layout.pp - 1)
    if not between or case.sizes.num_layers % (layout.pp * case.stages) == 0:
        return sorted({0, layout.pp - 1})
    return [0, max(between, key=lambda rank: _blocks(case, layout, rank)), layout.pp - 1]


def _blocks(case: Case, layout: Layout, rank: int) -> float:
    """Return the blocks of a rank's stages, on average."""
    if layout.pp == 1:
        return case.sizes.num_layers
    blocks = stage_blocks(case.sizes.num_layers, layout.pp * case.stages)
    mine = rank_stages(case.schedule, layout.pp, case.stages, rank)
    return sum(len(blocks[stage]) for stage in mine) / len(mine)


def _buffers(rehearsal: Rehearsal, part: str, micro_batches: int) -> int:
    """Return a pipeline's bytes of all micro-batches, which count as messages."""
    return (rehearsal.buffers + rehearsal.sent) * micro_batches if part == "messages" else 0


def _rehearse(once: partial[Rehearsal], case: Case, layout: Layout, short: Short, rank: int) -> Rehearsal:
    layers = case.sizes.num_layers
    if layout.pp > 1:
        stages = case.stages * short.pp
        layers = stages * short.blocks if short.blocks else layers * short.pp // layout.pp
    elif short.blocks:
        layers = short.blocks
    case = dataclasses.replace(case, sizes=dataclasses.replace(case.sizes, num_layers=layers))
    shorter = dataclasses.replace(layout, pp=short.pp)
    place = rank if short.pp == layout.pp else (short.pp - 1 if rank else 0)
    return once(case, layout=_alike(shorter), micro_batches=short.micro_batches, pp_rank=place)


def _alike(layout: Layout) -> Layout:
    """Return a layout with the same rehearsal: the number of replicas beyond two changes nothing."""
    return dataclasses.replace(layout, dp_replicate=min(2, layout.dp_replicate))


def _depths(schedule: Schedule, pp: int, turns: int, *, whole: bool) -> tuple[list[tuple[int, int]], int]:
    """
    Return (length of the pipeline, micro-batches) of one or two rehearsals, and how far the real one is beyond the first.

    whole: whether all stages have as many blocks.
    """
    if pp == 1:
        return [(1, min(turns, 2))], 0
    if schedule == "gpipe":  # holds all micro-batches at a time, whatever its length
        if turns <= max(FEW):
            return [(pp, turns)], 0
        return [(pp, few) for few in FEW], turns - FEW[0]
    turns_of = {depth: depth + 1 if schedule == "1f1b" else 2 * depth for depth in (pp, *FEW)}
    if pp <= max(FEW) or turns < turns_of[pp] or not whole:
        return [(pp, min(turns, turns_of[pp]))], 0
    return [(depth, turns_of[depth]) for depth in FEW], pp - FEW[0]


def _line(values: Sequence[float], grow: float) -> float:
    return values[0] if len(values) == 1 else values[0] + (values[1] - values[0]) * grow


def layouts(config: Config, machine: Machine) -> Iterator[tuple[Config, Layout]]:
    """Yield each layout of all devices that the config allows, with tensor parallel inside a node."""
    world = machine.world_size
    for tp, cp, pp in itertools.product(_divisors(machine.per_node), _divisors(world), _divisors(world)):
        if world % (tp * cp * pp) or (cp > 1 and config.data.seq_len // cp < 1024):
            continue
        rest = world // (tp * cp * pp)
        for shard in _divisors(rest):
            layout = Layout(pp=pp, dp_replicate=rest // shard, dp_shard=shard, cp=cp, tp=tp)
            parallel = dataclasses.replace(config.parallel, **{name: getattr(layout, name) for name in AXES})
            changed = dataclasses.replace(config, parallel=without_unused(parallel))
            if not any(refusals(changed, world)):
                yield changed, layout


def without_unused(parallel: Parallel) -> Parallel:
    """Drop the options that have no effect in this layout, which would be rejected."""
    if parallel.pp == 1:
        parallel = dataclasses.replace(parallel, pp_schedule="1f1b", pp_stages=None)
    if parallel.dp_shard == 1:
        parallel = dataclasses.replace(parallel, reshard_after_forward="always", cpu_offload=False)
    return parallel if parallel.cp > 1 else dataclasses.replace(parallel, cp_method="allgather")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
