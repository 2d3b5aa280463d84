"""The sizes of a config that are auto: those that its run has chosen, or those chosen now for this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from shoal.errors import LaunchError

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.data.dataset import Dataset
    from shoal.run.console import Console


def kept_sizes(
    config: Config, undecided: Mapping[str, str], before: Config | None, gpus: int, say: Callable[[str], None]
) -> Config | None:
    """
    Return `config` with the sizes that its run has chosen; None if there are none, or they do not fit this machine's devices.

    before: the config of the run; None for a new run. Raises `LaunchError` if sizes must be chosen for several nodes.
    """
    from shoal.launch.torchrun import count_processes
    from shoal.resolve.layout_checks import refusals_of_machines
    from shoal.resolve.undecided import why_undecided, with_sizes_of

    found = None
    processes = count_processes(config, gpus)
    if before is not None:
        kept = with_sizes_of(config, before, undecided)
        found = None if any(refusals_of_machines(kept, processes)) else kept
        said = f"{' and '.join(undecided)} auto: this run chose {_described(before, undecided)} for {before.launch.processes} processes"
        again = "; it is kept" if found else f"; there are {processes} now, so it chooses again"
        say(said + again)
    if found is None and config.launch.nodes > 1:
        raise LaunchError(why_undecided(undecided, config.launch.nodes))
    return found


def _described(config: Config, undecided: Mapping[str, str]) -> str:
    from shoal.config.auto import LAYOUT, MICRO_BATCH
    from shoal.config.layout import AXES

    sizes = {name: getattr(config.parallel, name) for name in AXES if LAYOUT in undecided}
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
    parts = [layout or "one process"] * (LAYOUT in undecided)
    return ", ".join([*parts, *[f"micro-batch {config.train.micro_batch}"] * (MICRO_BATCH in undecided)])


def sizes_for(
    config: Config, undecided: Mapping[str, str], dataset: Dataset, console: Console, limit_seconds: float
) -> Config:
    """Return `config` with sizes in place of those that are `undecided`, chosen for this machine; see `choose_sizes`."""
    if not undecided:
        return config
    from shoal.bench.choose import choose_sizes
    from shoal.commands.worker import look_for_gpus

    return choose_sizes(config, undecided, look_for_gpus(), dataset.vocab_size, limit_seconds, console)
