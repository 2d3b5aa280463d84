"""
The CPU's instructions as torch will use them, and how many cores are free. No torch.

Environment variables can disable instructions in torch and its libraries; disabled ones count as absent here too.
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

LOOK_SECONDS: Final = 0.1  # time that `free_cores` measures, part of the limit for all measuring at startup
_QUIET: Final = 0.5  # ignore a load average below this many cores

_INFO: Final = Path("/proc/cpuinfo")
_GROUP: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")  # cgroups and their limits


@functools.cache
def features() -> frozenset[str]:
    """Return the CPU's instruction sets by their Linux names; empty if they cannot be read."""
    if sys.platform == "darwin":
        return frozenset({"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else ())
    info = _first_processor()
    return frozenset((info.get("flags") or info.get("Features") or "").split())  # x86, Arm


@functools.cache
def model_name() -> str:
    """Return the CPU's name."""
    name = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else _first_processor().get("model name")
    return name or platform.processor() or platform.machine() or "CPU"


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products; without them such products are about 100 times slower."""
    if _leaves_unused(("BF16", "FP16", "AMX", "AVX10")):
        return False
    return bool(features() & {"avx512_bf16", "amx_bf16", "bf16"})


def has_tiles() -> bool:
    """Return whether the CPU has matrix tiles (AMX) for bfloat16."""
    return "amx_bf16" in features() and not _leaves_unused(("AMX",))


def multiplies_best_with_onednn() -> bool:
    """Return whether oneDNN multiplies float32 matrices faster than MKL, which has no AVX-512 kernels for AMD's CPUs."""
    is_amd = _first_processor().get("vendor_id") == "AuthenticAMD"
    return is_amd and "avx512f" in features() and not _leaves_unused(("AVX512", "AVX10"))


def instructions() -> tuple[str, ...]:
    """Return the instruction sets that affect speed and rounding and that torch may use."""
    found = ["amx_bf16"] * has_tiles()
    if multiplies_bfloat16():
        found += sorted(features() & {"avx512_bf16", "bf16"})
    return (*found, *sorted(features() & {"avx_vnni", "i8mm", "sve", "sve2"}))


def count_cores() -> int:
    """Return the number of cores this process may use, limited by its CPU affinity and its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def free_cores() -> float:
    """
    Return how many of the `count_cores()` cores other programs leave free now; takes at most `LOOK_SECONDS`.

    The load average covers a minute, including programs that have ended; so idle time is measured to confirm it.
    """
    cores = count_cores()
    load = os.getloadavg()[0] * cores / max(cores, os.cpu_count() or 1)
    if load < _QUIET:
        return float(cores)
    import psutil  # most starts do not need it

    return cores - min(float(cores), load, psutil.cpu_percent(interval=LOOK_SECONDS) / 100 * cores)


def _leaves_unused(needed: tuple[str, ...]) -> bool:
    """Return whether an environment variable limits torch or oneDNN to instruction sets without `needed`."""
    dnn = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    if dnn not in ("ALL", "DEFAULT") and not any(name in dnn for name in needed):
        return True
    return os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("avx2", "default")


def _first_processor() -> dict[str, str]:
    """Return the entry of the first processor; reading all would be slow on a large machine."""
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
    """Return the CPU limit of this process's cgroup (a container's, for example), in cores; Inf without one."""
    return min((_limit(folder) for folder in cgroups("cpu")), default=math.inf)


def cgroups(kind: str) -> list[Path]:
    """
    Return the folders of cgroups that may limit this process: the root (in a container, its own group) and its group.

    kind: the controller's name, "cpu" or "memory".
    """
    try:
        lines = _GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds == "" or kind in kinds.split(","):
            root = _GROUPS / kinds if kinds else _GROUPS
            found += [root, root / path.lstrip("/")]
    return found


def _limit(folder: Path) -> float:
    # Cgroup v2 has one file, v1 has two
    for quota, period in (
        ("cpu.max", ""),
        ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ):
        try:
            text = f"{(folder / quota).read_text()} {(folder / period).read_text() if period else ''}"
            allowed, of = (float(word) for word in text.split())
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
        if allowed > 0:
            return allowed / of
    return math.inf
