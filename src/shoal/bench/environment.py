"""A description of the machine and its software, for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from shoal import __version__
from shoal.metrics.machine import instruction_sets
from shoal.plan.hardware import peak_flops
from shoal.system import cpu
from shoal.system.torch_private import is_tested, tested_range

PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "safetensors", "transformers", "accelerate")
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "PYTORCH_ALLOC_CONF",
)


def describe() -> str:
    """
    Return versions, devices, threads, memory and commit, one per line.

    It contains no paths and, of the environment, only `VARIABLES`, so no secrets.
    """
    at = f" (commit {commit()})" if commit() else ""
    lines = {"shoal": f"{__version__}{at}", "python": platform.python_version(), "system": platform.platform()}
    lines |= {package: _version(package) or "not installed" for package in PACKAGES}
    tested = is_tested(lines["torch"])
    lines["torch"] += f" ({'' if tested else 'not '}in the tested range, {tested_range()})"
    lines["cpu"] = f"{cpu.model_name()}, {psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    lines["cpu features"] = instruction_sets()
    lines["memory"] = (
        f"{psutil.virtual_memory().total / 2**30:.1f} GiB, {psutil.virtual_memory().available / 2**30:.1f} GiB free"
    )
    lines["torch threads"] = f"{torch.get_num_threads()} within an operator, {torch.get_num_interop_threads()} between"
    lines |= _cuda() if torch.cuda.is_available() else {"cuda": "no device"}
    lines["backends"] = ", ".join(b for b in ("gloo", "nccl", "mpi") if torch.distributed.is_backend_available(b))
    lines |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _cuda() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    found = {"cuda": f"{torch.version.cuda}, cudnn {cudnn}, nccl {nccl}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        peak = peak_flops(properties.name, "bfloat16")
        known = f"{peak / 1e12:.0f} TFLOP/s bfloat16" if peak else "peak not in the table: set metrics.peak_tflops"
        found[f"gpu {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {known}"
    return found


def facts(device: torch.device) -> dict[str, Any]:
    """Return what the speed of this process depends on besides its config: commit, versions, hardware, instruction sets."""
    versions = {"shoal": __version__, "python": platform.python_version()}
    versions |= {package: found for package in PACKAGES if (found := _version(package))}
    hardware: dict[str, str | int] = {
        "cpu": cpu.model_name(), "cores": cpu.count_cores(), "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }  # fmt: skip
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        hardware |= {"gpu": torch.cuda.get_device_name(device), "gpus": torch.cuda.device_count()}
    return {"commit": commit(), "versions": versions, "hardware": hardware, "instructions": instruction_sets()}


def _version(package: str) -> str:
    """Return a package's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Return the commit of an editable installation, or an empty string."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
