"""The optimizer's part of a step: its update, learning rate and state; `build.py` chooses the algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.mesh.region import Shard

# The optimizer's state of a parameter, by the names used in checkpoints.
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Optimizer:
    """AdamW over all shards; or Muon over the hidden matrices, and AdamW over all other shards."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Update the parameters; if `skip` (0-d bool, the same on every rank) is true, change nothing."""
        for part in self.parts:
            if skip is not None:
                here = skip.to(next(iter(part.state)).device)  # to the CPU if offloaded; that copy is synchronous
                if here.device.type == "cpu":
                    if here:
                        continue
                else:  # reading it here would wait for the GPU: fused AdamW and Muon read it on the device
                    part.found_inf = here.float()  # type: ignore[attr-defined]
            part.step()

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step, in all groups."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def set_steps(self, steps: int) -> None:
        """Set AdamW's step count, from which it computes its bias correction, after a resume."""
        for part in self.parts:
            for state in part.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def moments(self, shard: Shard) -> dict[str, torch.Tensor]:
        """Return this shard's optimizer state: tensors of the shard's shape, by name."""
        [state] = [part.state[shard.tensor] for part in self.parts if shard.tensor in part.state]
        return {name: state[name] for name in MOMENTS if name in state}
