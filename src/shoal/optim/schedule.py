"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from shoal.config.options import Optim


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step`; 1 is the first, `total_steps` the last."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    span = max(total_steps - optim.warmup_steps, 1)
    progress = min((step - optim.warmup_steps) / span, 1.0)
    floor = optim.final_lr_fraction
    return optim.lr * (floor + (1 - floor) * _shape(optim, progress))


def _shape(optim: Optim, progress: float) -> float:
    """Return the schedule's factor, from 1 down to 0 as `progress` goes from 0 to 1; "constant" remains at 1."""
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":  # Loshchilov and Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":  # warmup, stable, decay: Hu et al. 2024 (MiniCPM, arXiv:2404.06395), section 4
            return min(1.0, (1.0 - progress) / optim.decay_fraction)


def replanned(optim: Optim, step: int, before: int, after: int) -> str | None:
    """Describe how the learning rate at `step` changes if a run takes `after` steps, not `before`; None if both are equal."""
    old, new = learning_rate(optim, step, before), learning_rate(optim, step, after)
    if before == after:
        return None
    change = "stays" if math.isclose(old, new, rel_tol=1e-9) else f"goes from {old:.3g} to {new:.3g}"
    return (
        f"the {optim.schedule} schedule was planned for {before} steps and is now for {after}: at step {step} the learning "
        f"rate {change}"
    )
