"""
Gradient all-reduce over replicas, overlapped with backward (in a pipeline: after it).

Why not torch's `DistributedDataParallel` (Li et al. 2020, arXiv:2006.15704): it averages over ranks, but the loss is
already divided by the global number of tokens, so gradients must be summed. It prefixes every name with `module.`. And it
rebuilds its buckets after the first step, so that with three ranks or more a resumed run adds in another order than an
uninterrupted one. Here the buckets depend only on the parameters' order and sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from shoal.mesh.mesh import Axis
from shoal.parallel.collectives import gather_parts
from shoal.parallel.shared_sum import shared_buffers, sum_shared
from shoal.parallel.tree import Exchange, Leaves, TreeSum

BUCKET_BYTES = 25 * 2**20
SHARED_BYTES = 2**20  # from which memory that processes share pays: two barriers take longer than a small message


class Gradients(Protocol):
    """
    Owner of the gradients of a part of the model.

    A step calls `zero`; for each micro-batch `before_backward`, backward, `after_backward`; then `finish`. All ranks that
    share the sums must call in the same order. A pipeline's schedule orders the backwards itself and does not announce the
    last one: it skips `before_backward`, and the gradients of unsharded parameters are sent in `finish`.
    """

    def zero(self) -> None:
        """Discard the last step's gradients."""

    def before_backward(self, slot: int | None, last: bool) -> None:
        """Announce the backward of `slot` (None: ignored labels only). `last`: whether it is this rank's last in the step."""

    def after_backward(self, slot: int | None) -> None:
        """Accept the gradients of `slot`, whose backward has returned."""

    def finish(self) -> None:
        """Wait until each `p.grad` holds this rank's part of the sum. A collective over all ranks that share the sum."""


@dataclass
class _Bucket:
    """Parameters whose gradients are views of one flat float32 buffer and travel together."""

    flat: torch.Tensor
    views: dict[torch.Tensor, torch.Tensor]  # each parameter's part of it
    tree: TreeSum | None = None
    exchange: Exchange | None = None
    work: dist.Work | None = None
    missing: int = 0  # gradients that the last micro-batch has yet to add
    left: bool = False  # sent, or being sent

    def begin(self) -> None:
        """Discard the gradients; the next ones are not added to anything."""
        for p in self.views:
            p.grad = None

    def keep(self, p: torch.Tensor) -> None:
        """Make the gradient of `p` its part of the buffer: a copy of the first in a step, or zeros if there is none."""
        view = self.views[p]
        if p.grad is view:
            return
        if p.grad is None:
            view.zero_()
        else:
            view.copy_(p.grad)
        p.grad = view

    def keep_all(self) -> None:
        """Make the gradients of all its parameters parts of the buffer."""
        for p in self.views:
            self.keep(p)


