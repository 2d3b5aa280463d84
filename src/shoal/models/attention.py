"""
The one chooser of attention kernels, its masks, and the cache of keys and values.

Everything goes through `torch.nn.functional.scaled_dot_product_attention`, which picks a fused kernel: flash or
efficient on CUDA, flash on the CPU, there also with a boolean mask and with grouped heads (seen: 3% slower with a
mask). Only dropout sends the CPU to plain math, which holds all of the scores [B, H, T, T] in memory.

A CPU without matrix tiles (AMX) does bfloat16 attention in float32: half the time, casts included, and probabilities
are not rounded. (Seen on AVX-512 with bf16: 79 ms against 39 ms, forward and backward of [12, 6, 256, 64].)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.cpu import has_tiles

CPU_HAS_TILES: bool = has_tiles()


class Attend(Protocol):
    """What a block's attention calls, so that it can be given another that knows of more processes."""

    def __call__(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor: ...


def attend(
    q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """
    Attention of H query heads on K key heads (H a multiple of K) -> [B, T, H * d].

    Without a mask: causal where T = S, and a single query (T = 1) sees every key. With one: what is True is seen.
    """
    if q_BTHd.shape[1] == 1:
        return _attend_one(q_BTHd, k_BSKd, v_BSKd, mask_B1TS, dropout)
    dtype = q_BTHd.dtype
    if q_BTHd.device.type == "cpu" and not CPU_HAS_TILES:
        q_BTHd, k_BSKd, v_BSKd = q_BTHd.float(), k_BSKd.float(), v_BSKd.float()
    out_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSKd.transpose(1, 2),
        v_BSKd.transpose(1, 2),
        attn_mask=mask_B1TS,
        dropout_p=dropout,
        is_causal=mask_B1TS is None and q_BTHd.shape[1] > 1,
        enable_gqa=q_BTHd.shape[2] != k_BSKd.shape[2],
    )
    return out_BHTd.transpose(1, 2).flatten(2).to(dtype)


def _attend_one(q_B1Hd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B11S: Tensor | None, dropout: float) -> Tensor:
    """
    A single query a row, as in decoding: the H / K heads that share a key head go in as its queries.

    Each key and value is then read once and not H / K times (seen: half the time with three heads to a key head), and
    never copied to another dtype, which would be most of the work here.
    """
    group_BKGd = q_B1Hd.view(len(q_B1Hd), k_BSKd.shape[2], -1, q_B1Hd.shape[-1])
    out_BKGd = F.scaled_dot_product_attention(
        group_BKGd, k_BSKd.transpose(1, 2), v_BSKd.transpose(1, 2), attn_mask=mask_B11S, dropout_p=dropout
    )
    return out_BKGd.flatten(1).unsqueeze(1)


def document_mask(documents_BT: Tensor, keys_BS: Tensor | None = None, first: int = 0) -> Tensor:
    """
    Causal, and inside a document -> [B, 1, T, S], True where a query may look.

    `keys_BS` are the documents of all keys, where the queries are only the places from `first` on. Every query sees
    itself, whatever its document: no row of the softmax is empty.
    """
    keys_BS = documents_BT if keys_BS is None else keys_BS
    last = torch.arange(first, first + documents_BT.shape[1], device=documents_BT.device)
    causal_TS = torch.arange(keys_BS.shape[1], device=keys_BS.device) <= last.unsqueeze(1)
    same_BTS = documents_BT.unsqueeze(2) == keys_BS.unsqueeze(1)
    return (same_BTS & causal_TS).unsqueeze(1)


@dataclass
class LayerCache:
    """One block's keys and values [B, capacity, K, d]; the places before `start` are filled."""

    keys: Tensor
    values: Tensor
    start: int = 0

    def append(self, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest places; give all that are filled."""
        end = self.start + k_BTKd.shape[1]
        self.keys[:, self.start : end] = k_BTKd
        self.values[:, self.start : end] = v_BTKd
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """Keys and values of all blocks for up to `capacity` places, allocated once; for decoding, not for training."""

    def __init__(
        self, *, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (batch, capacity, num_kv_heads, head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]
        self.capacity = capacity
        self.length = 0
        self._documents_BS = torch.zeros((batch, capacity), dtype=torch.long, device=device)
        self.masked = False  # several documents are in it, so every call must say which

    def extend(self, num_tokens: int, documents_BT: Tensor | None) -> Tensor | None:
        """
        Make room for `num_tokens` more places, and give the mask [B, 1, T, S] of what they may see.

        `documents_BT` tells padding from text, or documents apart; once given, it is needed every time. None means
        one document, and no mask where none is needed (see `attend`).
        """
        start, end = self.length, self.length + num_tokens
        if end > self.capacity:
            raise ValueError(f"{end} places do not fit a cache of {self.capacity}")
        if documents_BT is None and self.masked:
            raise ValueError("this cache holds several documents: say which one the new places are in")
        for layer in self.layers:
            layer.start = start
        self.length = end
        if documents_BT is None and (start == 0 or num_tokens == 1):
            return None
        if documents_BT is not None:
            self.masked = True
            self._documents_BS[:, start:end] = documents_BT
        return document_mask(self._documents_BS[:, start:end], self._documents_BS[:, :end], start)
