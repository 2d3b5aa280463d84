"""A parallelized model and its part of an optimizer step: forward, backward and gradient reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Shard
from shoal.models.family import LanguageModel
from shoal.parallel import pipeline
from shoal.parallel.randomness import Randomness
from shoal.parallel.recompute import Compiled
from shoal.parallel.reduce import Gradients
from shoal.run.phases import Phases

# (part, hidden, labels, scale, buffer for each token's loss or None) -> 0-d
Loss = Callable[[LanguageModel, Tensor, Tensor, Tensor | float, Tensor | None], Tensor]


def own_loss(part: LanguageModel, hidden: Tensor, labels: Tensor, scale: Tensor | float, each: Tensor | None) -> Tensor:
    """Compute the loss of a part that holds the whole vocabulary."""
    return part.loss(hidden, labels, scale, each)


def uncut(batch: Batch) -> Batch:
    """Return the batch: without context parallel a rank has whole sequences."""
    return batch


@dataclass
class Runnable:
    """A model ready to train: its parts, this rank's shards, and one call that runs all micro-batches of a step."""

    parts: dict[int, LanguageModel]  # this rank's pipeline stages; {0: the model} without a pipeline
    shards: list[Shard]
    shapes: dict[str, torch.Size]  # of all parameters of the unsharded model
    gradients: dict[int, Gradients]  # by part
    mesh: Mesh
    slots: tuple[range, ...]  # a step's micro-batches, by data-parallel rank
    randomness: Randomness
    loss: Loss
    cut_batch: Callable[[Batch], Batch]
    bitwise: bool  # whether gradients and their norm are summed in the same order in every layout
    turns: int  # forwards per step on this rank; those beyond its slots run on ignored labels
    compiled: list[Compiled]
    pipeline: pipeline.Pipeline | None = None
    tied: bool = False  # in a pipeline: whether the last stage's head shares the first stage's embedding
    scale: Tensor | float = 1.0  # factor of the loss in the current step
    num_sources: int = 1  # of a blend
    source_losses: Tensor | None = None
    """[num_sources], each source's share of the last step's mean loss on this rank, to be summed over the world. None without a
    blend."""
    _token_losses: list[Tensor] | None = None  # [B, T] of each micro-batch in order, while a blend's step runs

    def forward_backward(
        self, batches: Sequence[Batch], step: int, phases: Phases, loss_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """
        Compute the gradients of loss_scale * the mean loss over the step's valid tokens; set each shard's `tensor.grad`.

        Return each slot's share of that mean, [slots * cp], and the step's number of valid tokens, 0-d. A share is 0
        on all ranks but one, so that summing over the world is exact. Collectives over all axes.
        """
        mesh, mine = self.mesh, self.slots[self.mesh.dp_rank]
        # The global count is known before backward: the losses of micro-batches and ranks then only add up, and neither
        # padding nor layout changes the mean.
        tokens = self._count(batches)
        self.scale = loss_scale / tokens.clamp(min=1.0)
        losses = torch.zeros(self.slots[-1].stop, mesh.layout.cp, device=mesh.device)
        self._token_losses = [] if self.num_sources > 1 else None
        self.forget_gradients()
        self.randomness.begin(step, mine.start)
        padded = [*batches, *(batches[-1].ignored() for _ in range(self.turns - len(batches)))]
        found = self._pipelined(padded, phases) if self.pipeline else self._in_turns(padded, phases)
        for slot, loss in zip(mine, found, strict=False):
            losses[slot, mesh.axis("cp").rank] = loss
        self.source_losses = self._by_source(padded, loss_scale)
        with phases("reduce"):
            for gradients in self.gradients.values():
                gradients.finish()
            self._publish()
        return losses.flatten() / loss_scale, tokens

    def forget_gradients(self) -> None:
        """Free or zero the gradients of the last step."""
        for gradients in self.gradients.values():
            gradients.zero()
        for held in self.shards:  # the plain tensor of an FSDP2 shard refers to its gradient too
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
        return losses if self.mesh.axis("tp").rank == 0 else []  # all tp ranks have the same loss: one reports it

    def _pipelined(self, batches: Sequence[Batch], phases: Phases) -> list[Tensor]:
        assert self.pipeline is not None
        with phases("forward"):  # and backward: the schedule interleaves them
            losses = self.pipeline.forward_backward([self.cut_batch(b.to(self.mesh.device)) for b in batches])
        return losses if losses is not None and self.mesh.axis("tp").rank == 0 else []

    def _loss_of(self, model: LanguageModel, batch: Batch) -> Tensor:
        batch = self.cut_batch(batch.to(self.mesh.device))
        hidden = model(batch.tokens, batch.positions, batch.document_ids)
        return self.loss_of(model, hidden, batch.labels)

    def loss_of(self, part: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of the next micro-batch, 0-d; in a blend, keep each token's loss."""
        each = None
        if self._token_losses is not None:
            each = torch.empty(labels.shape, device=labels.device)
            self._token_losses.append(each)
        return self.loss(part, hidden, labels, self.scale, each)

    def _by_source(self, batches: Sequence[Batch], loss_scale: Tensor | float) -> Tensor | None:
        """Sum the kept losses by the source of their rows. Only one rank along `tp` and `pp` reports them."""
        each, self._token_losses = self._token_losses, None
        if each is None:
            return None
        found = torch.zeros(self.num_sources, device=self.mesh.device)
        for losses, batch in zip(each, batches, strict=False):
            if batch.sources is not None and self.mesh.axis("tp").rank == 0:
                found.index_add_(0, batch.sources.to(self.mesh.device, non_blocking=True), losses.sum(-1))
        return found / loss_scale

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """
        Return the loss summed over the valid tokens of these batches, 0-d float64.

        It is 0 on all but one of the ranks along tp and pp. Every rank must pass equally many batches. Collectives over pp,
        cp and tp and, with FSDP2, dp_shard.
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
        """Switch dropout on or off."""
        for part in self.parts.values():
            part.train(on)

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Return the step's valid tokens, on every rank. `pp`, `cp` and `tp` neighbors have equal batches: one of them counts."""
        own = float(sum(b.valid_tokens for b in batches)) if self.mesh.first_of_batch else 0.0
        # filled on the device: copying a number to the device would wait for it
        return self.mesh.sum(torch.full((), own, device=self.mesh.device))

    def _publish(self) -> None:
        """Complete each shard's gradient and set it where the optimizer reads it, as a plain tensor."""
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
    Sum over `tp` the gradients of parameters that tensor parallel replicates, in place. A collective over `tp`.

    Each rank has computed them from its part of the sequence (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
    """
    axis = mesh.axis("tp")
    if axis.size == 1:
        return
    grads = [s.tensor.grad for s in shards if s.summed_over_tp and s.tensor.grad is not None]
    if not grads:
        return
    flat = axis.sum(torch.cat([g.flatten() for g in grads]))  # one collective for all: norms and biases are small
    for grad, total in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
