"""
Runs a command on a node for a launcher elsewhere, over the standard input and output of ssh. No torch.

    ssh node1 python -m shoal.launch.attached

The first line of standard input is a JSON object: the command, its folder and its additional environment variables, which thus
do not show in the node's list of processes. Each later line names a signal for the command. When the input ends, because the
launcher or the network is gone, the command gets SIGTERM, so that a run saves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Final

from shoal.errors import EXIT_BAD_INPUT

ATTACHED: Final = (
    "shoal is attached"  # the first line of output: ssh has reached the node, and shoal is installed there
)
SIGNALS: Final = ("SIGTERM", "SIGINT")


def task(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> str:
    """Return the first line of input."""
    return json.dumps({"command": list(command), "folder": folder, "environment": dict(environment)}) + "\n"


def main() -> int:
    """Run the command; return its exit code, 2 if it cannot be started, or 128 + N if signal N ended it."""
    asked = json.loads(sys.stdin.readline())
    print(ATTACHED, flush=True)
    try:
        process = subprocess.Popen(
            asked["command"], cwd=asked["folder"], env=os.environ | asked["environment"], stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        print(f"shoal: cannot start {asked['command'][0]} in {asked['folder']}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: process.terminate())
    threading.Thread(target=_obey, args=(process, sys.stdin), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _obey(process: subprocess.Popen[bytes], orders: IO[str]) -> None:
    """Send the process each signal that a line names, and SIGTERM when the input ends."""
    with contextlib.suppress(OSError):
        for line in orders:
            if line.strip() in SIGNALS:
                process.send_signal(signal.Signals[line.strip()])
    process.terminate()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread still reads the input
