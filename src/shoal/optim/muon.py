"""
Muon for the blocks' matrices, in any sharding.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon) takes the momentum of a matrix's gradient and sets its singular
values to about 1; scale and weight decay are those of Liu et al. 2025 (arXiv:2502.16982, section 2.2).

Momentum is elementwise, but orthogonalization needs the whole matrix. So each matrix has one owner: the shards are sent
to it, it orthogonalizes once, and each rank gets its shard of the result back. **Results are bitwise identical in every
layout** (on one type of device, with equally many CPU threads): the same whole matrix goes through the same products,
and operations on shards round each element independently. Three rules ensure this:

- No multiply-add on a shard (`alpha=`, `lerp`): a kernel may fuse the two in its vector loop and not in the remainder.
- Each whole matrix is a separate allocation: a library may select its kernel by the memory's alignment.
- Matrices of one shape are not stacked for `bmm`: cuBLAS may select its kernel by the batch size, which depends on the
  layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.config.owners import assign_owners
from shoal.mesh.mesh import Axis, has_bfloat16
from shoal.mesh.region import Region, Shard

# Jordan's coefficients. The large slope at 0 lets five steps map all singular values in [0.005, 1] into [0.68, 1.16]. The
# values need not converge to 1: a rough orthogonalization trains as well.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # lower bound of the norm that divides a matrix: a gradient of zeros remains zeros


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """
    Return U S' V^T for a matrix U S V^T, with S' near 1: `steps` times X <- a X + b (X X^T) X + c (X X^T)^2 X.

    A Newton-Schulz iteration: an odd polynomial of X acts on its singular values only. The products use the dtype of
    `matrix`. The Gram matrix has the size of the shorter side, which is cheaper and gives a matrix and its transpose the
    same result.
    """
    tall = len(matrix) > matrix.shape[1]
    x = matrix.t().contiguous() if tall else matrix
    del matrix  # a caller that keeps no reference to it does not need its memory any more
    # the Frobenius norm bounds the largest singular value: all are then in [0, 1], where the iteration is bounded
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


class Muon(torch.optim.Optimizer):
    """
    Muon over shards of matrices.

    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(gradient + momentum B), with
    B <- momentum B + gradient; without `nesterov`, orthogonalize(B). The scale gives updates AdamW's typical RMS of 0.2,
    so that AdamW's learning rate and weight decay fit (Liu et al. 2025, section 2.2). B is
    `state[shard.tensor]["momentum_buffer"]`, of the shard's size.

    Newton-Schulz, and the shards sent for it, use `dtype`. The default is bfloat16 on CUDA, which halves the traffic; float32
    on a GPU without bfloat16, and on CPUs, where bfloat16 is slower even with AVX-512 bfloat16 (10.6M parameters: 1.20 s
    in bfloat16, 0.71 s in float32).

    Matrices are sent in rounds: about one large matrix, or several small ones, per rank (`config/owners.py`). A rank holds the
    matrices it owns in a round unsharded, and sends each shard of the result to all ranks that hold this shard. With R
    replicas it sends up to R times what it owns in a round, and receives as much.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        team: Axis,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool = True,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Allocate the state and plan the messages. A collective over `team`.

        `shards`: this rank's 2-D shards, of the same matrices in the same order on every rank of `team`. Together the
        ranks hold each matrix completely; a shard may be empty, or held by several ranks. Raises ValueError if a tensor is not
        a matrix, or its shards do not cover it.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "steps": steps}
        super().__init__([shard.tensor for shard in shards], defaults)
        for shard in shards:
            if len(shard.region.shape) != 2:
                raise ValueError(f"{shard.name} has shape {shard.region.shape}, but Muon is for matrices only")
            self.state[shard.tensor]["momentum_buffer"] = torch.zeros_like(shard.tensor)
        self._shards, self._team, self._device = list(shards), team, shards[0].tensor.device
        half = self._device.type == "cuda" and has_bfloat16(self._device)
        self.found_inf: Tensor | None = None  # 0-d; if not 0, the next step changes nothing, as in fused AdamW
        self._dtype = dtype or (torch.bfloat16 if half else torch.float32)
        self._rounds = _plan([shard.name for shard in shards], self._regions(), team)

    def _regions(self) -> list[list[Region]]:
        """Return which region of each matrix each rank holds, [matrix][rank of the team]. A collective."""
        if self._team.size == 1:
            return [[shard.region] for shard in self._shards]
        rows = [[*s.region.shape, *s.region.offsets, *s.region.sizes] for s in self._shards]
        mine = torch.tensor(rows, dtype=torch.int64, device=self._device)
        parts = [torch.empty_like(mine) for _ in range(self._team.size)]
        dist.all_gather(parts, mine, group=self._team.group)
        by_rank = torch.stack(parts, 1).view(len(rows), self._team.size, 3, 2).tolist()
        return [[Region(*map(tuple, region)) for region in regions] for regions in by_rank]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all shards from their gradients; a missing gradient counts as zeros. Collectives over the team."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, skip = self.param_groups[0], None if self.found_inf is None else self.found_inf.bool()
        tensors = [t for t in group["params"] if t.numel()]
        if tensors:  # all shards of this rank may be empty
            buffers = [self.state[t]["momentum_buffer"] for t in tensors]
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
            momentum, decay = group["momentum"], 1 - group["lr"] * group["weight_decay"]
            if skip is not None:  # factors of 1 and gradients of 0 change nothing, without reading `skip` on the host
                momentum, decay = (torch.where(skip, 1.0, kept) for kept in (momentum, decay))
                for gradient in gradients:
                    gradient.masked_fill_(skip, 0.0)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            torch._foreach_mul_(tensors, decay)
        for each in self._rounds:
            self._update(each, group, skip)
        return loss

    def _update(self, each: _Round, group: dict[str, Any], skip: Tensor | None) -> None:
        # No variable of this method refers to a tensor that is not needed any more
        wholes = self._gathered(each, group)
        for i in each.owned:
            wholes[i] = orthogonalize(wholes.pop(i), group["steps"])
        for part, tensor in self._exchange(each.scatter, lambda part: wholes[part.matrix][part.region.slices]):
            self._change(part, tensor, group["lr"], skip)

    def _gathered(self, each: _Round, group: dict[str, Any]) -> dict[int, Tensor]:
        """Return the matrices to orthogonalize that this rank owns. A collective."""
        wholes = {i: torch.empty(shape, dtype=self._dtype, device=self._device) for i, shape in each.owned.items()}
        for part, tensor in self._exchange(each.gather, lambda part: self._direction(part, group)):
            wholes[part.matrix][part.region.slices] = tensor
            del tensor  # before the next one is computed
        return wholes

    def _change(self, part: _Part, direction: Tensor, lr: float, skip: Tensor | None) -> None:
        """Move this rank's shard of a matrix; not if `skip` is true."""
        change = direction.float() * (lr * 0.2 * math.sqrt(max(part.region.shape)))
        self._shards[part.matrix].tensor.sub_(change if skip is None else change.masked_fill(skip, 0.0))

    def _direction(self, part: _Part, group: dict[str, Any]) -> Tensor:
        """Return this rank's shard of the matrix to orthogonalize; float32. Nesterov: gradient + momentum B."""
        tensor = self._shards[part.matrix].tensor
        buffer: Tensor = self.state[tensor]["momentum_buffer"]
        if not group["nesterov"]:
            return buffer
        ahead: Tensor = buffer * group["momentum"]
        return ahead if tensor.grad is None else ahead.add_(tensor.grad)

    def _exchange(self, exchange: _Exchange, take: Callable[[_Part], Tensor]) -> Iterator[tuple[_Part, Tensor]]:
        """Send `take(part)` for each part, and yield the received parts. A collective if any part has to be sent."""
        for part in exchange.kept:
            yield part, take(part)
        if exchange.quiet:
            return
        sent, got = (torch.empty(sum(n), dtype=self._dtype, device=self._device) for n in (exchange.to, exchange.come))
        for part, piece in _pieces(sent, exchange.sent):
            piece.copy_(take(part))
        dist.all_to_all_single(got, sent, exchange.come, exchange.to, group=self._team.group)
        yield from _pieces(got, exchange.received)


