"""The layouts of a config on given devices, in order of preference, as `shoal plan` prints them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.config.layout import AXES
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.corrections import Corrections, Interval, Seen
from shoal.plan.estimate import flops_per_token, parameter_count
from shoal.plan.fits import Need, layouts, need_of, why_unknown
from shoal.plan.machine import GIB, Machine
from shoal.plan.rates import WIDTHS, Rates
from shoal.plan.seconds import Part, idle_share, step_seconds

SHOWN: Final = 10  # rows of the table
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
    """A layout, what it needs, and the seconds of its step: by part without correction, and corrected."""

    need: Need
    parts: Mapping[Part, float]
    seconds: Interval


@dataclass(frozen=True)
class Choices:
    """All layouts of `config` on `machine`, the fastest that fit first, then those that do not, the smallest first."""

    config: Config
    machine: Machine
    rates: Rates
    corrections: Corrections
    found: Sequence[Choice]

    @property
    def fitting(self) -> list[Choice]:
        return [c for c in self.found if c.need.fits(self.machine)]


def choose(config: Config, machine: Machine, rates: Rates | None = None, seen: Sequence[Seen] = ()) -> Choices:
    """
    Return all layouts of `config`, whose own layout is ignored. Raises `ShoalError` if it allows none, or is not known.

    rates: of the machine's processes; None takes its data sheet's. seen: steps that were measured on such a machine.
    """
    if why := why_unknown(config):
        raise ShoalError(why)
    rates = rates or Rates(machine, WIDTHS[config.train.dtype])
    corrections = Corrections(seen, calibrated=rates.measured)
    found = [
        choice_of(need_of(each, layout, cuda=machine.cuda), rates, corrections)
        for each, layout in layouts(config, machine)
    ]
    if not found:
        raise ShoalError(
            f"no layout of this recipe uses all {machine.world_size} devices; change train.global_batch "
            f"({config.train.global_batch}) or train.micro_batch ({config.train.micro_batch}), or the number of devices"
        )

    def order(choice: Choice) -> tuple[bool, float]:
        fits = choice.need.fits(machine)
        return not fits, choice.seconds.middle if fits else choice.need.total

    return Choices(config, machine, rates, corrections, sorted(found, key=order))


def choice_of(need: Need, rates: Rates, corrections: Corrections) -> Choice:
    """Return a layout with its step's seconds."""
    parts = step_seconds(need, rates)
    return Choice(need, parts, corrections.predict(parts))


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
    head = ["layout", "GiB", *COLUMNS, "sent", "idle", "step", "tokens/s", "MFU", "largest"]
    units = ["", "", *("" for _ in COLUMNS), "GB/step", "", "seconds", "", "", "micro-batch"]
    if not machine.cuda:  # a CPU has no known peak
        head.remove("MFU")
        units.remove("")
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
    need, seconds = choice.need, choice.seconds.middle
    tokens = need.config.train.global_batch * need.config.data.seq_len / seconds
    parts = [sum(need.parts.get(p, 0) for p in names) for names in COLUMNS.values()]
    return [
        str(need.layout), _gib(need.total), *map(_gib, parts), f"{sum(need.sent.values()) / 1e9:.3g}",
        f"{idle_share(need):.0%}" if need.layout.pp > 1 else "",
        f"{seconds:.3g}", f"{tokens:,.0f}", *([f"{_mfu(need, machine, tokens):.0%}"] if machine.cuda else []),
        str(largest_micro_batch(choice, machine)) if need.fits(machine) else "does not fit",
    ]  # fmt: skip


def _mfu(need: Need, machine: Machine, tokens_per_second: float) -> float:
    flops = flops_per_token(need.config.model, need.config.data.seq_len) * tokens_per_second
    return flops / (machine.flops * machine.world_size)


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
                "sent_bytes": c.need.sent,
                "idle": idle_share(c.need),
                "step_seconds": dataclasses.asdict(c.seconds),
                "seconds_by_part": {part: s * choices.corrections.factor(part) for part, s in c.parts.items()},
            }
            for c in choices.found
        ],
    }
