"""What a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """
    Model, optimizer, how far training is. The data's position is one integer; the schedule and all
    randomness are functions of the step and the seed, so nothing of them is kept.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps taken
    position: int = 0  # samples consumed
    tokens: int = 0  # valid tokens trained on

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its global name, to be written from or loaded into in place."""
        named = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            named |= {f"optim.{m}.{name}": self.optimizer.state[p][m] for m in MOMENTS}
        return named

    def scalars(self) -> dict[str, Any]:
        """The rest, as JSON takes it."""
        return {"step": self.step, "position": self.position, "tokens": self.tokens}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take over `scalars()` of a checkpoint; AdamW counts steps per parameter, so it is told too."""
        self.step, self.position, self.tokens = (int(scalars[k]) for k in ("step", "position", "tokens"))
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step)
