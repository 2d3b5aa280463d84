"""The KV cache: the same hidden states as without it, and errors beyond its capacity."""

from __future__ import annotations

import pytest
import torch

from shoal.models.attention import KVCache, document_mask

from .hf_weights import random_pair
from .shapes import SHAPES


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt2"])
def test_pieces_equal_one_pass(name: str) -> None:
    model, _ = random_pair(SHAPES[name])
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split((5, 1, 4, 2), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-5, rtol=0)


def test_mask_of_one_document_is_causal() -> None:
    mask = document_mask(torch.zeros((2, 4), dtype=torch.long))
    assert torch.equal(mask, torch.ones((4, 4), dtype=torch.bool).tril().expand(2, 1, 4, 4))


def test_what_does_not_fit_is_refused() -> None:
    cache = KVCache(
        num_layers=1, batch=1, capacity=3, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    documents = torch.zeros((1, 2), dtype=torch.long)
    cache.extend(2, documents)
    with pytest.raises(ValueError, match="4 positions do not fit a cache of 3"):
        cache.extend(2, documents)
    with pytest.raises(ValueError, match="pass documents_BT"):
        cache.extend(1, None)
