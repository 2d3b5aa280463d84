"""
Compares compiled with eager code before the first step: a compiler may drop a gradient silently.

Loss and gradients of one micro-batch are computed three times before the first step: eager; eager with different rounding
(in float32; if that is the run's dtype, with sums in another order); compiled. The distance of the second result from the
first shows the effect of rounding on this model and data. The third may be up to ten times as
far from the first as the second is.

The check needs memory for another copy of this rank's gradients, on the CPU. Eager blocks are recomputed in backward, so
their activations take no more memory than compiled ones. The check does not change the run's weights, random numbers,
gradients or step count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.config.options import Config
from shoal.data.loader import Batch
from shoal.errors import CompileError
from shoal.models.family import LanguageModel
from shoal.models.layers import products_by_quarters
from shoal.parallel.reduce import GradientReducer
from shoal.parallel.runnable import Runnable
from shoal.run.phases import NO_PHASES
from shoal.training.run import Run

ALLOWANCE = 10.0  # times the effect of rounding
# Least relative effect of rounding that is assumed, two float32 ulps: short sums may round the same in any order.
SMALLEST = 2.0**-22
LOSS_SCALE = 1024.0  # for float16: large enough for small gradients, too small to overflow in the first step


@dataclass(frozen=True)
class Agreement:
    """The largest deviation of compiled from eager code, relative to the size of the compared value."""

    name: str  # name of the parameter, or "the loss"
    difference: float
    allowed: float
    wrong: int  # number of gradients (and the loss) that deviate by more than is allowed
    comparable: bool = True  # False: eager code itself gives NaN, Inf or no gradient


def check_compiled(run: Run) -> None:
    """
    Compare compiled with eager code, and report the result. A collective over the world.

    Raises `CompileError`, on all ranks, if rounding does not explain the deviation of compiled code.
    """
    run.console.note("compiling, and comparing one micro-batch with eager code (train.compile_check)")
    begun = time.perf_counter()
    with run.files.clock.spend("compile"):
        found = compare_with_eager(
            run.runnable, run.loader.batches_at(run.state.position), run.config, run.state.step + 1,
            alive=lambda: run.watch.heartbeat.outside("compile check"),
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    if not found.comparable:
        run.console.warn("compiled code was not compared with eager code, which gives NaN, Inf or no gradient here")
    elif found.wrong:
        others = f" (and {found.wrong - 1} more)" if found.wrong > 1 else ""
        what = found.name if found.name == "the loss" else f"the gradient of {found.name}"
        raise CompileError(
            f"train.compile: with torch {torch.__version__}, {what}{others} differs from eager code by "
            f"{found.difference:.1e} (relative), but rounding explains at most {found.allowed:.1e}. Set train.compile to "
            "false, or use another version of torch; train.compile_check false trains with these gradients"
        )
    else:
        run.console.note(
            f"compiled code agrees with eager code: the largest deviation is {found.name}, {found.difference:.1e} of "
            f"{found.allowed:.1e} allowed ({seconds:.0f} s)"
        )


def compare_with_eager(
    runnable: Runnable, batches: Sequence[Batch], config: Config, step: int, alive: Callable[[], None] = lambda: None
) -> Agreement:
    """
    Compare compiled with eager code on the fullest of `batches` of each data-parallel rank. A pipeline or
    `train.repro: bitwise` fixes the number of batches: then compare on all. `alive()` is called before each computation.
    A collective over the world.
    """
    one = runnable.pipeline is None and not runnable.bitwise
    fullest = max(batches, key=lambda batch: batch.valid_tokens)  # one without a label has no gradient to compare
    batches, turns = ([fullest], 1) if one else (batches, runnable.turns)
    scale = LOSS_SCALE if config.train.dtype == "float16" else 1.0

    def compute() -> float:
        alive()
        losses, _ = runnable.forward_backward(batches, step, NO_PHASES, scale)
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
    # columns: deviation of compiled code, deviation by rounding, size, size in compiled code
    rows = torch.stack([difference[:, 0], spread[:, 0], difference[:, 1], difference[:, 2]], 1).sqrt()
    ours = [abs(compiled_loss - loss), abs(other_loss - loss), abs(loss), abs(compiled_loss)]
    return judge(["the loss", *runnable.shapes], torch.cat([torch.tensor([ours], dtype=torch.float64), rows]))


def judge(names: Sequence[str], rows: Tensor) -> Agreement:
    """
    Return the largest deviation relative to its allowance. rows: [names, 4], columns as in `compare_with_eager`; row 0: loss.

    A parameter's deviation by rounding may be small by luck, so the model's median counts too. A gradient that is only
    rounding noise (such as a key bias's) has no size to compare with, so a small share of the whole gradient's size is added.
    """
    difference, spread, size, given = rows.unbind(1)
    if not (size.isfinite().all() and spread.isfinite().all() and size.any()):
        return Agreement("", 0.0, 0.0, 0, comparable=False)
    usual = max(float((spread[1:] / size[1:].clamp(min=1e-30)).median()), SMALLEST)
    noise = 1e-7 * size[1:].norm() / len(names) ** 0.5
    allowed = ALLOWANCE * torch.maximum(spread, usual * size + noise)
    lost = (given == 0) & (size > noise)  # bfloat16's rounding allows much, but never a gradient of zero
    excess = (difference / allowed).nan_to_num(nan=torch.inf).masked_fill(lost, torch.inf)
    worst = int(excess.argmax())
    unit = max(float(size[worst]), 1e-30)
    return Agreement(
        names[worst], float(difference[worst]) / unit, float(allowed[worst]) / unit, int((excess > 1).sum())
    )


def _squares(runnable: Runnable, gradients: Sequence[Tensor | None]) -> Tensor:
    """
    Return squared norms by parameter in the model's order, [parameters, 3] float64, summed over the world: of the
    difference between the current gradients and `gradients`, of `gradients`, and of the current gradients.

    Computed for one parameter at a time, so the extra memory is that of the largest parameter.
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
    """Return a copy of the gradient on the CPU."""
    return None if gradient is None else gradient.detach().to("cpu", copy=True)


@contextlib.contextmanager
def _eager(runnable: Runnable) -> Iterator[None]:
    """Switch compilation off."""
    for each in runnable.compiled:
        each.on = False
    try:
        yield
    finally:
        for each in runnable.compiled:
            each.on = True


@contextlib.contextmanager
def _without_dropout(runnable: Runnable) -> Iterator[None]:
    """Switch dropout off: compiled code draws other random numbers."""
    draws = any(part.shape.dropout > 0 for part in runnable.parts.values())
    runnable.train(not draws)
    try:
        yield
    finally:
        runnable.train()


@contextlib.contextmanager
def _after_backward(runnable: Runnable) -> Iterator[None]:
    """Reduce replicas' gradients after backward: reducing them during backward needs a gradient for every parameter."""
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
    Compute with different rounding: in float32, or with sums in another order if float32 is the run's dtype or not
    available (transformers' blocks hold weights in one dtype; ring attention's CUDA kernel lacks float32).

    FSDP2 rounds the weights it gathers to the run's dtype: float32 products then use these rounded weights.
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
    """Compute in float32. stage: whether the part is a pipeline stage, whose messages to the next stage keep their dtype."""
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
