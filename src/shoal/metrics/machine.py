"""The device's name, and the facts that decide the last bits of a sum."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping

import torch

from shoal.system import cpu


def device_name(device: torch.device) -> str:
    """Return the device's name, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{cpu.model_name()} ({count} thread{'s' * (count > 1)} a process)"


def instruction_sets() -> str:
    """Return the instruction set of torch's kernels, and the further instructions available to oneDNN."""
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *cpu.instructions()])


def bits_depend_on(device: torch.device) -> dict[str, str | int]:
    """
    Return what a step's last bits depend on besides config and layout: processor, instructions, libraries, threads.

    The processor matters, not only its instructions: libraries choose the blocking of matrix products by its cache sizes.
    """
    built = torch.__config__.show()
    found: dict[str, str | int] = {
        "processor": cpu.model_name(),
        "instructions": instruction_sets(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name, pattern in (("mkl", r"Math Kernel Library Version ([\d.]+)"), ("onednn", r"MKL-DNN v([\d.]+)")):
        if match := re.search(pattern, built):
            found[name] = match[1]
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
    return found


def what_differs(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return the differences between two results of `bits_depend_on` in one line; empty if there are none."""
    return ", ".join(f"{k} {before.get(k, 'none')} -> {v}" for k, v in now.items() if before.get(k) != v)
