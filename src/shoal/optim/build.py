"""The optimizer over what this process holds: each parameter exactly once, decay on matrices only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.config.options import Optim
from shoal.mesh.mesh import Axis
from shoal.mesh.region import Shard
from shoal.optim.muon import Muon

# What an optimizer keeps of a parameter, as a checkpoint names it.
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Optimizer:
    """AdamW over all shards or, with Muon, over all that are no hidden matrices."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Update; or, where `skip` (0-d bool, the same on every process) is true, leave all as it was."""
        for part in self.parts:
            if skip is not None:
                here = skip.to(next(iter(part.state)).device)  # offloaded: the CPU, and there before it is read
                if here.device.type == "cpu":
                    if here:
                        continue
                else:  # who asks a GPU waits for it: fused AdamW and Muon read this there
                    part.found_inf = here.float()  # type: ignore[attr-defined]
            part.step()

    def set_learning_rate(self, lr: float) -> None:
        """The rate of the next step, in all groups."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def set_steps(self, steps: int) -> None:
        """AdamW counts its steps for each parameter: after a resume it is told."""
        for part in self.parts:
            for state in part.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def moments(self, shard: Shard) -> dict[str, torch.Tensor]:
        """What is kept of this shard, of its own shape."""
        [state] = [part.state[shard.tensor] for part in self.parts if shard.tensor in part.state]
        return {name: state[name] for name in MOMENTS if name in state}


def build_optimizer(shards: Sequence[Shard], optim: Optim, team: Axis, *, bitwise: bool = False) -> Optimizer:
    """
    The optimizer with its state already there, as zeros.

    The state is made here and not at the first step, so that a checkpoint is loaded into it in place and
    memory is known before training starts. `team`: all that hold something of the same parameters. `bitwise` takes
    arithmetic that does not depend on where in a shard an element lies.
    """
    hidden = [s for s in shards if optim.name == "muon" and is_hidden_matrix(s)]
    rest = [s for s in shards if not (optim.name == "muon" and is_hidden_matrix(s)) and s.tensor.numel()]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, optim, bitwise=bitwise)] if rest else []
    if hidden:
        muon = Muon(hidden, team, lr=optim.lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay)
        parts.append(muon)
    return Optimizer(parts)


def is_hidden_matrix(shard: Shard) -> bool:
    """Between a block's two sides; embeddings, positions and head are looked up or feed the loss."""
    return len(shard.region.shape) == 2 and shard.name.startswith("blocks.")


def _adamw(shards: Sequence[Shard], optim: Optim, *, bitwise: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019)."""
    matrices = [s.tensor for s in shards if len(s.region.shape) >= 2]
    vectors = [s.tensor for s in shards if len(s.region.shape) < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # The CPU's fused kernel takes the last few elements of a tensor another way than the rest: seen to give other
    # bits where a shard's width is odd.
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
            # where the fused kernel of each device wants its counter
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device if tensor.is_cuda else "cpu"),
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }
    return optimizer
