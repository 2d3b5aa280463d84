"""The gradient's norm, and clipping by it (Pascanu et al. 2013, algorithm 1), without a wait for the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Shard


def gradient_norm(
    shards: Sequence[Shard], shapes: Mapping[str, Sequence[int]], mesh: Mesh, *, bitwise: bool
) -> torch.Tensor:
    """
    The norm of the whole model's gradient, 0-d float32, the same on every process.

    A collective over the world, unless all hold the same. `bitwise`: the same bits in every layout in
    which rows stay whole.
    """
    if bitwise:
        return _row_by_row(shards, shapes, mesh)
    if not mesh.layout.sharded:
        return _norm(gradients(shards))
    return mesh.sum(_norm(gradients([s for s in shards if s.counted])).to(mesh.device).square()).sqrt()


def clip(shards: Sequence[Shard], norm: torch.Tensor, max_norm: float, scale: torch.Tensor | None = None) -> None:
    """
    Scale gradients in place to a norm of at most `max_norm` (0: leave them); `norm` is theirs.

    The factor stays on the device. `scale`: what gradients are to be divided by first (fp16's loss scale).
    """
    if max_norm <= 0 and scale is None:
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    if scale is not None:
        factor = factor / scale
    if grads := gradients(shards):
        torch._foreach_mul_(
            grads, factor.to(grads[0].device)
        )  # a copy only where gradients are offloaded; it must arrive


def gradients(shards: Sequence[Shard]) -> list[torch.Tensor]:
    """Of all shards that have one."""
    return [s.tensor.grad for s in shards if s.tensor.grad is not None and s.tensor.grad.numel()]


_RUN = 16384


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Of all elements, 0-d float32.

    On a CPU torch adds a tensor's squares one after another in float32: for 30 million elements 3e-3 off. Runs of some
    thousand, and then the runs, are 1e-7 off in the same time.
    """
    if not tensors:
        return torch.zeros(())
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors)
    norms = []
    for flat in (t.reshape(-1) for t in tensors):
        end = flat.numel() // _RUN * _RUN
        norms += [torch.linalg.vector_norm(flat[:end].view(-1, _RUN), dim=1)]
        norms += [torch.linalg.vector_norm(flat[end:]).view(1)]
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return total


def _row_by_row(shards: Sequence[Shard], shapes: Mapping[str, Sequence[int]], mesh: Mesh) -> torch.Tensor:
    """
    Each row's sum of squares, then the sum of all rows in the model's order: by halves, so that no kernel's own
    order of adding has a say. A row is held whole by one process that counts it, so the sum over the world is exact.
    """
    first, offsets = 0, {}
    for name, shape in shapes.items():
        offsets[name] = first
        first += shape[0]
    rows = torch.zeros(first, device=mesh.device)
    for shard in shards:
        if shard.counted and shard.tensor.grad is not None and shard.tensor.grad.numel():
            start = offsets[shard.name] + shard.region.offsets[0]
            rows[start : start + shard.region.sizes[0]] += _by_halves(
                shard.tensor.grad.square().view(shard.region.sizes[0], -1)
            ).to(rows.device)
    return _by_halves(mesh.sum(rows).unsqueeze(0)).squeeze(0).sqrt()


def _by_halves(x_RN: torch.Tensor) -> torch.Tensor:
    """Sums over the last dim [R]: the second half is added to the first, again and again."""
    while x_RN.shape[1] > 1:
        half = (x_RN.shape[1] + 1) // 2
        head = x_RN[:, :half].clone()
        head[:, : x_RN.shape[1] - half] += x_RN[:, half:]
        x_RN = head
    return x_RN.squeeze(1)
