"""The validation loss: loss on held-out documents."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.config.options import Config
from shoal.data.dataset import Dataset
from shoal.data.loader import Batch, evaluation_batches, evaluation_rows
from shoal.data.order.held_out import HeldOutQuarantine
from shoal.data.packing.pack import PlacedRows
from shoal.errors import DataError
from shoal.mesh.mesh import Mesh
from shoal.models.family import LanguageModel

BATCHES_AT_A_TIME = 4  # per pipeline stage: the pipeline fills and drains once for these

Losses = Callable[[Sequence[Batch]], torch.Tensor]  # batches -> loss summed over their valid tokens


@dataclass(frozen=True)
class HeldOut:
    """Losses on held-out text. val_source_loss: mean loss by source of a blend; None if there is no blend."""

    val_loss: float  # nats per token
    val_bits_per_byte: float
    val_source_loss: Mapping[str, float] | None = None
    val_skipped_rows: int | None = None  # rows that cannot be read; None if there are none


def evaluate(
    losses: Losses,
    mesh: Mesh,
    dataset: Dataset,
    config: Config,
    max_tokens: int | None,
    alive: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    quarantine: HeldOutQuarantine | None = None,
) -> HeldOut | None:
    """
    Return the losses on the first `max_tokens` held-out tokens (None: all); of a blend, on each source's share of them.

    The loss of a blend is the mean over all held-out tokens of its sources: each source counts by the size of its split.
    Bits per byte = nats per token * tokens per byte / ln 2, with the tokens per byte of the whole held-out text; of
    conversations, only learned tokens and their text count. None if none of the first `max_tokens` is learned.
    `alive()` is called before each group of batches, `progress(done, all)` after it; both numbers count
    this process's rows. quarantine: skips rows that cannot be read; None raises UnreadableError for them. Raises DataError if
    all rows are skipped, or more than `data.max_quarantined`. A collective over the world; identical on every rank.
    """
    parts = dataset.held_out_rows()
    tokens = {name: dataset.parts[name].counts["val"].learned_tokens for name in parts}
    limits = {
        name: None if max_tokens is None else max(1, max_tokens * tokens[name] // sum(tokens.values()))
        for name in parts
    }
    task = _Task(losses, mesh, config.train.micro_batch, parts, limits, alive, progress)
    sums = task.sums(quarantine)
    neighbors = mesh.world_size // mesh.dp_size  # ranks along pp, cp and tp read and count the same rows
    means = {name: loss / (count / neighbors) for name, (loss, count) in zip(parts, sums, strict=True) if count}
    if not means and max_tokens is None:
        raise DataError("no held-out row that can be read has a token to learn; prepare other held-out documents")
    if not means:
        return None
    learned = sum(tokens[name] for name in means)
    [loss, *others] = means.values()
    if others:
        loss = sum(mean * tokens[name] for name, mean in means.items()) / learned
    counts = dataset.counts["val"]
    bits = loss * counts.learned_tokens / counts.learned_bytes / math.log(2)
    skipped = quarantine.count(task.num_rows) if quarantine else 0
    return HeldOut(loss, bits, None if dataset.single else means, skipped or None)


@dataclass(frozen=True)
class _Task:
    """What an evaluation reads and computes on this rank. parts, limits: rows of each source, and the limit of tokens."""

    losses: Losses
    mesh: Mesh
    micro_batch: int
    parts: Mapping[str, PlacedRows]
    limits: Mapping[str, int | None]
    alive: Callable[[], None]
    progress: Callable[[int, int], None]

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each source that the evaluation reads, over all ranks."""
        return {name: evaluation_rows(rows, self.limits[name]) for name, rows in self.parts.items()}

    def sums(self, quarantine: HeldOutQuarantine | None) -> list[list[float]]:
        """
        Return the summed loss and the valid tokens of each source, over the world. A collective.

        Ranks that read the same row must all skip it. If some of them could read it, the sums are computed again.
        """
        while True:
            totals = torch.zeros(len(self.parts) + 1, 2, dtype=torch.float64, device=self.mesh.device)
            self._add(totals, quarantine)
            totals[-1] = quarantine.num_found if quarantine else 0
            *sums, (found, _) = self.mesh.sum(totals).tolist()
            if quarantine is None or not found:
                return sums
            told = [each for one in self.mesh.gather_objects(quarantine.take()) for each in one]
            if quarantine.settle(told, self.mesh.world_size // self.mesh.dp_size):
                return sums

    def _add(self, totals: torch.Tensor, quarantine: HeldOutQuarantine | None) -> None:
        """Add this rank's losses and valid tokens, by source."""
        mesh, before = self.mesh, 0
        shares = {name: math.ceil(count / mesh.dp_size) for name, count in self.num_rows.items()}
        for (name, rows), total in zip(self.parts.items(), totals, strict=False):
            read = functools.partial(quarantine.read, name, rows) if quarantine else None
            batches = evaluation_batches(
                rows, self.micro_batch, mesh.dp_rank, mesh.dp_size, self.limits[name], read=read
            )
            done = 0
            while turn := list(itertools.islice(batches, mesh.layout.pp * BATCHES_AT_A_TIME)):
                self.alive()
                total[0] += self.losses(turn)
                total[1] += sum(b.valid_tokens for b in turn)
                done = min(shares[name], done + sum(len(b.tokens) for b in turn))
                self.progress(before + done, sum(shares.values()))
            before += shares[name]


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
