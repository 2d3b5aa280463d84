"""Commands of the system that may be missing, fail or hang. No torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence


def run_quietly(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """
    Return (output, why it failed).

    The reason is empty if the command ended with 0, and "missing" if there is no such program. seconds: time limit.
    """
    if shutil.which(command[0]) is None:
        return "", "missing"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {seconds:.0f} s"
    except OSError as error:
        return "", error.strerror or str(error)
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    return done.stdout, "" if done.returncode == 0 else (lines[0] if lines else f"exit code {done.returncode}")
