"""The layouts of a config on given devices, in order of preference, as `shoal plan` prints them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.config.layout import AXES, Layout
from shoal.config.options import Config
from shoal.config.schedules import bubble_fraction, stages_per_rank
from shoal.errors import ShoalError
from shoal.plan.estimate import flops_per_token, parameter_count
from shoal.plan.fits import Need, layouts, need_of, why_unknown
from shoal.plan.machine import GIB, Machine
from shoal.plan.topology import crosses_nodes

SHOWN: Final = 10  # rows of the table
# Rough rates, which only order the layouts: a share of the peak, and bytes/s inside a node and between nodes of GPUs, of CPUs
OF_PEAK: Final = 0.4
GPU_LINKS: Final = (2e11, 2.5e10)
CPU_LINKS: Final = (2e9, 1e9)
HIDDEN: Final = 0.5  # share of the computation behind which gradients and parameters travel
LARGEST_MICRO_BATCH: Final = 1024
# Columns of the table: the parts of memory that each sums
COLUMNS: Final = {
    "state": ("parameters", "moments"),
    "gradients": ("gradients",),
    "activations": ("activations", "logits"),
    "other": ("gathered", "messages", "temporary"),
}


@dataclass(frozen=True)
class Choice:
    """A layout, what it needs, and the share of the step in which a pipeline's processes idle."""

    need: Need
    idle: float


@dataclass(frozen=True)
class Choices:
    """All layouts of `config` on `machine`, the preferred ones that fit first, then those that do not, the smallest first."""

    config: Config
    machine: Machine
    found: Sequence[Choice]

    @property
    def fitting(self) -> list[Choice]:
        return [c for c in self.found if c.need.fits(self.machine)]


def choose(config: Config, machine: Machine) -> Choices:
    """
    Return all layouts of `config`, whose own layout is ignored. Raises `ShoalError` if it allows none, or is not known.

    Those that fit are ordered by a rough time (`_rough_seconds`), the others by what they need.
    """
    if why := why_unknown(config):
        raise ShoalError(why)
    found = [Choice(need_of(c, layout, cuda=machine.cuda), _idle(c, layout)) for c, layout in layouts(config, machine)]
    if not found:
        raise ShoalError(
            f"no layout of this recipe uses all {machine.world_size} devices; change train.global_batch "
            f"({config.train.global_batch}) or train.micro_batch ({config.train.micro_batch}), or the number of devices"
        )

    def order(choice: Choice) -> tuple[bool, float]:
        fits = choice.need.fits(machine)
        return not fits, _rough_seconds(choice, machine) if fits else choice.need.total

    return Choices(config, machine, sorted(found, key=order))


def _idle(config: Config, layout: Layout) -> float:
    if layout.pp == 1:
        return 0.0
    parallel, train = config.parallel, config.train
    turns = train.global_batch // train.micro_batch // layout.dp
    stages = stages_per_rank(parallel.pp_schedule, parallel.pp_stages)
    return bubble_fraction(parallel.pp_schedule, layout.pp, stages, turns)


def _rough_seconds(choice: Choice, machine: Machine) -> float:
    """
    Return a step's time at rough rates, to order layouts by.

    Products and a pipeline's idle time; messages of tp, cp and pp; and those of data parallel as far as the products do not hide them.
    """
    need, train = choice.need, choice.need.config.train
    tokens = train.global_batch * need.config.data.seq_len
    flops = flops_per_token(need.config.model, need.config.data.seq_len) * tokens / machine.world_size
    products = flops / (OF_PEAK * machine.flops)
    seconds = dict.fromkeys((True, False), 0.0)  # by whether products can hide them
    for axis, size in need.sent.items():
        far = crosses_nodes(
            need.layout, {"shard": "dp_shard", "batch": "dp_replicate"}.get(axis, axis), machine.per_node
        )
        seconds[axis in ("shard", "batch", "dp_replicate")] += size / (GPU_LINKS if machine.cuda else CPU_LINKS)[far]
    return products / (1 - choice.idle) + seconds[False] + max(0.0, seconds[True] - HIDDEN * products)


