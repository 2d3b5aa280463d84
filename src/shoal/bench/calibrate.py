"""`shoal plan --calibrate`: measures this machine's operations and messages with the numbers of processes that a run may have."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from shoal.bench.worker_process import ANSWER, run_module
from shoal.launch.torchrun import count_gpus
from shoal.plan.speed.calibration import Calibration, Setting, curves_of
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, free_cores

MOST_PROCESSES: Final = 8
LIMIT_SECONDS: Final = 300.0  # beyond those of measuring, after which a setting's processes are ended


def calibrate(
    seconds: float, processes: int | None, dtype: str | None, narrator: Narrator, warn: Callable[[str], None]
) -> Calibration:
    """
    Measure this machine, and return its rates.

    seconds: of measuring, all settings together; starting processes takes more. processes: how many work at the same time; None
    measures 1, 2, 4 and 8, up to the GPUs, or the cores and at least 2. dtype: None takes bfloat16 on GPUs, and float32 on CPUs.
    """
    gpus = count_gpus()
    dtype = dtype or ("bfloat16" if gpus else "float32")
    most = min(MOST_PROCESSES, gpus or max(2, count_cores()))
    counts = [processes] if processes else [2**n for n in range(most.bit_length())]
    cores = count_cores()
    if (free := free_cores()) < 0.8 * cores:
        warn(f"other programs use {cores - free:.1f} of {cores} cores now; what is measured will be too slow")
    found = []
    for count in counts:
        threads = max(1, cores // count)
        with narrator.phase(f"measuring {count} process{'es' * (count > 1)} of {threads} thread{'s' * (threads > 1)}"):
            found.append(_measure(count, threads, dtype, seconds / len(counts)))
    first = found[0]
    settings = []
    for each in found:
        measured, links, waits = (curves_of(each[name]) for name in ("curves", "links", "waits"))
        settings.append(Setting(each["processes"], each["threads"], dtype, measured, links, waits, each["stretch"]))
    return Calibration(first["device"], gpus > 0, cores, first["torch"], time.time(), settings)


def _measure(processes: int, threads: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Measure one setting in new processes; return what the first one writes."""
    with tempfile.TemporaryDirectory(prefix="shoal-calibrate-") as name:
        answer = Path(name) / ANSWER
        return run_module(
            "shoal.bench.calibration_worker", [str(answer), dtype, str(seconds), str(threads)], answer, processes=processes,
            threads=threads, limit_seconds=LIMIT_SECONDS + seconds, what="the calibration",
        )  # fmt: skip
