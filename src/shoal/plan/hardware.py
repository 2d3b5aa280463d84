"""
Peak dense throughput of known devices. Data sheet figures "with sparsity" are halved.

A device that is not listed has no peak, since MFU against a wrong peak is worse than none. A partition (MIG), a laptop
version or an export variant of a card is a different device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Arithmetic = Literal["bfloat16", "tf32", "float32"]


@dataclass(frozen=True)
class Device:
    """Dense TFLOP/s with float32 accumulation; None: the device lacks such units."""

    bfloat16: float | None
    tf32: float | None
    float32: float
    source: str


# A pattern matches the whole name from torch.cuda.get_device_name, without "NVIDIA " and "Tesla ".
DEVICES: Final[dict[str, Device]] = {
    # Blackwell
    r"GB200": Device(2500, 1250, 80, "NVIDIA GB200 NVL72 data sheet, per GPU"),
    r"B200": Device(2250, 1125, 75, "NVIDIA HGX B200 data sheet, per GPU"),
    r"GeForce RTX 5090": Device(209.5, 104.8, 104.8, "NVIDIA RTX Blackwell GPU architecture white paper, appendix"),
    # Hopper
    r"GH200 (480GB|144G HBM3e)": Device(989.4, 494.7, 66.9, "NVIDIA GH200 data sheet"),
    r"H200( SXM)?": Device(989.4, 494.7, 66.9, "NVIDIA H200 data sheet, SXM"),
    r"H200 NVL": Device(835.5, 417.5, 60, "NVIDIA H200 data sheet, NVL"),
    r"H100 (80GB HBM3|64GB HBM2|96GB HBM3|SXM5.*)": Device(
        989.4, 494.7, 66.9, "NVIDIA H100 architecture white paper, SXM5"
    ),
    r"H100 PCIe": Device(756, 378, 51.2, "NVIDIA H100 architecture white paper, PCIe"),
    r"H100 NVL": Device(835.5, 417.5, 60, "NVIDIA H100 NVL data sheet, per GPU"),
    # Ada
    r"L4": Device(121, 60, 30.3, "NVIDIA L4 data sheet"),
    r"L40": Device(181.05, 90.5, 90.5, "NVIDIA L40 data sheet"),
    r"L40S": Device(362.05, 183, 91.6, "NVIDIA L40S data sheet"),
    r"GeForce RTX 4090": Device(165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
    r"RTX 6000 Ada Generation": Device(364.2, 182.1, 91.1, "NVIDIA RTX 6000 Ada data sheet"),
    # Ampere
    r"A100-(SXM4|PCIE|PCIe)-(40|80)GB|A100 80GB PCIe": Device(312, 156, 19.5, "NVIDIA A100 data sheet"),
    r"A30": Device(165, 82, 10.3, "NVIDIA A30 data sheet"),
    r"A40": Device(149.7, 74.8, 37.4, "NVIDIA A40 data sheet"),
    r"A10": Device(125, 62.5, 31.2, "NVIDIA A10 data sheet"),
    r"A10G": Device(70, 35, 31.5, "NVIDIA A10G data sheet (its tensor cores are slower than A10's)"),
    r"RTX A6000": Device(154.8, 77.4, 38.7, "NVIDIA RTX A6000 data sheet"),
    r"GeForce RTX 3090": Device(71, 35.6, 35.6, "NVIDIA GA102 architecture white paper, appendix A"),
    r"GeForce RTX 3090 Ti": Device(80, 40, 40, "NVIDIA GA102 architecture white paper, updated for RTX 3090 Ti"),
    # The tensor cores of Volta and Turing multiply only float16
    r"V100-SXM2-(16|32)GB.*": Device(None, None, 15.7, "NVIDIA V100 data sheet, NVLink"),
    r"V100-PCIE-(16|32)GB": Device(None, None, 14.0, "NVIDIA V100 data sheet, PCIe"),
    r"T4": Device(None, None, 8.1, "NVIDIA T4 data sheet"),
}


def find_device(name: str) -> Device | None:
    """Return the device of this name, as CUDA reports it; None if it is not listed."""
    model = re.sub(r"^(NVIDIA |Tesla )*", "", name.strip())
    for pattern, device in DEVICES.items():
        if re.fullmatch(pattern, model):
            return device
    return None


def peak_flops(name: str, dtype: Arithmetic) -> float | None:
    """
    Return the dense FLOP/s of the device of this name; None if it is unknown or lacks units for `dtype`.

    `float32` is plain float32; pass `tf32` if matrix products may round to it.
    """
    device = find_device(name)
    tflops: float | None = getattr(device, dtype) if device else None
    return None if tflops is None else tflops * 1e12
