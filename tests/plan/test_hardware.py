"""Devices are told apart by their whole name, and unknown ones get no figure."""

from __future__ import annotations

import pytest

from shoal.plan.hardware import DEVICES, find_device, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known(name: str, tflops: float) -> None:
    assert peak_flops(name, "bfloat16") == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100X",
        "NVIDIA H20",
        "H100",
        "cpu",
        "",
    ],
)
def test_unknown_is_not_guessed(name: str) -> None:
    assert find_device(name) is None
    assert peak_flops(name, "bfloat16") is None


def test_no_bfloat16_units() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert peak_flops("Tesla T4", "float32") == 8.1e12


def test_figures_are_plausible() -> None:
    for device in DEVICES.values():
        assert device.source
        if device.bfloat16 and device.tf32:
            assert 1.9 < device.bfloat16 / device.tf32 < 2.1
            assert device.tf32 >= device.float32
