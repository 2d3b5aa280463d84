"""The loss on held-out documents."""

from __future__ import annotations

import math

import torch

from shoal.config import Config
from shoal.data.loader import Batch, evaluation_batches
from shoal.data.prepare import Prepared
from shoal.models.family import LanguageModel
from shoal.models.loss import linear_cross_entropy_sum
from shoal.parallel.mesh import Mesh


@torch.no_grad()
def evaluate(
    model: LanguageModel, mesh: Mesh, prepared: Prepared, config: Config, max_tokens: int | None
) -> dict[str, float]:
    """
    Mean loss (nats per token) and bits per byte of text over the first `max_tokens` held-out tokens (None: all).

    Bits per byte = nats per token x tokens per byte / ln 2, with the tokens per byte of the whole held-out
    text. A collective over `dp_replicate`; the same on every rank.
    """
    rows = prepared.split("val", seq_len=config.data.seq_len, document_mask=config.data.document_mask)
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    model.eval()
    for batch in evaluation_batches(rows, config.train.micro_batch, mesh.dp_rank, mesh.dp_size, max_tokens):
        totals[0] += batch_loss(model, batch.to(mesh.device))
        totals[1] += batch.valid_tokens
    model.train()
    loss_sum, tokens = mesh.sum(totals).tolist()
    loss = loss_sum / max(tokens, 1.0)
    counts = prepared.counts["val"]
    return {"val_loss": loss, "val_bits_per_byte": loss * counts.tokens / counts.text_bytes / math.log(2)}


def batch_loss(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """The loss of one batch, summed over its valid tokens; 0-d on the device."""
    hidden = model(batch.tokens, batch.positions, batch.document_ids)
    one = torch.ones((), device=hidden.device)
    return linear_cross_entropy_sum(hidden, model.head_weight(), batch.labels, one)
