"""The process beside a probe that imports torch: a crash or a hang there ends no probe. No torch here."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Final

from shoal.system.cpu import count_cores

MARK: Final = "shoal-torch:"


class TorchProcess:
    """Starts `torch_worker.py` at the first request, and again after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Return the worker's answer, with {"problem": why} if there is none within `seconds`."""
        process = self._process = self._process or _start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._end("the process with torch has ended")
        line = self._line(time.monotonic() + seconds)
        if line is None:
            return self._end(f"no answer within {seconds:.0f} s")
        if not line:
            process.wait()
            return self._end(f"the process with torch ended with {process.returncode}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._rest = None, b""

    def _end(self, problem: str) -> dict[str, Any]:
        self.close()
        return {"problem": problem}

    def _line(self, end: float) -> bytes | None:
        """Return the next answer; empty at the end of the output, None if `end` passes."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while True:
            line, mark, rest = self._rest.partition(b"\n")
            if mark:
                self._rest = rest
                if line.startswith(MARK.encode()):
                    return line.removeprefix(MARK.encode())
                continue
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            part = os.read(descriptor, 65536)
            if not part:
                return b""
            self._rest += part


def _start() -> subprocess.Popen[bytes]:
    # Waiting threads that spin would slow other nodes' work, if several share a machine
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(count_cores()))}
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.doctor.torch_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | quiet,
    )  # fmt: skip
