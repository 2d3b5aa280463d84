"""The totals of a config, which `shoal config` prints last: parameters, tokens, steps, memory. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.data.prepare import prepared_rows
from shoal.errors import ShoalError
from shoal.launch.torchrun import count_gpus, plan_processes
from shoal.plan.estimate import parameter_count
from shoal.plan.fit import held_bytes
from shoal.plan.length import count_steps, length_of
from shoal.system.disk import gigabytes


def amounts(config: Config, *, chosen: bool = True) -> Iterator[str]:
    """
    Yield one line each for parameters, tokens, steps, epochs and memory; some are unknown before the data is prepared.

    chosen: whether the config has its layout; else the memory is that of one process.
    """
    try:
        manifest, rows = (None, None) if config.data.sources else prepared_rows(config.data)
    except ShoalError:  # a tokenizer that cannot be opened; training reports it
        manifest, rows = None, None
    data, train = config.data, config.train
    sized = with_vocab_size(config, manifest.vocab_size if manifest else None)
    note = "" if sized.model.vocab_size else ", without the embedding, whose size depends on the tokenizer"
    yield f"parameters: {parameter_count(sized.model):,}{note}"
    tokens = train.global_batch * data.seq_len
    if rows is None and length_of(train)[0] == "epochs":
        yield f"tokens: {tokens:,} per step; total and steps: known after the data is prepared"
        yield f"epochs: {train.epochs:g}"
    else:
        steps = count_steps(train, data.seq_len, rows or 0)
        yield f"tokens: {tokens:,} per step, {tokens * steps:,} in total"
        yield f"steps: {steps:,}"
        yield f"epochs: {steps * train.global_batch / rows:.3g}" if rows else "epochs: known after the data is prepared"
    layout = planned_layout(config) if chosen else Layout()
    where = str(layout) if chosen else f"{layout}; parallel auto chooses the layout"
    yield (
        f"memory: {gigabytes(int(held_bytes(sized, layout)))} per process for weights, gradients and optimizer state "
        f"({where}), plus activations"
    )


def planned_layout(config: Config) -> Layout:
    """Return the config's layout on this machine's processes; if it cannot run on them, on as few as it needs."""
    try:
        processes = plan_processes(config, count_gpus()).launch.processes
    except ShoalError:
        processes = None
    found = find_layout(config.parallel, processes and processes * config.launch.nodes)
    return found if isinstance(found, Layout) else Layout()


def with_vocab_size(config: Config, prepared: int | None = None) -> Config:
    """
    Return `config` with the size of its vocabulary, 0 if it is unknown before the data is prepared.

    prepared: the size in the prepared data.
    """
    data = config.data
    known = prepared or {"bpe": data.tokenizer_vocab_size, "bytes": 257}.get(data.tokenizer)
    return config.replace("model", vocab_size=config.model.vocab_size or known or 0)
