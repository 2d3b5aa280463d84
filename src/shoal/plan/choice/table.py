"""The layouts of a config on given devices as `shoal plan` prints them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

from shoal.config.layout import AXES
from shoal.plan.choice.choose import Choice, Choices, largest_micro_batch
from shoal.plan.choice.price import Price
from shoal.plan.estimate import flops_per_token, parameter_count
from shoal.plan.fits import Need, need_of
from shoal.plan.length import given_steps
from shoal.plan.machine import GIB, Machine
from shoal.plan.speed.corrections import Interval
from shoal.plan.speed.seconds import Part, idle_share
from shoal.run.console import duration
from shoal.system.output import aligned

SHOWN: Final = 10  # rows of the table
FAR_APART: Final = 0.02  # two counts of memory
# Columns of the table: the parts of memory that each sums
COLUMNS: Final = {
    "state": ("parameters", "moments"),
    "gradients": ("gradients",),
    "activations": ("activations", "logits"),
    "other": ("gathered", "messages", "temporary"),
}


def lines(choices: Choices, price: Price | None = None) -> list[str]:
    """Return the plan as text: the table, and the best layout or what is missing. price: of a device."""
    config, machine = choices.config, choices.machine
    train = config.train
    several = choices.has_several_sizes
    head = ["layout", "GiB", *COLUMNS, "step", "tokens/s", "MFU", "" if several else "largest"]
    units = ["", "", *("" for _ in COLUMNS), "seconds", "", "", "" if several else "micro-batch"]
    if not machine.cuda:  # a CPU has no known peak
        head.remove("MFU")
        units.pop(-2)
    shown = choices.found[:SHOWN]
    more = len(choices.found) - len(shown)
    return [
        f"{config.model.family}, {parameter_count(config.model):,} parameters; {train.global_batch} x {config.data.seq_len:,} "
        f"tokens per step in micro-batches of {'auto' if several else train.micro_batch}; {train.dtype}; activation checkpointing: "
        f"{train.activation_checkpointing}",
        f"{machine}: {machine.usable_bytes / GIB:.1f} GiB of each may be used"
        + (" (not measured on a GPU: 2 GiB for CUDA and NCCL, 6% for the allocator)" if machine.cuda else ""),
        "",
        *aligned([head, units, *(_row(choice, choices) for choice in shown)], left=(0,)),
        *([f"... {more} more layouts"] if more else []),
        "",
        *_verdict(choices, price),
    ]


def beside(rehearsed: int, traced: int) -> str:
    """Return two counts of the same memory as a sentence; where they are far apart, with advice. In bytes, of a CPU's kernels."""
    off = rehearsed / traced - 1
    found = f"a second count, of the real step on fake tensors and a CPU's kernels: {gib(traced)} GiB"
    if abs(off) > FAR_APART:
        return (
            f"{found}, but {gib(rehearsed)} GiB were rehearsed ({off:+.1%}): plan for the larger one, and report this"
        )
    return f"{found}; rehearsed: {gib(rehearsed)} GiB ({off:+.1%})"


def label(choice: Choice, choices: Choices) -> str:
    """Return a layout, with its micro-batch if there are several."""
    size = f", micro-batch {choice.need.config.train.micro_batch}" if choices.has_several_sizes else ""
    return f"{choice.need.layout}{size}"


def _row(choice: Choice, choices: Choices) -> list[str]:
    need, seconds, machine = choice.need, choice.seconds.middle, choices.machine
    tokens = need.config.train.global_batch * need.config.data.seq_len / seconds
    parts = [sum(need.parts.get(p, 0) for p in names) for names in COLUMNS.values()]
    return [
        label(choice, choices), gib(need.total), *map(gib, parts), f"{seconds:.3g}", f"{tokens:,.0f}", *([f"{mfu(need, machine, tokens):.0%}"] if machine.cuda else []),
        "does not fit" if not need.fits(machine) else "" if choices.has_several_sizes else str(largest_micro_batch(choice, machine)),
    ]  # fmt: skip


def mfu(need: Need, machine: Machine, tokens_per_second: float) -> float:
    """Return the model's FLOP/s as a share of the peak of all devices, 0 to 1, by the convention of the config."""
    flops = (
        flops_per_token(need.config.model, need.config.data.seq_len, need.config.metrics.mfu_attention)
        * tokens_per_second
    )
    return flops / (machine.flops * machine.world_size)


