"""Out of memory: how to recognize it, what a run's memory holds, and which options need less. No torch."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Iterator
from typing import Any

from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.estimate import parameter_count
from shoal.resolve.layout_checks import refusals
from shoal.system.disk import gigabytes

# Texts of out-of-memory errors that have no exception type of their own: torch on a CPU, CUDA, cuBLAS, NCCL.
_WORDS = (
    "can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "'out of memory'", "std::bad_alloc",
)  # fmt: skip


def what_ran_out(error: BaseException) -> str | None:
    """Return the allocator's message in one line; None if `error`, or an error it wraps, is not about memory."""
    found: BaseException | None = error
    while found is not None:
        text = str(found)
        if (
            isinstance(found, MemoryError)
            or type(found).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
            or (isinstance(found, OSError) and found.errno == errno.ENOMEM)
            or any(words in text for words in _WORDS)
        ):
            return _in_a_line(text) or "the process reached its memory limit"
        found = found.__cause__
    return None


def _in_a_line(text: str) -> str:
    """Shorten an allocator's message: a CPU's to its number of bytes, CUDA's to the two sentences about sizes."""
    if asked := re.search(r"tried to allocate (\d+) bytes", text):
        return f"{gigabytes(int(asked[1]))} more could not be allocated"
    return ". ".join(re.split(r"\.\s+", text.strip())[1:3] if text.startswith("CUDA out") else text.splitlines()[:1])


def what_would_fit(config: Config, world_size: int) -> str:
    """Return what fills the memory of a process, and the options that would need less."""
    layout = find_layout(config.parallel, world_size)
    if isinstance(layout, str):
        layout = Layout(dp_replicate=world_size)
    ways = list(_ways(config, layout))
    advice = ", or ".join(ways) if ways else "more processes with parallel.dp_shard, or a smaller model"
    return f"{_takes(config, layout)}To use less memory: {advice}"


def _takes(config: Config, layout: Layout) -> str:
    """Return a sentence on the memory a process always holds; empty if it is unknown."""
    model, least = config.model, ""
    if model.vocab_size is None:  # the tokenizer's, unknown here: count without the embedding
        model, least = dataclasses.replace(model, vocab_size=0), "at least "
    try:
        parameters = parameter_count(model)
    except ShoalError:  # the folder is gone
        return ""
    held = _held(config, layout, parameters)
    rows, length = config.train.micro_batch, config.data.seq_len // layout.cp
    return (
        f"Weights, gradients and optimizer state take {least}{gigabytes(int(held))} per process, plus activations of "
        f"{rows} x {length:,} tokens. "
    )


def held_bytes(config: Config, layout: Layout) -> float:
    """Return the bytes a process always holds: float32 weights, gradients, and AdamW's two moments or Muon's one."""
    return _held(config, layout, parameter_count(config.model))


def _held(config: Config, layout: Layout, parameters: int) -> float:
    processes = layout.dp_shard * layout.cp if layout.dp_shard > 1 else 1
    return (16 if config.optim.name == "adamw" else 12) * parameters / (processes * layout.tp * layout.pp)


def _ways(config: Config, layout: Layout) -> Iterator[str]:
    train = config.train
    smaller = [n for n in range(1, train.micro_batch // 2 + 1) if train.global_batch % n == 0]
    tries: list[tuple[str, str, Any]] = [("train", "micro_batch", smaller[-1])] if smaller else []
    if train.activation_checkpointing == "none":
        tries.append(("train", "activation_checkpointing", "full"))
    if layout.dp_replicate > 1:
        tries.append(("parallel", "dp_shard", layout.dp_shard * layout.dp_replicate))
    for section, key, value in tries:
        changed, more = config.replace(section, **{key: value}), ""
        if key == "micro_batch":
            more = f" (with the same train.global_batch, {train.global_batch})"
        if key == "dp_shard" and config.parallel.dp_replicate != -1:
            changed, more = changed.replace("parallel", dp_replicate=1), " with parallel.dp_replicate 1"
        if not list(refusals(changed, layout.world_size)):
            yield f"{section}.{key} {value}{more}"
