"""The trackers by name: what each is called, the package that it needs, and the variable that holds its key. No torch."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Known:
    """A tracker that shoal can write to."""

    title: str
    package: str  # what it imports
    key: str = ""  # the environment variable without which it works offline


TRACKERS: Final = {
    "tensorboard": Known("TensorBoard", "tensorboard"),
    "wandb": Known("Weights & Biases", "wandb", "WANDB_API_KEY"),
    "comet": Known("Comet", "comet_ml", "COMET_API_KEY"),
    "mlflow": Known("MLflow", "mlflow", "MLFLOW_TRACKING_URI"),
}
_SPELLINGS: Final = {"tb": "tensorboard", "comet_ml": "comet", "weights & biases": "wandb"}


def unknown(name: str) -> str:
    """Return the message for an unknown tracker; "" for a known one."""
    if name in TRACKERS:
        return ""
    near = _SPELLINGS.get(name.lower()) or next(iter(difflib.get_close_matches(name.lower(), TRACKERS, 1)), None)
    hint = f"did you mean {near}? " if near else ""
    return f"there is no tracker {name}; {hint}valid: {', '.join(TRACKERS)}"


def check_installed(names: Sequence[str]) -> None:
    """Raise `ShoalError` if the package of a tracker is missing. Imports none of them."""
    missing = [name for name in names if importlib.util.find_spec(TRACKERS[name].package) is None]
    if missing:
        what = " and ".join(TRACKERS[name].title for name in missing)
        raise ShoalError(
            f"track.to names {what}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'shoal[{','.join(missing)}]', or remove {' and '.join(missing)} from --track"
        )
