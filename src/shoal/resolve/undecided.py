"""Which sizes of a config are `auto`: they have placeholders until a command decides them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shoal.config.auto import AUTO, LAYOUT, MICRO_BATCH, micro_batches, usual_micro_batch
from shoal.config.options import Config, Parallel
from shoal.resolve.layout_checks import refusals, refusals_of_machines
from shoal.resolve.recipe import Setting, to_text


def take_undecided(settings: Mapping[str, Setting]) -> tuple[dict[str, Setting], dict[str, str]]:
    """Return the settings that have a value, and where each key of the others was set to auto."""
    undecided = {
        key: settings[key].where for key in (LAYOUT, MICRO_BATCH) if key in settings and settings[key].value == AUTO
    }
    return {key: setting for key, setting in settings.items() if key not in undecided}, undecided


def with_placeholders(config: Config, undecided: Mapping[str, str]) -> Config:
    """Return `config` with a micro-batch that divides the global batch, if it is undecided; the layout has its defaults."""
    if MICRO_BATCH not in undecided:
        return config
    return config.replace("train", micro_batch=usual_micro_batch(config.train.global_batch))


def with_sizes_of(config: Config, other: Config, undecided: Mapping[str, str]) -> Config:
    """Return `config` with the sizes of `other` in place of those that are undecided."""
    if LAYOUT in undecided:
        config = config.replace(LAYOUT, **vars(other.parallel))
    if MICRO_BATCH in undecided:
        config = config.replace("train", micro_batch=other.train.micro_batch)
    return config


def why_undecided(undecided: Mapping[str, str], nodes: int = 1) -> str:
    """Return why a command rejects sizes that are auto, and what to do instead."""
    said = " and ".join(f"{key} auto ({where})" for key, where in undecided.items())
    plan = f"shoal plan RECIPE --devices 8xH100-80GB{f' --nodes {nodes}' * (nodes > 1)} --write"
    why = (
        f"shoal train chooses on one node, and launch.nodes is {nodes}: all nodes must know the sizes before they start"
        if nodes > 1
        else "shoal train chooses when it starts its own workers"
    )
    return f"{said}: {why}; {plan} writes the planned sizes for such devices into the recipe"


def refusals_of_all_sizes(config: Config, undecided: Mapping[str, str]) -> list[str]:
    """Return why `config` cannot run, whatever its undecided sizes become: a layout of one process has the fewest limits."""
    if LAYOUT in undecided:
        return list(refusals(config.replace(LAYOUT, **vars(Parallel())), 1))
    sizes = micro_batches(config.train.global_batch) if undecided else [config.train.micro_batch]
    each = (config.replace("train", micro_batch=size) for size in sizes)
    return min((list(refusals_of_machines(one, config.launch.processes)) for one in each), key=len)


def flags_of(config: Config, undecided: Mapping[str, str]) -> list[str]:
    """Return the chosen sizes as flags of `shoal train`."""
    flags = []
    if LAYOUT in undecided:
        flags += [
            f"--{LAYOUT}.{f.name}={to_text(getattr(config.parallel, f.name))}" for f in dataclasses.fields(Parallel)
        ]
    if MICRO_BATCH in undecided:
        flags.append(f"--{MICRO_BATCH}={config.train.micro_batch}")
    return flags
