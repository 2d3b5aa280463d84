"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from shoal.config.options import Optim


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of step `step` (1 is the first, `total_steps` the last)."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    span = max(total_steps - optim.warmup_steps, 1)
    progress = min((step - optim.warmup_steps) / span, 1.0)
    floor = optim.final_lr_fraction
    return optim.lr * (floor + (1 - floor) * _shape(optim, progress))


def _shape(optim: Optim, progress: float) -> float:
    """From 1 down to 0 over `progress` from 0 to 1."""
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":  # Loshchilov and Hutter 2017, eq. 5
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":  # warm-up, stable, decay: Hu et al. 2024 (MiniCPM), section 4
            return min(1.0, (1.0 - progress) / optim.decay_fraction)


def replanned(optim: Optim, step: int, before: int, after: int) -> str | None:
    """What becomes of the rate at `step` when a run planned for `before` steps is to take `after`, or None."""
    old, new = learning_rate(optim, step, before), learning_rate(optim, step, after)
    if before == after:
        return None
    change = "stays" if math.isclose(old, new, rel_tol=1e-9) else f"goes from {old:.3g} to {new:.3g}"
    return f"the {optim.schedule} schedule was planned for {before} steps and is now for {after}: at step {step} the learning rate {change}"
