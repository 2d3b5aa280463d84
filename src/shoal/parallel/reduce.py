"""
Gradients of all replicas, summed while backward still runs.

Why not torch's `DistributedDataParallel`: it averages over ranks where we need a sum (the loss is already
divided by the global number of tokens), it puts `module.` before every name, and it lays its buckets out
anew after the first step, so that with three ranks or more a resumed run adds in another order than the
run that never stopped. Here the buckets are laid out once, by the order of the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from shoal.parallel.mesh import Mesh

BUCKET_BYTES = 25 * 2**20


@dataclass
class _Bucket:
    """Parameters whose gradients are views of one flat float32 buffer and travel together."""

    flat: torch.Tensor
    missing: int  # gradients that the last micro-batch has still to add
    size: int
    work: dist.Work | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)


class GradientReducer:
    """
    Owns every gradient: `p.grad` is a view of a bucket from the start to the end of training.

    Use: `zero()`, then backward per micro-batch, the last one inside `last=True`; `finish()` waits.
    All ranks must call in the same order. `finish` completes a collective over `dp_replicate`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mesh: Mesh, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._mesh = mesh
        self._armed = False
        # Backward reaches the last layers first, so their bucket fills, and leaves, first.
        self._buckets = [_make_bucket(ps) for ps in _cut(reversed(list(parameters)), bucket_bytes)]
        if mesh.dp_size > 1:
            for bucket in self._buckets:
                for p in bucket.parameters:
                    p.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def arm(self) -> None:
        """The next backward is the step's last: send each bucket as soon as it is whole."""
        self._armed = True
        for bucket in self._buckets:
            bucket.missing = bucket.size

    def finish(self) -> None:
        """Wait until every bucket holds the sum over all replicas. A collective over `dp_replicate`."""
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            elif self._armed and self._mesh.dp_size > 1:
                raise RuntimeError("a parameter got no gradient in the last micro-batch, so its bucket never left")
        self._armed = False

    def flat_gradients(self) -> list[torch.Tensor]:
        """The buckets' buffers, which together hold each gradient once."""
        return [bucket.flat for bucket in self._buckets]

    def _hook(self, bucket: _Bucket) -> Callable[[torch.Tensor], None]:
        def arrived(_: torch.Tensor) -> None:
            if self._armed:
                bucket.missing -= 1
                if bucket.missing == 0:
                    bucket.work = dist.all_reduce(bucket.flat, async_op=True)

        return arrived


def _cut(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Runs of parameters of at most `bucket_bytes` each (a larger parameter is alone)."""
    runs: list[list[nn.Parameter]] = []
    room = 0
    for p in parameters:
        size = p.numel() * 4
        if not runs or size > room:
            runs.append([])
            room = bucket_bytes
        runs[-1].append(p)
        room -= size
    return runs


def _make_bucket(parameters: list[nn.Parameter]) -> _Bucket:
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    return _Bucket(flat, missing=0, size=len(parameters), parameters=parameters)
