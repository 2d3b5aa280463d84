"""
Repeats steps of a bitwise run from a checkpoint, as one process, and keeps every tensor of a step.

A run with `train.repro: bitwise` has the same bits in every layout, so one process repeats what many computed. The run's folder
is only read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.checkpoint.restore import load
from shoal.checkpoint.saved import Saved
from shoal.config.options import Config, Parallel
from shoal.data.dataset import open_data
from shoal.errors import RunError
from shoal.mesh.mesh import Mesh, choose_device
from shoal.mesh.place import Place
from shoal.optim.schedule import learning_rate
from shoal.parallel.runnable import Runnable
from shoal.plan.length import count_steps
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.phases import Phases
from shoal.training.assemble import assemble, open_loader
from shoal.training.finish_config import finish_config
from shoal.training.guard import Guard
from shoal.training.run import continue_order
from shoal.training.run_files import tokens_of
from shoal.training.step import Result, train_step


@dataclass
class Step:
    """
    One repeated step: its loss and gradient norm, and its tensors on the CPU, in the order in which they were computed.

    activations: output of each module by "name, call". gradients: by parameter, before clipping, last layer first.
    """

    step: int
    loss: float = 0.0
    grad_norm: float = 0.0
    activations: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class _AtOptimizer:
    """Calls a function when the phase "optimizer" begins: gradients are then summed, and not yet clipped."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self._keep = keep

    def enter(self, phase: str) -> None:
        """Call the function if the phase is "optimizer"."""
        if phase == "optimizer":
            self._keep()

    def leave(self, phase: str) -> None:
        """Do nothing."""


class Replay:
    """A run, repeated from `saved` on, or from its beginning. `tensors` are live: model and optimizer after the last step."""

    def __init__(self, config: Config, folder: RunFolder, saved: Saved | None) -> None:
        """Open data and model, and load the checkpoint. Raises `RunError`, `DataError` or `CheckpointError`."""
        if config.train.repro != "bitwise":
            raise RunError(
                f"{folder.path} has train.repro {config.train.repro}: only bitwise runs can be repeated exactly"
            )
        torch.set_num_threads(1)
        self.mesh = Mesh(Place(), choose_device(config.train.device, Place()))
        dataset = open_data(config.data, Console(speaks=False), past=tokens_of(folder))
        config = dataclasses.replace(config, parallel=Parallel())
        self.config = finish_config(config, folder, dataset, self.mesh)
        rows = dataset.rows("train")
        self.total_steps = count_steps(config.train, config.data.seq_len, len(rows))
        self.runnable, self.state = assemble(self.config, self.mesh, lambda text: None, fresh=saved is None)
        if saved is not None:
            self.state.load_scalars(load(saved, self.state.tensors()))
        order = continue_order(self.config, rows, self.state)
        self._guard = Guard(self.mesh.device, config.fault.spike_zscore)
        self._guard.losses.extend(self.state.losses)
        self._loader = open_loader(
            self.config, self.mesh, rows, self.state.position, self.state.passed_over, order=order,
            quarantined=self.state.quarantined,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """The last step taken."""
        return self.state.step

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's and the optimizer's tensors by name; they change with the next step."""
        return {name: part.tensor for name, part in self.state.tensors().items()}

    def take_step(self) -> Step:
        """Take the next step, and return everything it computed."""
        number = self.state.step + 1
        kept = Step(number)
        phases = Phases([_AtOptimizer(lambda: kept.gradients.update(_gradients(self.runnable)))])
        self._guard.prepare(number)
        handles = list(_keep_outputs(self.runnable.parts[0], kept.activations))
        try:
            stats = train_step(
                self.runnable, self.state, self._loader.next_step(), step=number,
                lr=learning_rate(self.config.optim, number, self.total_steps), clip_norm=self.config.optim.clip_norm,
                guard=self._guard, phases=phases,
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        self._count(number, stats.read(), kept)
        return kept

    def _count(self, number: int, result: Result, kept: Step) -> None:
        """Advance the state, as the training loop does."""
        self.state.step, self.state.position = number, self._loader.position
        kept.loss, kept.grad_norm = result.loss_sum / max(result.tokens, 1.0), result.norm
        self.state.tokens += int(result.tokens)
        if not result.skipped:
            self._guard.learn(number, kept.loss)

    def close(self) -> None:
        """Stop reading data."""
        self._loader.close()


def _gradients(runnable: Runnable) -> Mapping[str, Tensor]:
    """Return copies of the gradients by parameter, those of the last layer first, as backward computes them."""
    shards = [s for s in reversed(runnable.shards) if s.tensor.grad is not None]
    return {s.name: s.tensor.grad.detach().cpu().clone() for s in shards if s.tensor.grad is not None}


def _keep_outputs(model: nn.Module, kept: dict[str, Tensor]) -> Iterator[Any]:
    """Keep the output of every call of every module in `kept`; yield the handles that end this."""
    for name, module in model.named_modules():
        if name:
            yield module.register_forward_hook(_keep_under(name, kept))


def _keep_under(name: str, kept: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    calls = 0

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            kept[f"{name}, micro-batch {calls}"] = first.detach().cpu().clone()

    return keep