@dataclass(frozen=True)
class _Part:
    """A region of a matrix that is sent from one rank of the team to another, or stays on one."""

    matrix: int
    region: Region
    source: int
    target: int

    @property
    def numel(self) -> int:
        return math.prod(self.region.sizes)


class _Exchange:
    """The parts that this rank sends and receives in one all-to-all, in the order of the buffers."""

    def __init__(self, parts: Sequence[_Part], team: Axis) -> None:
        moving = [part for part in parts if part.source != part.target]
        self.quiet = not moving  # no rank sends a part; the same on all ranks, which then skip the collective
        self.kept = [part for part in parts if part.source == part.target == team.rank]
        self.sent = sorted((p for p in moving if p.source == team.rank), key=lambda p: (p.target, p.matrix))
        self.received = sorted((p for p in moving if p.target == team.rank), key=lambda p: (p.source, p.matrix))
        self.to, self.come = [0] * team.size, [0] * team.size  # elements to send and to receive, by peer rank
        for part in self.sent:
            self.to[part.target] += part.numel
        for part in self.received:
            self.come[part.source] += part.numel


def _pieces(buffer: Tensor, parts: Sequence[_Part]) -> Iterator[tuple[_Part, Tensor]]:
    """Yield each part's place in a buffer, viewed as a matrix."""
    start = 0
    for part in parts:
        yield part, buffer[start : start + part.numel].view(part.region.sizes)
        start += part.numel


@dataclass(frozen=True)
class _Round:
    owned: dict[int, tuple[int, ...]]  # matrices that this rank orthogonalizes -> their shapes
    gather: _Exchange  # to the owners
    scatter: _Exchange  # back, to all ranks that hold a part


def _plan(names: Sequence[str], regions: Sequence[Sequence[Region]], team: Axis) -> list[_Round]:
    """Plan the rounds of a step from the `regions` that ranks hold, [matrix][rank]."""
    rounds = []
    for owners in assign_owners([held[0].shape for held in regions], team.size):
        gathered, scattered = [], []
        for i, owner in owners.items():
            holders: dict[Region, list[int]] = {}
            for rank, region in enumerate(regions[i]):
                if math.prod(region.sizes):
                    holders.setdefault(region, []).append(rank)
            there, wanted = sum(math.prod(region.sizes) for region in holders), math.prod(regions[i][0].shape)
            if there != wanted or len({region.shape for region in regions[i]}) > 1:
                raise ValueError(f"{names[i]}: its shards have {there} elements, but the whole has {wanted}")
            for region, ranks in holders.items():
                # of the ranks that hold this region the nearest sends it: the owner itself, or a rank on the owner's node
                nearest = min(ranks, key=lambda rank: (abs(rank - owner), rank))
                gathered.append(_Part(i, region, nearest, owner))
                scattered += [_Part(i, region, owner, rank) for rank in ranks]
        owned = {i: regions[i][0].shape for i, owner in owners.items() if owner == team.rank}
        rounds.append(_Round(owned, _Exchange(gathered, team), _Exchange(scattered, team)))
    return rounds
