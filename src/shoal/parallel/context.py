"""
Context parallelism: the `cp` axis splits each sequence. Only attention mixes positions, so only attention changes.

| method | a rank holds | a layer sends | attention on a rank |
| --- | --- | --- | --- |
| allgather (Dubey et al. 2024, arXiv:2407.21783, section 3.3.2) | chunks r and 2N-1-r of 2N | K and V to all, in one collective | own queries, all keys before them |
| ulysses (Jacobs et al. 2023, arXiv:2309.14509) | part r of N | Q, K, V and the output, each part once | some heads, whole sequence |
| ring (Liu et al. 2023, arXiv:2310.01889) | as allgather | K and V from neighbor to neighbor | see `ring.py` |

Under a causal mask a late query sees more keys than an early one. Chunks r and 2N-1-r, one early and one late, give every
rank the same work. Attention is excluded from torch.compile, which compiles the code before and after it separately.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis
from shoal.models.attention import Attend, attend, document_mask
from shoal.models.family import LanguageModel
from shoal.parallel.collectives import all_gather, all_to_all, gather_parts

SEQUENCE, HEADS = 1, 2  # dims of [B, T, H, d]


def local_places(seq_len: int, axis: Axis, method: str, device: torch.device | None = None) -> Tensor:
    """
    Return the positions of a row that this rank holds, ascending, int64 [seq_len / axis.size].

    Raises ValueError unless seq_len is divisible by 2 axis.size (allgather, ring) or axis.size (ulysses).
    """
    count = axis.size if method == "ulysses" or axis.size == 1 else 2 * axis.size
    if seq_len % count:
        raise ValueError(f"cannot split a sequence of {seq_len} into {count} equal parts")
    parts = torch.arange(seq_len, device=device).chunk(count)
    if count == axis.size:
        return parts[axis.rank]
    return torch.cat((parts[axis.rank], parts[-1 - axis.rank]))


def cut_batch(batch: Batch, axis: Axis, method: str) -> Batch:
    """
    Return this rank's part [B, T / axis.size] of each row, on the batch's device.

    `valid_tokens` remains the count of the whole rows: the step's count is a sum over data-parallel ranks only.
    """
    if axis.size == 1:
        return batch
    places = local_places(batch.tokens.shape[SEQUENCE], axis, method, batch.tokens.device)
    ids = batch.document_ids
    return replace(
        batch,
        tokens=batch.tokens.index_select(SEQUENCE, places),
        labels=batch.labels.index_select(SEQUENCE, places),
        positions=batch.positions.index_select(SEQUENCE, places),
        document_ids=None if ids is None else ids.index_select(SEQUENCE, places),
    )


def apply_context(model: LanguageModel, axis: Axis, method: str) -> None:
    """
    Replace each block's attention, and the function that builds masks, by context-parallel ones.

    The model then takes the parts that `cut_batch` returns, including their positions. It may hold only some heads
    (tensor parallel). Raises ValueError for an unknown method, LaunchError if this torch does not support `ring`.
    """
    if axis.size == 1:
        return
    attend_across, model.make_mask = _methods(axis, method)
    for block in model.blocks.values():
        cast(Any, block).attention.attend = attend_across


def _methods(axis: Axis, method: str) -> tuple[Attend, Callable[[Tensor], Tensor]]:
    """Return the attention function, and the one that builds its mask from this rank's document ids [B, T]."""
    if method == "allgather":
        return _AllGather(axis), lambda documents_BT: _gathered_mask(documents_BT, axis)
    if method == "ulysses":
        return _Ulysses(axis), lambda documents_BT: document_mask(gather_parts(documents_BT, SEQUENCE, axis))
    if method == "ring":
        from shoal.parallel.ring import Ring, no_mask  # imported only if used: it needs private functions of torch

        return Ring(axis), no_mask
    raise ValueError(f"unknown context-parallel method {method}; use allgather, ulysses or ring")


