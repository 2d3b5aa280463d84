"""Is a step sound?"""

from __future__ import annotations

import math

from shoal.errors import DivergedError


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """
    Raise `DivergedError` where a step's loss or gradient norm is no number.

    It comes one step late, so the update was made; what was saved before stands.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergedError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}. Nothing was saved since; the last checkpoint stands. "
            "A lower optim.lr, a longer optim.warmup_steps or another train.seed may help"
        )