def largest_micro_batch(choice: Choice, machine: Machine) -> int:
    """Return the largest micro-batch, by doubling the config's, with which this layout fits, and that divides the global batch."""
    config, best = choice.need.config, choice.need.config.train.micro_batch
    size = 2 * best
    while size <= LARGEST_MICRO_BATCH and config.train.global_batch % (size * choice.need.layout.dp) == 0:
        larger = config.replace("train", micro_batch=size)
        if not need_of(larger, choice.need.layout, cuda=machine.cuda).fits(machine):
            break
        best, size = size, 2 * size
    return best


def lines(choices: Choices) -> list[str]:
    """Return the plan as text: the table, and the best layout or what is missing."""
    config, machine = choices.config, choices.machine
    train = config.train
    head = ["layout", "GiB", *COLUMNS, "sent", "idle", "largest"]
    units = ["", "", *("" for _ in COLUMNS), "GB/step", "", "micro-batch"]
    shown = choices.found[:SHOWN]
    rows = [_row(c, machine) for c in shown]
    widths = [max(map(len, column)) for column in zip(head, units, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()

    more = len(choices.found) - len(shown)
    return [
        f"{config.model.family}, {parameter_count(config.model):,} parameters; {train.global_batch} x {config.data.seq_len:,} "
        f"tokens per step in micro-batches of {train.micro_batch}; {train.dtype}; activation checkpointing: "
        f"{train.activation_checkpointing}",
        f"{machine}: {machine.usable_bytes / GIB:.1f} GiB of each may be used"
        + (" (not measured on a GPU: 2 GiB for CUDA and NCCL, 6% for the allocator)" if machine.cuda else ""),
        "",
        line(head),
        line(units),
        *map(line, rows),
        *([f"... {more} more layouts"] if more else []),
        "",
        *_verdict(choices),
    ]


def _row(choice: Choice, machine: Machine) -> list[str]:
    need = choice.need
    parts = [sum(need.parts.get(p, 0) for p in names) for names in COLUMNS.values()]
    return [
        str(need.layout), _gib(need.total), *map(_gib, parts), f"{sum(need.sent.values()) / 1e9:.3g}",
        f"{choice.idle:.0%}" if need.layout.pp > 1 else "",
        str(largest_micro_batch(choice, machine)) if need.fits(machine) else "does not fit",
    ]  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def _verdict(choices: Choices) -> list[str]:
    machine = choices.machine
    if best := next(iter(choices.fitting), None):
        layout = best.need.layout
        flags = " ".join(f"--parallel.{name} {getattr(layout, name)}" for name in AXES if getattr(layout, name) > 1)
        return [
            f"{layout} fits and is probably the fastest: {_gib(best.need.total)} of {_gib(machine.usable_bytes)} GiB"
            + (f". Its flags: {flags}" if flags else "")
        ]
    least = choices.found[0].need
    over = least.total - machine.usable_bytes
    found = f"nothing fits: {least.layout} needs least, {_gib(least.total)} GiB, {_gib(over)} more than there is"
    return [found, *(f"it would fit with {way}" for way in _ways(least, machine))]


def _ways(need: Need, machine: Machine) -> list[str]:
    """Return changes of one or two options with which a layout would fit."""
    config, found = need.config, []
    sizes = [config.train.micro_batch] + ([1] if config.train.micro_batch > 1 else [])
    modes = ["none", "selective", "full"]
    modes = modes[modes.index(config.train.activation_checkpointing) :]
    for size in sizes:
        for mode in modes:
            changed = config.replace("train", micro_batch=size, activation_checkpointing=mode)
            if changed == config or not need_of(changed, need.layout, cuda=machine.cuda).fits(machine):
                continue
            said = [f"train.micro_batch {size}"] * (size != config.train.micro_batch)
            said += [f"train.activation_checkpointing {mode}"] * (mode != config.train.activation_checkpointing)
            found.append(" and ".join(said))
            break
    return found


def record(choices: Choices) -> dict[str, Any]:
    """Return the same for JSON, with all layouts; sizes in bytes."""
    machine = choices.machine
    return {
        "devices": dataclasses.asdict(machine) | {"usable_bytes": machine.usable_bytes},
        "parameters": parameter_count(choices.config.model),
        "layouts": [
            {
                "layout": {name: getattr(c.need.layout, name) for name in AXES},
                "fits": c.need.fits(machine),
                "bytes": c.need.total,
                "parts": dict(c.need.parts),
                "sent_bytes": dict(c.need.sent),
                "idle": c.idle,
            }
            for c in choices.found
        ],
    }
