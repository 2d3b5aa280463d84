"""A model that is made parallel, and what one step does with it: forward, backward and the gradients' sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Shard
from shoal.metrics.meter import Phases
from shoal.models.family import LanguageModel
from shoal.parallel import pipeline
from shoal.parallel.randomness import Randomness
from shoal.parallel.recompute import Compiled
from shoal.parallel.reduce import Gradients

Loss = Callable[[LanguageModel, Tensor, Tensor, Tensor | float], Tensor]  # (part, hidden, labels, scale) -> 0-d


@dataclass
class Runnable:
    """A model ready to train: its parts, what this process holds of it, and one callable for a whole step's batches."""

    parts: dict[int, LanguageModel]  # this process's pipeline stages; {0: the model} without a pipeline
    shards: list[Shard]
    shapes: dict[str, torch.Size]  # of every parameter of the whole model
    gradients: dict[int, Gradients]  # of each part
    mesh: Mesh
    slots: tuple[range, ...]  # of a step, by data-parallel rank
    randomness: Randomness
    loss: Loss
    cut_batch: Callable[[Batch], Batch]
    bitwise: bool  # sums are taken in one order, whatever the layout
    turns: int  # forwards that every process of a step takes, some perhaps of nothing that counts
    compiled: list[Compiled]
    pipeline: pipeline.Pipeline | None = None
    tied: bool = False  # over a pipeline: the last stage's head is the first one's embedding
    scale: Tensor | float = 1.0  # of the loss, in the step that runs

    def forward_backward(
        self, batches: Sequence[Batch], step: int, phases: Phases, loss_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """
        Gradients of the mean loss over the step's valid tokens (times `loss_scale`), in each shard's `tensor.grad`.

        Returns what each slot added to that mean, [slots * cp], zero where another process has it, so that the sum
        over the world is exact; and the step's number of valid tokens, 0-d. Collectives over all axes.
        """
        mesh, mine = self.mesh, self.slots[self.mesh.dp_rank]
        tokens = self._count(batches)
        self.scale = loss_scale / tokens.clamp(min=1.0)
        losses = torch.zeros(self.slots[-1].stop, mesh.layout.cp, device=mesh.device)
        self.forget_gradients()
        self.randomness.begin(step, mine.start)
        padded = [*batches, *(batches[-1].ignored() for _ in range(self.turns - len(batches)))]
        found = self._pipelined(padded, phases) if self.pipeline else self._in_turns(padded, phases)
        for slot, loss in zip(mine, found, strict=False):
            losses[slot, mesh.axis("cp").rank] = loss
        with phases("reduce"):
            for gradients in self.gradients.values():
                gradients.finish()
            self._publish()
        return losses.flatten() / loss_scale, tokens

    def forget_gradients(self) -> None:
        """Free or zero those of the last step. A shard's plain tensor refers to them too."""
        for gradients in self.gradients.values():
            gradients.zero()
        for held in self.shards:
            if held.tensor is not held.parameter:
                held.tensor.grad = None

    def _in_turns(self, batches: Sequence[Batch], phases: Phases) -> list[Tensor]:
        [model], [gradients] = self.parts.values(), self.gradients.values()
        mine = self.slots[self.mesh.dp_rank]
        losses = []
        for turn, batch in enumerate(batches):
            slot = mine[turn] if turn < len(mine) else None
            gradients.before_backward(slot, turn == len(batches) - 1)
            with phases("forward"):
                loss = self._loss_of(model, batch)
            with phases("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.after_backward(slot)
            losses.append(loss.detach())
        return losses if self.mesh.axis("tp").rank == 0 else []

    def _pipelined(self, batches: Sequence[Batch], phases: Phases) -> list[Tensor]:
        assert self.pipeline is not None
        with phases("forward"):  # and backward: they take turns
            losses = self.pipeline.forward_backward([self.cut_batch(b.to(self.mesh.device)) for b in batches])
        return losses if losses is not None and self.mesh.axis("tp").rank == 0 else []

    def _loss_of(self, model: LanguageModel, batch: Batch) -> Tensor:
        batch = self.cut_batch(batch.to(self.mesh.device))
        hidden = model(batch.tokens, batch.positions, batch.document_ids)
        return self.loss(model, hidden, batch.labels, self.scale)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """
        The loss summed over the valid tokens of these batches, 0-d float64; zero where another process has it.

        Every process must bring equally many. Collectives over all axes but those of data parallel.
        """
        self.scale = 1.0
        if self.pipeline is not None:
            losses = self.pipeline.evaluate([self.cut_batch(b.to(self.mesh.device)) for b in batches]) or []
        else:
            losses = [self._loss_of(self.parts[0], batch) for batch in batches]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.axis("tp").rank == 0:
            for loss in losses:
                total += loss
        return total

    def train(self, on: bool = True) -> None:
        """Dropout on or off."""
        for part in self.parts.values():
            part.train(on)

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Valid tokens of the step, on every process. Neighbours along pp, cp and tp have the same batches."""
        places = self.mesh.coordinates
        counts = places["pp"] == places["cp"] == places["tp"] == 0
        own = float(sum(b.valid_tokens for b in batches)) if counts else 0.0
        return self.mesh.sum(
            torch.full((), own, device=self.mesh.device)
        )  # filled there: a copy would wait for the device

    def _publish(self) -> None:
        """Each shard's gradient as the optimizer takes it: plain, and whole sums."""
        with torch.no_grad():
            for held in self.shards:
                if held.tensor is not held.parameter:
                    grad = held.parameter.grad
                    held.tensor.grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]
            sum_replicated(self.shards, self.mesh)
            if self.pipeline is not None and self.tied:
                grads = {s.twin: s.tensor.grad for s in self.shards if s.name == "embed.weight"}
                pipeline.sum_tied(grads.get(False), grads.get(True), self.mesh.axis("pp"))


def sum_replicated(shards: Sequence[Shard], mesh: Mesh) -> None:
    """
    What tensor parallel leaves whole has a part of its gradient on each process (its part of the sequence).

    A collective over `tp`.
    """
    axis = mesh.axis("tp")
    if axis.size == 1:
        return
    grads = [s.tensor.grad for s in shards if s.summed_over_tp and s.tensor.grad is not None]
    if not grads:
        return
    flat = axis.sum(torch.cat([g.flatten() for g in grads]))
    for grad, total in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
