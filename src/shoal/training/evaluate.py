"""The validation loss: loss on held-out documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.config.options import Config
from shoal.data.dataset import Dataset
from shoal.data.loader import Batch, evaluation_batches, evaluation_rows
from shoal.mesh.mesh import Mesh
from shoal.models.family import LanguageModel

BATCHES_AT_A_TIME = 4  # per pipeline stage: the pipeline fills and drains once for these

Losses = Callable[[Sequence[Batch]], torch.Tensor]  # batches -> loss summed over their valid tokens


@dataclass(frozen=True)
class HeldOut:
    """Losses on held-out text. sources: mean loss by source of a blend; None if there is no blend."""

    val_loss: float  # nats per token
    val_bits_per_byte: float
    val_source_loss: Mapping[str, float] | None = None


def evaluate(
    losses: Losses,
    mesh: Mesh,
    dataset: Dataset,
    config: Config,
    max_tokens: int | None,
    alive: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:
    """
    Return the losses on the first `max_tokens` held-out tokens (None: all); of a blend, on each source's share of them.

    The loss of a blend is the mean over all held-out tokens of its sources: each source counts by the size of its split.
    Bits per byte = nats per token * tokens per byte / ln 2, with the tokens per byte of the whole held-out text; of
    conversations, only learned tokens and their text count.
    `alive()` is called before each group of batches, `progress(done, all)` after it; both numbers count
    this process's rows. A collective over the world; identical on every rank.
    """
    parts = dataset.held_out_rows()
    tokens = {name: dataset.parts[name].counts["val"].learned_tokens for name in parts}
    limits = {
        name: None if max_tokens is None else max(1, max_tokens * tokens[name] // sum(tokens.values()))
        for name in parts
    }
    shares = {name: math.ceil(evaluation_rows(rows, limits[name]) / mesh.dp_size) for name, rows in parts.items()}
    totals = torch.zeros(len(parts), 2, dtype=torch.float64, device=mesh.device)
    before = 0
    for (name, rows), total in zip(parts.items(), totals, strict=True):
        batches = evaluation_batches(rows, config.train.micro_batch, mesh.dp_rank, mesh.dp_size, limits[name])
        done = 0
        while turn := list(itertools.islice(batches, mesh.layout.pp * BATCHES_AT_A_TIME)):
            alive()
            total[0] += losses(turn)
            total[1] += sum(b.valid_tokens for b in turn)
            done = min(shares[name], done + sum(len(b.tokens) for b in turn))
            progress(before + done, sum(shares.values()))
        before += shares[name]
    neighbors = mesh.world_size // mesh.dp_size  # ranks along pp, cp and tp count the same tokens
    means = [loss_sum / max(count / neighbors, 1.0) for loss_sum, count in mesh.sum(totals).tolist()]
    by_source = dict(zip(parts, means, strict=True))
    loss = sum(by_source[name] * tokens[name] for name in parts) / sum(tokens.values()) if len(parts) > 1 else means[0]
    counts = dataset.counts["val"]
    bits = loss * counts.learned_tokens / counts.learned_bytes / math.log(2)
    return HeldOut(loss, bits, None if dataset.single else by_source)


def model_losses(model: LanguageModel, device: torch.device) -> Losses:
    """Return the loss function of a whole model on one device."""

    @torch.no_grad()
    def losses(batches: Sequence[Batch]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            batch = batch.to(device)
            hidden = model(batch.tokens, batch.positions, batch.document_ids)
            total += model.loss(hidden, batch.labels)
        return total

    return losses
