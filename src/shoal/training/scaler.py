"""The loss scale of float16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), kept on the device."""

from __future__ import annotations

import torch

START, GROW_EVERY = 2.0**16, 2000  # the defaults of torch's GradScaler
SMALLEST = 0.5  # reached only if even a scale of 1 overflowed


class LossScaler:
    """
    Scales the loss so that small gradients do not underflow in float16.

    The scale halves after an overflow and doubles after 2,000 steps without one. Skipping the step that overflowed is the
    caller's task. The host does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.divisor = self.scale.clone()  # the scale of this step's gradients, to divide them by
        self.good_steps = torch.zeros((), device=device)

    def judge(self, norm: torch.Tensor, empty: torch.Tensor | bool = False) -> torch.Tensor:
        """
        Choose the next scale; return the norm of the unscaled gradients.

        `norm`: norm of the scaled gradients over the world, so NaN or Inf on one rank is NaN or Inf on all. `empty`: whether the
        step has no gradient, 0-d bool. Such a step does not show that a larger scale is safe.
        """
        unscaled = norm / self.scale
        bad = (~torch.isfinite(norm)).float()
        self.divisor = self.scale.clone()
        self.good_steps.add_(torch.as_tensor(empty).logical_not()).mul_(1.0 - bad)
        grow = (self.good_steps >= GROW_EVERY).float()
        self.scale.mul_((1.0 - 0.5 * bad) * (1.0 + grow)).clamp_(min=SMALLEST)
        self.good_steps.mul_(1.0 - grow)
        return unscaled
