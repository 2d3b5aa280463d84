"""Lines of this node's kernel log about failures that end a process: GPU errors, the out-of-memory killer, disks. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import Final

from shoal.run.log_lines import KERNEL, stamp

DEVICE: Final = Path("/dev/kmsg")
# Xid: an error of an NVIDIA GPU. A kernel log has thousands of other lines; these tell why a process ended.
_TELLING: Final = re.compile(
    r"NVRM: |Out of memory: Killed|Memory cgroup out of memory|oom-kill:|segfault at|traps: |Machine check|Hardware Error|"
    r"I/O error|EXT4-fs error|XFS .*(?:error|shutdown)|nfs: server|LustreError|mlx5_core.*(?:Link DOWN|health)|Link is Down"
)
_RECORD: Final = re.compile(rb"\d+,\d+,(\d+),[^;]*;(.*)")
MOST_BYTES: Final = 1 << 13  # of one record: the kernel's own maximum
MOST_RECORDS: Final = 20_000


def kernel_lines(since: float, device: Path = DEVICE) -> list[tuple[float, str]]:
    """
    Return (time in seconds since 1970, line) of telling lines since `since`, a time of the same kind.

    Empty if this process may not read the kernel's log, as in many containers.
    """
    began = time.time() - time.monotonic()  # the kernel counts from the start of the machine
    found = []
    with contextlib.suppress(OSError):
        reading = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        try:
            for record in _records(reading):
                when = began + int(record[1]) / 1e6
                text = record[2].decode("utf-8", "replace")
                if when >= since and _TELLING.search(text):
                    found.append((when, text))
        finally:
            os.close(reading)
    return found


def keep_kernel_lines(folder: Path, since: float) -> None:
    """Write this node's telling lines since `since`, if there are any, to a file in `folder`. Raises `OSError` if it cannot."""
    if lines := [f"{stamp(when, KERNEL)}{text}\n" for when, text in kernel_lines(since)]:
        (folder / f"kernel-{socket.gethostname()}.log").write_text("".join(lines), encoding="utf-8")


def _records(reading: int) -> list[re.Match[bytes]]:
    """Return the records that are there now, at most `MOST_RECORDS`. A read returns one record of the device."""
    found: list[re.Match[bytes]] = []
    for _ in range(MOST_RECORDS):
        try:
            data = os.read(reading, MOST_BYTES)
        except BrokenPipeError:  # records were overwritten before they were read: the next read continues after them
            continue
        except BlockingIOError:  # that was the last record
            break
        if not data:
            break
        found += [match for line in data.split(b"\n") if (match := _RECORD.match(line))]
    return found
