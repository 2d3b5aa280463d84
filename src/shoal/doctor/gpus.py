"""
A node's GPUs as `nvidia-smi` and the kernel's log describe them. No torch.

`nvidia-smi -q -x` writes XML that later drivers extend, so a missing element counts as unknown. The command's list form
(`--query-gpu`) fails as a whole if a driver does not know one of the names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from shoal.doctor.command import run_quietly

SMI_SECONDS: Final = 15.0  # a node of 8 GPUs without persistence mode needs about 8
_XID: Final = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+), ?(.*)")
_SLOWDOWNS: Final = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")


def look_at_gpus() -> dict[str, Any]:
    """
    Return {"problem", "driver", "cards", "xids", "xid_unknown"} for JSON; cards is empty on a node without GPUs.

    problem: why nvidia-smi failed; empty if it did not, or if the node has no NVIDIA driver. xids: [PCI address, number, text] of
    each line of the kernel's log since the start of the machine. xid_unknown: why the log could not be read.
    """
    text, why = run_quietly(["nvidia-smi", "-q", "-x"], SMI_SECONDS)
    if why == "missing":
        has_driver = Path("/proc/driver/nvidia/version").exists()
        return _found(problem="nvidia-smi is not in PATH, but the driver is loaded" if has_driver else "")
    if why:
        return _found(problem=why)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return _found(problem=f"its output is not XML ({error})")
    cards = [_card(gpu) for gpu in root.findall("gpu")]
    lines, why = run_quietly(["dmesg"], 5.0)
    xids = [list(found.groups()) for line in lines.splitlines() if (found := _XID.search(line))]
    return _found(driver=root.findtext("driver_version", "").strip(), cards=cards, xids=xids, xid_unknown=why)


def _found(**facts: Any) -> dict[str, Any]:
    return {"problem": "", "driver": "", "cards": [], "xids": [], "xid_unknown": "", **facts}


def _card(gpu: ElementTree.Element) -> dict[str, Any]:
    """Return one GPU; a number that the driver does not tell is None."""
    volatile = gpu.find("ecc_errors/volatile")
    uncorrected = [e for e in volatile if "uncorrectable" in e.tag] if volatile is not None else []
    processes = gpu.findall("processes/process_info")
    return {
        "address": gpu.get("id", ""),
        "name": gpu.findtext("product_name", "").strip(),
        "mebibytes": _number(gpu.findtext("fb_memory_usage/total")),
        "used_mebibytes": _number(gpu.findtext("fb_memory_usage/used")),
        "uncorrected": sum(int(_number(e.text) or 0) for e in uncorrected),
        "waits_for_reset": any(_says_yes(gpu, name) for name in _RESETS),
        "slowdowns": [name for name in _SLOWDOWNS if _is_active(gpu, name)],
        "watts": _number(_first(gpu, "current_power_limit", "enforced_power_limit", "power_limit")),
        "default_watts": _number(_first(gpu, "default_power_limit")),
        "processes": [
            [int(_number(p.findtext("pid")) or 0), p.findtext("process_name", "").strip()]
            for p in processes
            if "C" in p.findtext("type", "C")  # C computes; G draws the screen
        ],
    }


_RESETS: Final = (
    "remapped_rows/remapped_row_pending", "remapped_rows/remapped_row_failure", "retired_pages/pending_retirement",
    "gpu_reset_status/reset_required", "ecc_errors/channel_repair_pending", "ecc_errors/tpc_repair_pending",
)  # fmt: skip


def _says_yes(gpu: ElementTree.Element, path: str) -> bool:
    return gpu.findtext(path, "").strip() == "Yes"


def _is_active(gpu: ElementTree.Element, name: str) -> bool:
    """Return whether a reason for lower clocks is active; drivers before 535 call it throttle reason."""
    paths = (
        f"clocks_event_reasons/clocks_event_reason_{name}",
        f"clocks_throttle_reasons/clocks_throttle_reason_{name}",
    )
    return any(gpu.findtext(path, "").strip() == "Active" for path in paths)


def _first(gpu: ElementTree.Element, *names: str) -> str | None:
    """Return the first power reading of these names; drivers before 530 call the group power_readings."""
    for name in names:
        for group in ("gpu_power_readings", "power_readings"):
            if text := gpu.findtext(f"{group}/{name}"):
                return text
    return None


def _number(text: str | None) -> float | None:
    """Return the number in "80999 MiB" or "500.00 W"; None for "N/A"."""
    found = re.match(r"\s*(-?\d+(\.\d+)?)", text or "")
    return float(found[1]) if found else None
