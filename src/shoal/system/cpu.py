"""
What the CPU of this machine can do, as torch will use it, and how much of it is free. No torch.

torch and the libraries below it can be told to leave instructions unused, by variables that they read when they start;
what they are told to leave unused counts as absent here too.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 0.1  # how long `free_cores` looks, of all the time that may be spent on measuring at a start
_QUIET: Final = 0.5  # a load average below this many cores is not looked into

_INFO: Final = Path("/proc/cpuinfo")
_GROUP: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")  # of processes, with their limits


@functools.cache
def features() -> frozenset[str]:
    """Return the CPU's instruction sets by the names that Linux has for them; empty where they cannot be read."""
    if sys.platform == "darwin":
        return frozenset({"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else ())
    info = _first_processor()
    return frozenset((info.get("flags") or info.get("Features") or "").split())  # x86, Arm


@functools.cache
def model_name() -> str:
    """Return what the CPU calls itself."""
    name = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else _first_processor().get("model name")
    return name or platform.processor() or platform.machine() or "CPU"


def multiplies_bfloat16() -> bool:
    """Return whether matrix products in bfloat16 have instructions: without them they are some hundred times slower."""
    if _leaves_unused(("BF16", "FP16", "AMX", "AVX10")):
        return False
    return bool(features() & {"avx512_bf16", "amx_bf16", "bf16"})


def has_tiles() -> bool:
    """Return whether bfloat16 has matrix tiles (AMX)."""
    return "amx_bf16" in features() and not _leaves_unused(("AMX",))


def instructions() -> tuple[str, ...]:
    """Return the instruction sets that decide speed and rounding, as far as torch may use them."""
    found = ["amx_bf16"] * has_tiles()
    if multiplies_bfloat16():
        found += sorted(features() & {"avx512_bf16", "bf16"})
    return (*found, *sorted(features() & {"avx_vnni", "i8mm", "sve", "sve2"}))


def count_cores() -> int:
    """Return the cores that this process may use: those it may run on, and within the CPU time of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def free_cores() -> float:
    """
    Return the cores of `count_cores` that other programs leave free now; takes `LOOK_SECONDS` at most.

    The load average remembers a minute, also what has ended since: a look at the idle time must agree.
    """
    cores = count_cores()
    load = os.getloadavg()[0] * cores / max(cores, os.cpu_count() or 1)
    if load < _QUIET:
        return float(cores)
    import psutil  # what most starts do not need

    return cores - min(float(cores), load, psutil.cpu_percent(interval=LOOK_SECONDS) / 100 * cores)


def _leaves_unused(needed: tuple[str, ...]) -> bool:
    """Return whether torch, or oneDNN below it, was told to use no more than an instruction set without `needed`."""
    dnn = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    if dnn not in ("ALL", "DEFAULT") and not any(name in dnn for name in needed):
        return True
    return os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("avx2", "default")


def _first_processor() -> dict[str, str]:
    """Return the lines of the first processor: of many, all of them would take long to read."""
    found: dict[str, str] = {}
    if _INFO.is_file():
        with _INFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                key, _, value = line.partition(":")
                found[key.strip()] = value.strip()
    return found


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _quota() -> float:
    """Return the cores whose time this process's control group may use, as containers have it; infinite without one."""
    return min((_limit(folder) for folder in _group_folders()), default=math.inf)


def _group_folders() -> list[Path]:
    """Return where the limits of CPU time stand: of this process's own group, and of what a container sees as the root."""
    try:
        lines = _GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds == "" or "cpu" in kinds.split(","):
            root = _GROUPS / kinds if kinds else _GROUPS
            found += [root, root / path.lstrip("/")]
    return found


def _limit(folder: Path) -> float:
    for quota, period in (
        ("cpu.max", ""),
        ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ):  # the second version has one file
        try:
            text = f"{(folder / quota).read_text()} {(folder / period).read_text() if period else ''}"
            allowed, of = (float(word) for word in text.split())
        except (OSError, ValueError):  # none of this kind, or "max"
            continue
        if allowed > 0:
            return allowed / of
    return math.inf
