"""The validation loss: loss on held-out documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from shoal.config.options import Config
from shoal.data.loader import Batch, evaluation_batches, evaluation_rows
from shoal.data.prepare import Prepared
from shoal.mesh.mesh import Mesh
from shoal.models.family import LanguageModel

BATCHES_AT_A_TIME = 4  # per pipeline stage: the pipeline fills and drains once for these

Losses = Callable[[Sequence[Batch]], torch.Tensor]  # batches -> loss summed over their valid tokens


def evaluate(
    losses: Losses,
    mesh: Mesh,
    prepared: Prepared,
    config: Config,
    max_tokens: int | None,
    alive: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """
    Return mean loss (nats per token) and bits per byte over the first `max_tokens` held-out tokens (None: all).

    Bits per byte = nats per token * tokens per byte / ln 2, with the tokens per byte of the whole held-out text; of conversations,
    only learned tokens and their text count.
    `alive()` is called before each group of batches, `progress(done, all)` after it; both numbers count
    this process's rows. A collective over the world; identical on every rank.
    """
    rows = prepared.split("val", seq_len=config.data.seq_len, document_mask=config.data.document_mask)
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    batches = evaluation_batches(rows, config.train.micro_batch, mesh.dp_rank, mesh.dp_size, max_tokens)
    done, share = 0, math.ceil(evaluation_rows(rows, max_tokens) / mesh.dp_size)
    while turn := list(itertools.islice(batches, mesh.layout.pp * BATCHES_AT_A_TIME)):
        alive()
        totals[0] += losses(turn)
        totals[1] += sum(b.valid_tokens for b in turn)
        done = min(share, done + sum(len(b.tokens) for b in turn))
        progress(done, share)
    neighbors = mesh.world_size // mesh.dp_size  # ranks along pp, cp and tp count the same tokens
    loss_sum, tokens = mesh.sum(totals).tolist()
    loss = loss_sum / max(tokens / neighbors, 1.0)
    counts = prepared.counts["val"]
    return {"val_loss": loss, "val_bits_per_byte": loss * counts.learned_tokens / counts.learned_bytes / math.log(2)}


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
