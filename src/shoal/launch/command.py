"""The command line that started a run. Workers have another one, so the launcher hands the user's on. No torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shoal.mesh.place import is_launched

COMMAND: Final = "SHOAL_COMMAND"


def hand_on(command: Sequence[str]) -> None:
    """Tell this process's workers the user's command line."""
    os.environ[COMMAND] = json.dumps(list(command))


def users_command() -> list[str]:
    """Return the user's command line; under another launcher, or in a script that calls `shoal.train`, this process's own."""
    if is_launched() and (handed := os.environ.get(COMMAND)):
        return [str(part) for part in json.loads(handed)]
    program, *rest = sys.argv or ["python"]
    is_shoal = Path(program).name in ("shoal", "__main__.py")
    return ["shoal" if is_shoal else program, *rest]
