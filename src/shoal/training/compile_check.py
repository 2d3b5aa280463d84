"""
What the compiler made, compared with eager code before the first step: a compiler may drop a gradient without a word.

One micro-batch is computed three times on the weights that the run starts from: eagerly; eagerly with other rounding
(in float32, or where that is the run's dtype with the same sums in another order); compiled. How far the second is from
the first is what rounding does to this model on this data. The third may be ten times as far from the first.

It needs memory for one more copy of this process's gradients, on the CPU. Eager blocks are computed again in backward, so
that their activations take no more than those of compiled ones. Nothing of the run changes: no weight, no random
number, no gradient that is left, no step that is counted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.config.options import Config
from shoal.data.loader import Batch
from shoal.errors import CompileError
from shoal.metrics.meter import no_phases
from shoal.models.family import LanguageModel
from shoal.models.layers import products_by_quarters
from shoal.parallel.reduce import GradientReducer
from shoal.parallel.runnable import Runnable

if TYPE_CHECKING:
    from shoal.training.loop import Run

ALLOWANCE = 10.0  # times what rounding does
SMALLEST = 2.0**-22  # float32's own grain, relative: sums of few numbers may come out the same in any order
LOSS_SCALE = 1024.0  # for float16: small gradients count, and the first step does not overflow


@dataclass(frozen=True)
class Agreement:
    """How far compiled code is from eager code where it is furthest, relative to what is compared."""

    name: str  # a parameter's, or "the loss"
    difference: float
    allowed: float
    wrong: int  # how many are further than what is allowed
    comparable: bool = True  # False: eager code itself gives NaN or Inf


def check_compiled(run: Run) -> None:
    """
    Compare; say how it went. A collective over the world.

    Raises `CompileError`, on all processes alike, where compiled code computes something else.
    """
    run.console.note("compiling, and comparing one micro-batch with eager code (train.compile_check)")
    begun = time.perf_counter()
    with run.records.clock.spend("compile"):
        found = compare_with_eager(
            run.runnable, run.loader.batches_at(run.state.position), run.config, run.state.step + 1,
            alive=lambda: run.heartbeat.outside("compile check"),
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    if not found.comparable:
        run.console.warn("compiled code was not compared with eager code, which gives NaN or Inf here")
    elif found.wrong:
        others = f" (and {found.wrong - 1} more)" if found.wrong > 1 else ""
        what = found.name if found.name == "the loss" else f"the gradient of {found.name}"
        raise CompileError(
            f"train.compile: with torch {torch.__version__}, {what}{others} differs from eager code by "
            f"{found.difference:.1e} (relative), and rounding explains at most {found.allowed:.1e}. Set train.compile to "
            "false, or use another version of torch; train.compile_check false would train with these gradients"
        )
    else:
        run.console.note(
            f"compiled code agrees with eager code: the furthest is {found.name}, {found.difference:.1e} of "
            f"{found.allowed:.1e} allowed ({seconds:.0f} s)"
        )


def compare_with_eager(
    runnable: Runnable, batches: Sequence[Batch], config: Config, step: int, alive: Callable[[], None] = lambda: None
) -> Agreement:
    """
    Compare one micro-batch of each data-parallel rank, the first of `batches`; all of them where a pipeline or
    `train.repro: bitwise` fixes how many there are. `alive` is called before each turn. A collective over the world.
    """
    one = runnable.pipeline is None and not runnable.bitwise
    batches, turns = (batches[:1], 1) if one else (batches, runnable.turns)
    scale = LOSS_SCALE if config.train.dtype == "float16" else 1.0

    def compute() -> float:
        alive()
        losses, _ = runnable.forward_backward(batches, step, no_phases, scale)
        return float(runnable.mesh.sum(losses.double()).sum())

    usual, runnable.turns = runnable.turns, turns
    try:
        with _without_dropout(runnable), _after_backward(runnable):
            with _eager(runnable):
                loss = compute()
                gradients = [_on_cpu(shard.tensor.grad) for shard in runnable.shards]
                with _rounded_otherwise(runnable, config):
                    other_loss = compute()
                spread = _squares(runnable, gradients)
            compiled_loss = compute()
            difference = _squares(runnable, gradients)
    finally:
        runnable.turns = usual
        runnable.forget_gradients()
    # columns: how far compiled code is, how far rounding goes, size, size of what compiled code gave
    rows = torch.stack([difference[:, 0], spread[:, 0], difference[:, 1], difference[:, 2]], 1).sqrt()
    ours = [abs(compiled_loss - loss), abs(other_loss - loss), abs(loss), abs(compiled_loss)]
    return judge(["the loss", *runnable.shapes], torch.cat([torch.tensor([ours], dtype=torch.float64), rows]))


def judge(names: Sequence[str], rows: Tensor) -> Agreement:
    """
    The row that is furthest from eager code, by what it is allowed. rows: [names, 4], see above; the first is the loss.

    A parameter's spread may be small by luck: the model's usual one counts too. What is nothing but rounding (a key's
    bias) has no size to compare with: the whole gradient's counts a little.
    """
    difference, spread, size, given = rows.unbind(1)
    if not (size.isfinite().all() and spread.isfinite().all()):
        return Agreement("", 0.0, 0.0, 0, comparable=False)
    usual = max(float((spread[1:] / size[1:].clamp(min=1e-30)).median()), SMALLEST)
    noise = 1e-7 * size[1:].norm() / len(names) ** 0.5
    allowed = ALLOWANCE * torch.maximum(spread, usual * size + noise)
    lost = (given == 0) & (size > noise)  # bfloat16's rounding may allow much; but never that nothing is left
    excess = (difference / allowed).nan_to_num(nan=torch.inf).masked_fill(lost, torch.inf)
    worst = int(excess.argmax())
    unit = max(float(size[worst]), 1e-30)
    return Agreement(
        names[worst], float(difference[worst]) / unit, float(allowed[worst]) / unit, int((excess > 1).sum())
    )


def _squares(runnable: Runnable, gradients: Sequence[Tensor | None]) -> Tensor:
    """
    [parameters, 3] float64, by the model's order: squares of the gradients' difference from `gradients`, of these, of
    the gradients that are there, summed over the world. One parameter at a time: it takes memory for the largest.
    """
    place = {name: index for index, name in enumerate(runnable.shapes)}
    table = torch.zeros(len(place), 3, dtype=torch.float64, device=runnable.mesh.device)
    for shard, before in zip(runnable.shards, gradients, strict=True):
        if not shard.counted or not shard.tensor.numel():
            continue
        nothing = torch.zeros((), device=shard.tensor.device)
        now = nothing if shard.tensor.grad is None else shard.tensor.grad
        then = nothing if before is None else before.to(shard.tensor.device)
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (now - then, then, now)]
        table[place[shard.name]] += torch.stack(norms).square().to(table.device)
    return runnable.mesh.sum(table).cpu()


def _on_cpu(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().to("cpu", copy=True)


@contextlib.contextmanager
def _eager(runnable: Runnable) -> Iterator[None]:
    for each in runnable.compiled:
        each.on = False
    try:
        yield
    finally:
        for each in runnable.compiled:
            each.on = True


@contextlib.contextmanager
def _without_dropout(runnable: Runnable) -> Iterator[None]:
    """The compiler draws dropout's numbers in its own way."""
    draws = any(part.shape.dropout > 0 for part in runnable.parts.values())
    runnable.train(not draws)
    try:
        yield
    finally:
        runnable.train()


