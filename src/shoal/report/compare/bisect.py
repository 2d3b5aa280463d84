"""
`shoal compare --bisect`: the first step and the first tensor in which two bitwise runs differ, by replay from checkpoints.

Both runs are repeated, as one process, from the last checkpoint that they share. Each repeated step is compared, bit by bit,
with the other run's repetition, with what both runs recorded, and with the checkpoints that both saved:

- If the repetitions part, their configs cause it, and all tensors are at hand: forward, backward, update.
- If they agree, what parted the runs is not in their configs: the code, the machine, or a fault. The records say which run this
  machine repeats; the first checkpoint that the repetition does not give says which tensors are wrong in the other run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from shoal.checkpoint.restore import whole_tensors
from shoal.checkpoint.saved import Saved, listed
from shoal.config.options import Config
from shoal.errors import RunError
from shoal.report.compare.replay import Replay, Step
from shoal.report.compare.series import Parting, Series, first_parting

SHOWN: Final = 5  # names of tensors in a sentence
# Sections that do not change the arithmetic of a bitwise run
AROUND: Final = ("parallel", "checkpoint", "metrics", "launch")


@dataclass(frozen=True)
class TensorApart:
    """
    A tensor that differs: of `what` kind ("activation", "gradient", "parameter", "moment"), where, and by how much at most.

    elements: how many differ. largest: the largest absolute difference; a and b are the two values there.
    """

    what: str
    name: str
    elements: int
    of: int
    largest: float
    a: float
    b: float


@dataclass
class Bisection:
    """
    The result of a bisection. sides: names of the two sides, such as two runs, or a run and its repetition.

    step: the step in which they part; after: where the last equal checkpoint is. tensors: those that differ, in the order of
    computation. said: the story in sentences.
    """

    recorded: Parting
    after: int = 0
    step: int | None = None
    sides: tuple[str, str] = ("", "")
    tensors: Sequence[TensorApart] = ()
    said: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        return dataclasses.asdict(self)


def bisect(a: Series, b: Series, say: Callable[[str], None] = lambda text: None) -> Bisection:
    """
    Find where two bitwise runs part. say: gets a line of progress. Needs memory for both models and one step's activations.

    Raises `RunError` if a run is not bitwise, or if the runs do not share their beginning.
    """
    found = Bisection(first_parting(a, b))
    if found.recorded.step is None:
        found.said.append(f"all {found.recorded.compared:,} recorded losses and gradient norms are equal, bit by bit")
        return found
    configs = [_config(each) for each in (a, b)]
    runs = [
        _Side(each.facts.name, each, config, _checkpoints(each)) for each, config in zip((a, b), configs, strict=True)
    ]
    base, found.after = _shared(runs, found.recorded.step)
    say(f"repeating both runs from {f'their checkpoint of step {found.after}' if found.after else 'their beginning'}")
    replays = [Replay(runs[0].config, a.facts.folder, base[0])]
    if _arithmetic(configs[0]) != _arithmetic(configs[1]):
        replays.append(Replay(runs[1].config, b.facts.folder, base[1]))
    try:
        _follow(runs, replays, found, say)
    finally:
        for replay in replays:
            replay.close()
    return found


@dataclass(frozen=True)
class _Side:
    """A run that is bisected: its name, curves, config and checkpoints by step."""

    name: str
    series: Series
    config: Config
    checkpoints: Mapping[int, Saved]

    def recorded(self, step: int) -> tuple[float, float] | None:
        """Return loss and gradient norm in the record of `step`; None if it was not recorded."""
        at = (self.series.steps == step).nonzero()[0]
        return (float(self.series.loss[at[0]]), float(self.series.grad_norm[at[0]])) if len(at) else None


def _config(run: Series) -> Config:
    config = run.facts.folder.load_config()
    if config.train.repro != "bitwise":
        raise RunError(
            f"{run.facts.name} was trained with train.repro {config.train.repro}: --bisect needs runs with train.repro bitwise, "
            "whose steps can be repeated exactly"
        )
    return config


def _arithmetic(config: Config) -> Config:
    """Return the config with everything that does not change a bitwise run's numbers at its default."""
    plain = {name: type(getattr(config, name))() for name in AROUND}
    return dataclasses.replace(config, **plain)


def _checkpoints(run: Series) -> dict[int, Saved]:
    return {saved.step: saved for saved in listed(run.facts.folder.checkpoints)}


def _shared(runs: Sequence[_Side], parting: int) -> tuple[tuple[Saved | None, Saved | None], int]:
    """Return both runs' checkpoints of the last step at which they are equal, before step `parting`; none for the beginning."""
    a, b = (side.checkpoints for side in runs)
    for step in sorted(a.keys() & b.keys(), reverse=True):
        if step < parting and _same_files(a[step], b[step]):
            return (a[step], b[step]), step
    return (None, None), 0


def _same_files(a: Saved, b: Saved) -> bool:
    """Return whether two checkpoints hold the same tensors, bit by bit, however they are sharded."""
    x, y = whole_tensors(a), whole_tensors(b)
    return x.keys() == y.keys() and all(_equal(x[name], y[name]) for name in x)