class GradientReducer:
    """
    `Gradients` of unsharded parameters: `p.grad` is a view of a bucket from its first gradient of a step on.

    With `leaves`, gradients are added as one tree (see `tree.py`); without, by the all-reduce of NCCL or gloo, or after backward
    through memory that the ranks share (`shared_sum.py`): on a CPU nothing would overlap, as gloo's threads need the same cores. The
    first gradient is copied to the bucket, which costs less than zeros to which it is added. If there is nothing to add, neither
    replicas nor leaves, autograd keeps its own tensors as gradients.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], axis: Axis, leaves: Leaves | None = None,
        bucket_bytes: int = BUCKET_BYTES, shared_bytes: int = SHARED_BYTES,
    ) -> None:  # fmt: skip
        """shared_bytes: of gradients from which ranks on one machine's CPU share memory. A collective over `axis`."""
        self._axis, self._leaves = axis, leaves
        self._slot: int | None = None
        self._armed = False
        self.overlaps = True
        """Whether a bucket is sent during the last backward: each of its parameters must then get a gradient there."""
        whole = list(parameters)
        bucketed = whole if axis.size > 1 or leaves is not None else []
        self._alone = [] if bucketed else whole
        self._shared = None
        if leaves is None and _may_share(bucketed, axis, shared_bytes):
            self._shared = shared_buffers(_padded(bucketed, axis.size), axis)
        if self._shared is not None:
            self._buckets = [_make_bucket(bucketed, self._shared[axis.rank])]
        else:  # backward reaches the last layers first, so their bucket is complete, and sent, first
            self._buckets = [
                _make_bucket(ps, torch.zeros(_padded(ps, axis.size), device=ps[0].device))
                for ps in _cut(reversed(bucketed), bucket_bytes)
            ]
        if axis.size > 1:
            for bucket in self._buckets:
                bucket.exchange = None if leaves is None else Exchange(leaves, axis)
                for p in bucket.views:
                    p.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._buckets)

    @property
    def shares_memory(self) -> bool:
        """Whether the ranks add gradients in memory that they share."""
        return self._shared is not None

    def zero(self) -> None:
        self._armed = False
        for p in self._alone:
            p.grad = None
        for bucket in self._buckets:
            if self._leaves is None:
                bucket.begin()
            else:
                bucket.flat.zero_()
            bucket.left = False
            bucket.tree = None if self._leaves is None else TreeSum(self._leaves.slots)

    def before_backward(self, slot: int | None, last: bool) -> None:
        self._slot, self._armed = slot, last and self.overlaps
        for bucket in self._buckets:
            bucket.missing = len(bucket.views)

    def after_backward(self, slot: int | None) -> None:
        if slot is None:
            return
        for bucket in self._buckets:
            if bucket.tree is not None and not bucket.left:
                bucket.tree.push(slot, bucket.flat)
                bucket.flat.zero_()

    def finish(self) -> None:
        if self._shared is not None:
            for bucket in self._buckets:
                bucket.keep_all()
            sum_shared(self._shared, self._axis)
            return
        for bucket in self._buckets:
            if not bucket.left and self._axis.size > 1:
                if self._armed:
                    raise RuntimeError("a parameter got no gradient in the last micro-batch: its bucket was never sent")
                self._leave(bucket)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            elif bucket.exchange is not None:
                bucket.flat.copy_(gather_parts(bucket.exchange.wait(), 0, self._axis))
                bucket.tree = None
            elif bucket.tree is not None:
                bucket.flat.copy_(bucket.tree.root())
        self._armed = False

    def _leave(self, bucket: _Bucket) -> None:
        bucket.left = True
        bucket.keep_all()
        if bucket.exchange is not None and bucket.tree is not None:
            bucket.exchange.send(bucket.tree, self._axis.size)
        else:
            bucket.work = dist.all_reduce(bucket.flat, group=self._axis.group, async_op=True)

    def _hook(self, bucket: _Bucket) -> Callable[[torch.Tensor], None]:
        # torch keeps hooks where Python's collector does not look: one that held the bucket would keep it, and the model, for good
        mine, its = weakref.ref(self), weakref.ref(bucket)

        def arrived(p: torch.Tensor) -> None:
            reducer, bucket = mine(), its()
            if reducer is not None and bucket is not None:
                reducer._arrived(bucket, p)

        return arrived

    def _arrived(self, bucket: _Bucket, p: torch.Tensor) -> None:
        bucket.keep(p)
        if self._armed and self._shared is None:
            bucket.missing -= 1
            if bucket.missing == 0:
                if bucket.tree is not None and self._slot is not None:
                    bucket.tree.push(self._slot, bucket.flat)
                self._leave(bucket)


def _cut(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Split parameters into consecutive runs of at most `bucket_bytes` each; a larger parameter is a run by itself."""
    runs: list[list[nn.Parameter]] = []
    room = 0
    for p in parameters:
        size = p.numel() * 4  # bytes: gradients are float32
        if not runs or size > room:
            runs.append([])
            room = bucket_bytes
        runs[-1].append(p)
        room -= size
    return runs


def _padded(parameters: list[nn.Parameter], multiple: int) -> int:
    """Return the elements of a bucket, a multiple of `multiple`, so that ranks get equal chunks."""
    return -(-sum(p.numel() for p in parameters) // multiple) * multiple


def _may_share(parameters: list[nn.Parameter], axis: Axis, least: int) -> bool:
    """Return whether to try to share memory: for at least `least` bytes on CPUs. A trace has neither memory nor other ranks."""
    if axis.size == 1 or 4 * _padded(parameters, axis.size) < least:
        return False
    return dist.get_backend(axis.group) == "gloo" and parameters[0].device.type == "cpu"


def _make_bucket(parameters: list[nn.Parameter], flat: torch.Tensor) -> _Bucket:
    """Make each `p.grad` a view of `flat`, which may be longer."""
    sizes = [p.numel() for p in parameters]
    parts = torch.split(flat[: sum(sizes)], sizes)
    bucket = _Bucket(flat, {p: part.view_as(p) for p, part in zip(parameters, parts, strict=True)})
    for p, view in bucket.views.items():
        p.grad = view
    return bucket