@contextlib.contextmanager
def _after_backward(runnable: Runnable) -> Iterator[None]:
    """Replicas' gradients are summed when backward is over: a parameter may get none, and is then to be named."""
    reducers = [held for held in runnable.gradients.values() if isinstance(held, GradientReducer)]
    for reducer in reducers:
        reducer.overlaps = False
    try:
        yield
    finally:
        for reducer in reducers:
            reducer.overlaps = True


@contextlib.contextmanager
def _rounded_otherwise(runnable: Runnable, config: Config) -> Iterator[None]:
    """
    In float32; in another order of sums where that is the run's dtype, or where float32 is not to be had: transformers'
    blocks have their weights in one dtype, and the ring's kernel on CUDA has no float32.

    Weights that FSDP2 gathers are rounded to the run's dtype before: products are then of these, in float32.
    """
    ring = config.parallel.cp_method == "ring" and runnable.mesh.layout.cp > 1 and runnable.mesh.device.type == "cuda"
    if config.train.dtype == "float32" or config.model.family == "hf" or ring:
        with products_by_quarters():
            yield
        return
    with contextlib.ExitStack() as stack:
        for part in runnable.parts.values():
            stack.enter_context(_in_float32(part, stage=runnable.pipeline is not None))
        yield


@contextlib.contextmanager
def _in_float32(part: LanguageModel, *, stage: bool) -> Iterator[None]:
    """`stage`: what goes from one process to the next stays in the dtype that it has."""
    dtype, forward = part.compute_dtype, vars(part).get("forward")
    compute: Callable[..., Tensor] = part.forward

    def between(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return compute(x.float() if x.is_floating_point() else x, *args, **kwargs).to(dtype)

    part.compute_dtype = torch.float32
    if stage:
        vars(part)["forward"] = between
    try:
        yield
    finally:
        part.compute_dtype = dtype
        vars(part).pop("forward", None)
        if forward is not None:
            vars(part)["forward"] = forward