def gib(size: float) -> str:
    """Return bytes as GiB with three digits."""
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def _verdict(choices: Choices, price: Price | None) -> list[str]:
    machine = choices.machine
    if best := next(iter(choices.fitting), None):
        return [*_explained(choices, best), *_whole_run(choices, best, price), _source(choices)]
    return [lacking(choices), *(f"it would fit with {way}" for way in _ways(choices.found[0].need, machine))]


def lacking(choices: Choices) -> str:
    """Return how much more memory the layout that needs least would need, if nothing fits."""
    least = choices.found[0].need
    over = least.total - choices.machine.usable_bytes
    return f"nothing fits: {label(choices.found[0], choices)} needs least, {gib(least.total)} GiB, {gib(over)} more than there is"


def _explained(choices: Choices, best: Choice) -> Iterator[str]:
    """Yield the fastest layout, on what its step's time goes, and how much slower the next one is."""
    machine, need, layout = choices.machine, best.need, best.need.layout
    flags = " ".join(f"--parallel.{name} {getattr(layout, name)}" for name in AXES if getattr(layout, name) > 1)
    flags += f" --train.micro_batch {need.config.train.micro_batch}" * choices.has_several_sizes
    yield (
        f"{label(best, choices)} fits and is probably the fastest: {_range(best.seconds, '{:.3g}'.format, ' seconds a step')}, "
        f"{_range(choices.memory(best), gib)} of {gib(machine.usable_bytes)} GiB"
        + (f". Its flags: {flags.strip()}" if flags else "")
    )
    shares = {part: s * choices.corrections.factor(part) / best.seconds.middle for part, s in best.parts.items()}
    told = [
        f"{_called(part)} {share:.0%}" for part, share in sorted(shares.items(), key=lambda p: -p[1]) if share >= 0.01
    ]
    yield f"its step: {', '.join(told)}"
    if len(choices.fitting) > 1:
        other = choices.fitting[1]
        slower = other.seconds.middle / best.seconds.middle - 1
        memory = (other.need.total - need.total) / GIB
        less = f"{abs(memory):.2g} GiB {'more' if memory > 0 else 'less'}"
        yield f"next: {label(other, choices)}, {slower:.0%} slower with {less}"


def _called(part: Part) -> str:
    return f"messages of {part}" if part in ("tp", "cp", "pp", "shard", "replicate") else part


def _whole_run(choices: Choices, best: Choice, price: Price | None) -> Iterator[str]:
    """Yield the time of all steps, and their price, if the recipe says how many there are."""
    train, world = choices.config.train, choices.machine.world_size
    per_step = train.global_batch * choices.config.data.seq_len
    steps = given_steps(train, choices.config.data.seq_len)
    if steps is None:
        return
    whole = best.seconds.scaled(steps)
    said = f"{steps:,} steps, {steps * per_step:,} tokens: {_range(whole, duration)}"
    if price is not None:
        said += f"; {_range(whole.scaled(world / 3600 * price.amount), '{:,.2f}'.format, f' {price.currency}')}"
    yield said + ", without evaluations, saves and restarts"


def _source(choices: Choices) -> str:
    """Return where the rates come from, and how many measured steps corrected them."""
    rates, seen = choices.rates, choices.corrections.seen
    taught = f", corrected by {seen} measured run{'s' * (seen != 1)}" if seen else ""
    if rates.measured:
        return f"rates: measured on such a machine by shoal plan --calibrate{taught}"
    if choices.machine.guessed:
        named = "another device's" if choices.machine.cuda else "a slow core's"
        return f"rates: {named}, as these devices are not known{taught}; shoal plan --calibrate measures them"
    return f"rates: from the device's data sheet, not measured{taught}; shoal plan --calibrate measures them there"


def _range(value: Interval, shown: Callable[[float], str], unit: str = "") -> str:
    """Return "5 USD (4 to 6 with 90% probability)"; "5 USD" if the bounds differ too little to show."""
    low, high = shown(value.low), shown(value.high)
    return f"{shown(value.middle)}{unit}" + (f" ({low} to {high} with 90% probability)" if low != high else "")


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
                "rehearsed": not c.is_sketch,
                "bytes": c.need.total,
                "memory_bytes": dataclasses.asdict(choices.memory(c)),
                "parts": dict(c.need.parts),
                "sent_bytes": c.need.sent,
                "idle": idle_share(c.need),
                "step_seconds": dataclasses.asdict(c.seconds),
                "seconds_by_part": {part: s * choices.corrections.factor(part) for part, s in c.parts.items()},
            }
            for c in choices.found
        ],
    }
