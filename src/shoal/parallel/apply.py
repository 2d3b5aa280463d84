"""
The one place that says in which order a model is made parallel, and what comes of it: a `Runnable`.

    checkpointing -> compile -> materialise and initialise -> reduce

The model stays single-device code with its own names; everything here is done to it from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.data.loader import Batch
from shoal.metrics.meter import Phases
from shoal.models.build import initialize
from shoal.models.family import LanguageModel
from shoal.models.loss import linear_cross_entropy_sum
from shoal.parallel.mesh import Mesh
from shoal.parallel.reduce import GradientReducer


@dataclass(frozen=True)
class Runnable:
    """A model ready to train: its parts, its gradients' owner, and one callable for a whole step's batches."""

    model: LanguageModel
    reducer: GradientReducer
    mesh: Mesh
    seed: int

    def forward_backward(
        self, batches: Sequence[Batch], step: int, phases: Phases
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Gradients of the mean loss over the step's valid tokens, on every rank the same.

        Returns the loss, summed over the global batch, and its number of valid tokens, both 0-d on the
        device. A collective over `dp_replicate`.
        """
        device = self.mesh.device
        tokens = self.mesh.sum(torch.tensor(float(sum(b.valid_tokens for b in batches)), device=device))
        scale = 1.0 / tokens.clamp(min=1.0)
        loss_sum = torch.zeros((), device=device)
        self.reducer.zero()
        for slot, batch in enumerate(batches):
            if slot == len(batches) - 1:
                self.reducer.arm()
            seed_dropout(self.seed, step, self.mesh.dp_rank * len(batches) + slot)
            with phases("forward"):
                batch = batch.to(device)
                hidden = self.model(batch.tokens, batch.positions, batch.document_ids)
                loss = linear_cross_entropy_sum(hidden, self.model.head_weight(), batch.labels, scale)
            with phases("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        with phases("reduce"):
            self.reducer.finish()
        return loss_sum * tokens, tokens


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    *,
    seed: int,
    activation_checkpointing: str,
    compile: bool,
    say: Callable[[str], None],
) -> Runnable:
    """Make `model` (on meta) a `Runnable` on `mesh`; `say` gets one line for each thing applied."""
    if activation_checkpointing == "full":
        for block in model.blocks.values():
            _checkpoint(block)
        say("activation checkpointing: each block is computed again in backward")
    if compile:
        for block in model.blocks.values():
            block.compile(fullgraph=True)
        say("compile: each block")
    initialize(model, seed=seed, device=mesh.device)
    reducer = GradientReducer(model.parameters(), mesh)
    if mesh.dp_size > 1:
        buckets = len(reducer.flat_gradients())
        say(
            f"data parallel: {mesh.dp_size} replicas, gradients summed in {buckets} bucket{'s' * (buckets > 1)} during backward"
        )
    return Runnable(model, reducer, mesh, seed)


def _checkpoint(block: nn.Module) -> None:
    """Wrap `block.forward` in place, so that names stay; nothing changes without gradients."""
    forward = block.forward

    def recomputed(*args: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    block.forward = recomputed


def seed_dropout(seed: int, step: int, slot: int) -> None:
    """Randomness is a function of (seed, step, slot): nothing of it is in a checkpoint."""
    digest = hashlib.blake2b(f"{seed} {step} {slot}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)
