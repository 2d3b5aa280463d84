"""The loss scale of float16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), kept on the device."""

from __future__ import annotations

import torch

START, GROW_EVERY = 2.0**16, 2000
SMALLEST = 0.5  # there where even a scale of 1 overflowed


class LossScaler:
    """
    Multiplies the loss so that small gradients survive in float16; halves where they overflow, doubles after 2,000
    steps that did not. The step that overflowed is left out by others. Nothing waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.divisor = self.scale.clone()  # what this step's gradients are to be divided by
        self.good_steps = torch.zeros((), device=device)

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """
        Choose the next scale; the norm of the unscaled gradients.

        `norm` is that of the scaled gradients: infinite or no number on every process if it is so on one.
        """
        unscaled = norm / self.scale
        bad = (~torch.isfinite(norm)).float()
        self.divisor = self.scale.clone()
        self.good_steps.add_(1.0).mul_(1.0 - bad)
        grow = (self.good_steps >= GROW_EVERY).float()
        self.scale.mul_((1.0 - 0.5 * bad) * (1.0 + grow)).clamp_(min=SMALLEST)
        self.good_steps.mul_(1.0 - grow)
        return unscaled