class _AllGather:
    """Attention of this rank's two chunks of queries to the whole sequence's keys. Collectives over `axis`."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor:
        """Return [B, T, H * d]. Without a mask, attention is causal over the whole sequence."""
        kv_BSLd = _whole_sequence(torch.cat((k_BTKd, v_BTKd), dim=HEADS), self.axis)
        length = q_BTHd.shape[SEQUENCE] // 2
        last = 2 * self.axis.size - 1 - self.axis.rank
        outs = []
        for half, chunk in enumerate((self.axis.rank, last)):
            q_BtHd = q_BTHd.narrow(SEQUENCE, half * length, length)
            end = (chunk + 1) * length  # none of these queries sees a later key: do not compute those scores
            k_BsKd, v_BsKd = kv_BSLd.narrow(SEQUENCE, 0, end).chunk(2, HEADS)
            mask = (
                _causal_end(q_BtHd, end) if mask_B1TS is None else mask_B1TS.narrow(2, half * length, length)[..., :end]
            )
            outs.append(attend(q_BtHd, k_BsKd, v_BsKd, mask, dropout=dropout))
        return torch.cat(outs, dim=SEQUENCE)


class _Ulysses:
    """Attention of some heads over the whole sequence, between two all-to-alls. Collectives over `axis`."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor:
        """Return [B, T, H * d]. The mask covers the whole sequence. Raises ValueError if `cp` does not divide the heads."""
        size = self.axis.size
        heads = [x.shape[HEADS] for x in (q_BTHd, k_BTKd, v_BTKd)]
        if any(count % size for count in heads):
            raise ValueError(f"cannot split {heads[0]} query heads and {heads[1]} key heads over {size} processes")
        # one all-to-all for all three: part r has the r-th share of the query, key and value heads
        parts_BTNLd = torch.cat(
            [torch.unflatten(x, HEADS, (size, -1)) for x in (q_BTHd, k_BTKd, v_BTKd)], dim=HEADS + 1
        )
        own_BSLd = all_to_all(parts_BTNLd.flatten(HEADS, HEADS + 1), HEADS, SEQUENCE, self.axis)
        q_BShd, k_BSkd, v_BSkd = own_BSLd.split_with_sizes([count // size for count in heads], HEADS)
        return all_to_all(attend(q_BShd, k_BSkd, v_BSkd, mask_B1TS, dropout=dropout), SEQUENCE, HEADS, self.axis)


def _whole_sequence(x_BT: Tensor, axis: Axis) -> Tensor:
    """
    All-gather the chunks [B, T, ...] in sequence order, [B, T * axis.size, ...]. A collective over `axis`.

    Backward: a reduce-scatter of the gradient, added in rank order in float32.
    """
    parts_NBT = all_gather(x_BT, 0, axis).view(axis.size, *x_BT.shape)
    early, late = parts_NBT.chunk(2, dim=1 + SEQUENCE)
    return torch.cat((*early.unbind(0), *late.unbind(0)[::-1]), dim=SEQUENCE)  # rank r's late chunk is number 2N-1-r


def _causal_end(q_BtHd: Tensor, end: int) -> Tensor | None:
    """Return the causal mask of queries at the last positions before `end`, as `attend` takes it."""
    length = q_BtHd.shape[SEQUENCE]
    if length == end:
        return None
    if q_BtHd.is_cuda:  # the kernel then skips the work above the diagonal and reads no mask from memory
        return causal_lower_right(length, end)
    return torch.ones(length, end, dtype=torch.bool, device=q_BtHd.device).tril(end - length)


def _gathered_mask(documents_BT: Tensor, axis: Axis) -> Tensor:
    """Return the document mask of this rank's two chunks of queries, [B, 1, T, S]. A collective over `axis`."""
    documents_BS = _whole_sequence(documents_BT, axis)
    length = documents_BT.shape[SEQUENCE] // 2
    early, late = documents_BT.chunk(2, dim=SEQUENCE)
    first, second = axis.rank * length, (2 * axis.size - 1 - axis.rank) * length
    return torch.cat((document_mask(early, documents_BS, first), document_mask(late, documents_BS, second)), dim=2)
