"""Builds the optimizer of this rank's shards: AdamW, or Muon and AdamW. Weight decay applies to matrices only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.config.options import Optim
from shoal.mesh.mesh import Axis
from shoal.mesh.region import Shard
from shoal.optim.muon import Muon
from shoal.optim.optimizer import Optimizer


def build_optimizer(shards: Sequence[Shard], optim: Optim, team: Axis, *, bitwise: bool = False) -> Optimizer:
    """
    Build the optimizer with its state allocated, as zeros.

    The state exists before the first step, so that a checkpoint is loaded into it in place and its memory is known before
    training starts. `team`: the axis of all ranks that hold shards of these parameters. `bitwise`: whether to use arithmetic
    that does not depend on an element's position in a shard.
    """
    hidden = [s for s in shards if optim.name == "muon" and is_hidden_matrix(s)]
    rest = [s for s in shards if not (optim.name == "muon" and is_hidden_matrix(s)) and s.tensor.numel()]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, optim, bitwise=bitwise)] if rest else []
    if hidden:
        muon = Muon(hidden, team, lr=optim.lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay)
        parts.append(muon)
    return Optimizer(parts)


def is_hidden_matrix(shard: Shard) -> bool:
    """
    Return whether Muon updates this shard: a matrix inside a block. AdamW updates all others, such
    as embeddings, the head and norms.

    Jordan 2024 (kellerjordan.github.io/posts/muon) recommends this split.
    """
    return len(shard.region.shape) == 2 and shard.name.startswith("blocks.")


def _adamw(shards: Sequence[Shard], optim: Optim, *, bitwise: bool) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), without decay of norms and biases."""
    matrices = [s.tensor for s in shards if len(s.region.shape) >= 2]
    vectors = [s.tensor for s in shards if len(s.region.shape) < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # The CPU's fused kernel treats the last few elements of a tensor, beyond whole vectors, differently: at odd shard
    # widths its bits depend on the layout.
    fused = not (bitwise and shards[0].tensor.device.type == "cpu")
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
        foreach=not fused,
    )
    for tensor in (*matrices, *vectors):
        optimizer.state[tensor] = {
            # on the device where AdamW's fused kernel expects the step count
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device if tensor.is_cuda else "cpu"),
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }
    return optimizer