def _follow(runs: Sequence[_Side], replays: Sequence[Replay], found: Bisection, say: Callable[[str], None]) -> None:
    """Repeat steps until a difference is found in tensors, or no later checkpoint is left that could show one."""
    last = max((step for side in runs for step in side.checkpoints), default=0)
    last = max(last, found.recorded.step or 0)
    while replays[0].step < min(last, replays[0].total_steps):
        steps = [replay.take_step() for replay in replays]
        if len(steps) == 2 and _replays_part(runs, replays, steps, found):
            return
        _check_records(runs, steps[0], found)
        if _checkpoint_parts(runs, replays[0], found):
            return
        say(f"step {replays[0].step} repeated")
    if not found.tensors:
        found.said.append(
            "no later checkpoint is left to compare the repetition with, so no tensor can be named; a smaller "
            "checkpoint.every, with checkpoint.keep_every, leaves more"
        )


def _replays_part(runs: Sequence[_Side], replays: Sequence[Replay], steps: Sequence[Step], found: Bisection) -> bool:
    """Compare the repetitions of both runs; return whether they part in this step."""
    tensors = list(_step_apart(*steps)) or list(_tensors_apart(*(replay.tensors() for replay in replays)))
    if not tensors:
        return False
    found.step, found.sides, found.tensors = steps[0].step, (runs[0].name, runs[1].name), tensors
    found.said.append(f"repeated with their own configs, the runs part in step {found.step}: {_first(tensors)}")
    return True


def _check_records(runs: Sequence[_Side], step: Step, found: Bisection) -> None:
    """Say once which run the repetition does not give: the first record that differs from it."""
    if found.step is not None:
        return
    wrong = [side for side in runs if (said := side.recorded(step.step)) and said != (step.loss, step.grad_norm)]
    if not wrong:
        return
    found.step = step.step
    right = [side.name for side in runs if side not in wrong]
    if right:
        found.sides = ("the repetition", wrong[0].name)
        found.said.append(
            f"repeated on this machine, step {step.step} gives the loss and gradient norm of {right[0]} and not those of "
            f"{wrong[0].name}: what parted them is not in the config, but the code, the machine or a fault of {wrong[0].name}"
        )
    else:
        found.said.append(
            f"this machine gives the numbers of neither run in step {step.step}: it computes with other bits, because of the "
            "code, the versions or the processor"
        )


def _checkpoint_parts(runs: Sequence[_Side], replay: Replay, found: Bisection) -> bool:
    """Compare the repetition with the checkpoints of this step; return whether one differs."""
    for side in runs:
        saved = side.checkpoints.get(replay.step)
        if saved is None:
            continue
        tensors = list(_tensors_apart(replay.tensors(), whole_tensors(saved)))
        if tensors:
            _name(side, replay.step, tensors, found)
            return True
    return False


def _name(side: _Side, step: int, tensors: Sequence[TensorApart], found: Bisection) -> None:
    """Say which tensors of a checkpoint differ from the repetition."""
    found.tensors, found.sides = tensors, ("the repetition", side.name)
    worst = max(tensors, key=lambda t: t.largest if t.what == "parameter" else -1.0)
    where = f"the checkpoint of step {step} of {side.name}"
    if found.step is None:
        found.step = step
        found.said.append(
            f"up to step {step}, the repetition gives the losses and gradient norms of both runs: the difference came after the "
            "gradient of a step, where only a checkpoint shows it"
        )
    if len(tensors) == 1:
        found.said.append(f"{where} differs from the repetition in one tensor: {_describe(tensors[0])}")
        return
    found.said.append(
        f"{where} differs from the repetition in {len(tensors)} tensors; the first is {_describe(tensors[0])}"
    )
    found.said.append(f"the largest difference of a parameter is in {_describe(worst)}")


def _step_apart(a: Step, b: Step) -> Iterator[TensorApart]:
    """Yield the tensors of a step that differ, in the order of computation: activations, the loss, gradients."""
    yield from _apart("activation", a.activations, b.activations)
    if a.loss != b.loss:
        yield TensorApart("loss", "loss", 1, 1, abs(a.loss - b.loss), a.loss, b.loss)
    yield from _apart("gradient", a.gradients, b.gradients)


def _tensors_apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[TensorApart]:
    """Yield the tensors of two states that differ. The optimizer's moments come first: they hold the gradient of the last step."""
    for what, prefix in (("moment", "optim."), ("parameter", "model.")):
        yield from _apart(
            what, *({n.removeprefix("model."): t for n, t in each.items() if n.startswith(prefix)} for each in (a, b))
        )


def _apart(what: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[TensorApart]:
    for name in a:
        x, y = a[name].cpu(), b[name].cpu()
        if not _equal(x, y):
            differs = (x != y) & ~(x.isnan() & y.isnan())
            gap = (x.double() - y.double()).abs().nan_to_num(nan=float("inf")) * differs
            at = int(gap.nan_to_num(nan=0.0).argmax())
            values = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
            yield TensorApart(what, name, int(differs.sum()), x.numel(), float(gap.reshape(-1)[at]), *values)


def _equal(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())


def _first(tensors: Sequence[TensorApart]) -> str:
    return f"the first tensor that differs is {_describe(tensors[0])}"


def _describe(each: TensorApart) -> str:
    share = (
        f"{each.elements:,} of {each.of:,} elements, by at most {each.largest:.3g} ({each.a:.9g} against {each.b:.9g})"
    )
    return f"the {each.what} {each.name}: {share}"
