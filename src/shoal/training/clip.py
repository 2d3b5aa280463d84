"""The gradient norm, and clipping by it (Pascanu et al. 2013, algorithm 1). The host does not wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Shard


def gradient_norm(
    shards: Sequence[Shard], shapes: Mapping[str, Sequence[int]], mesh: Mesh, *, bitwise: bool
) -> torch.Tensor:
    """
    Return the norm of the whole model's gradient, 0-d float32, identical on every rank.

    `bitwise`: whether the norm has identical bits in every layout that keeps rows whole. A collective over the world, unless
    `bitwise` is false and all ranks hold the whole gradient.
    """
    if bitwise:
        return _row_by_row(shards, shapes, mesh)
    if not mesh.layout.sharded:
        return _norm(gradients(shards))
    return mesh.sum(_norm(gradients([s for s in shards if s.counted])).to(mesh.device).square()).sqrt()


def clip(shards: Sequence[Shard], norm: torch.Tensor, max_norm: float, scale: torch.Tensor | None = None) -> None:
    """
    Scale gradients in place to a norm of at most `max_norm`; a `max_norm` of 0 disables clipping.

    `scale`: float16's loss scale, by which the gradients are divided too. `norm`: their norm after this division. The factor
    stays on the device.
    """
    if max_norm <= 0 and scale is None:
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    if scale is not None:
        factor = factor / scale
    if grads := gradients(shards):
        torch._foreach_mul_(grads, factor.to(grads[0].device))  # a blocking copy, and only with CPU offload


def gradients(shards: Sequence[Shard]) -> list[torch.Tensor]:
    """Return the gradients of the shards that have a non-empty one."""
    return [s.tensor.grad for s in shards if s.tensor.grad is not None and s.tensor.grad.numel()]


_RUN = 16384  # elements summed one after another


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return the norm over all elements, 0-d float32.

    On a CPU torch adds a tensor's squares sequentially in float32: the relative error is 3e-3 at 30 million elements.
    Summing runs of 16,384 and then the runs' sums has an error of 1e-7 in the same time.
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
    Return the norm, adding first the squares in each row, then the rows' sums in the model's order.

    `_by_halves` fixes the order of additions, which a kernel would choose. A whole row is counted on exactly one rank: the
    sum over the world adds only zeros to its sum, and is exact.
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
    """Return sums over the last dim, [R]: add the second half to the first until one element is left."""
    while x_RN.shape[1] > 1:
        half = (x_RN.shape[1] + 1) // 2
        head = x_RN[:, :half].clone()
        head[:, : x_RN.shape[1] - half] += x_RN[:, half:]
        x_RN = head
    return x_RN.squeeze(1)
