"""Attention that stays inside documents, and positions given."""

from __future__ import annotations

import pytest
import torch

from shoal.models.attention import KVCache, document_mask

from .hf_weights import random_pair
from .shapes import SHAPES

LENGTHS = (5, 9, 2)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt2"])
def test_packed_documents_equal_each_alone(name: str) -> None:
    model, _ = random_pair(SHAPES[name])
    documents = [torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    packed = model(torch.cat(documents, dim=1), positions, ids)
    alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert (model(torch.cat(documents, dim=1), positions) - alone).abs().max() > 1e-2


def test_mask_of_one_document_is_causal() -> None:
    mask = document_mask(torch.zeros(2, 4, dtype=torch.long))
    assert torch.equal(mask, torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_cache_in_pieces_equals_one_pass(name: str) -> None:
    model, _ = random_pair(SHAPES[name])
    tokens = torch.randint(0, 97, (2, 12))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split((5, 1, 4, 2), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-5, rtol=0)


def test_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache(
        num_layers=1, batch=1, capacity=3, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.extend(2, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="4 places do not fit a cache of 3"):
        cache.extend(2, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="say which"):
        cache.extend(1, None)
