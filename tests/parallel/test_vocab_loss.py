"""The vocabulary-parallel loss, with uneven shards and in chunks, against torch's cross-entropy in float64."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region
from shoal.parallel.vocab_loss import vocab_parallel_cross_entropy_sum
from tests.world import World, laid_out

VOCAB, DIM, SEQ = 257, 8, 24


def loss_and_gradients(mesh: Mesh, chunk_bytes: int) -> None:
    axis = laid_out(mesh, dp_replicate=1, tp=mesh.world_size).axis("tp")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, SEQ, DIM, generator=generator), torch.randn(VOCAB, DIM, generator=generator)
    labels = torch.randint(VOCAB, (2, SEQ), generator=generator)
    labels[0, 3] = -100
    region = Region.whole((VOCAB, DIM)).chunk(0, axis.rank, axis.size)
    mine = hidden.chunk(axis.size, 1)[axis.rank].clone().requires_grad_()
    rows = weight[region.slices].clone().requires_grad_()
    most = Region.whole((VOCAB, DIM)).chunk(0, 0, axis.size).sizes[0]
    with patch("shoal.parallel.vocab_loss.CHUNK_BYTES", chunk_bytes):
        loss = vocab_parallel_cross_entropy_sum(mine, rows, labels, 0.1, axis=axis, first=region.offsets[0], rows=most)
    loss.backward()

    hidden64, weight64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden64 @ weight64.t()).flatten(0, 1)
    wanted = 0.1 * torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    wanted.backward()
    assert hidden64.grad is not None
    assert weight64.grad is not None
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.grad.double(), weight64.grad[region.slices], rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    part = hidden64.grad.chunk(axis.size, 1)[axis.rank]
    torch.testing.assert_close(mine.grad.double(), part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * 128 * 4, 4 * 62 * 5])
def test_uneven_parts_in_chunks(world: Callable[[int], World], processes: int, chunk_bytes: int) -> None:
    """257 rows on 2 ranks are 129 and 128: chunk sizes based on a rank's own rows would differ."""
    world(processes).run(loss_and_gradients, chunk_bytes)
