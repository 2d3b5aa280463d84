"""
Builds the caches of runs in a process of its own: `python -m shoal.report.curves.build`. No torch.

Reads lines of JSON, {"folder": of a run, "cache": folder or null}, and writes {"folder": ..., "share": of the log read}; at
the end of each run the share is 1. Ends at the end of its input, so also when the process that started it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from shoal.report.curves.curves import Curves
from shoal.report.curves.ranks import RankMap


def main() -> None:
    """Build the caches that are asked for."""
    with contextlib.suppress(OSError):
        os.nice(5)  # training, and the server that waits for this, come first
    for line in sys.stdin:
        asked = json.loads(line)
        _build(asked["folder"], Path(asked["cache"]) if asked["cache"] else None)


def _build(folder: str, cache: Path | None) -> None:
    def say(share: float) -> None:
        print(json.dumps({"folder": folder, "share": share}), flush=True)

    with contextlib.suppress(OSError):  # the run was removed, or cannot be read
        Curves.open(Path(folder), cache, lambda share: say(0.98 * share))
        RankMap.open(Path(folder), cache)
    say(1.0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
