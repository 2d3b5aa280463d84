"""Peaks of the exact device, or none."""

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
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
    ],
)
def test_known(name: str, tflops: float) -> None:
    assert peak_flops(name, "bfloat16") == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "H1000",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA A100X",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI300X",
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
    ],
)
def test_unknown(name: str) -> None:
    assert find_device(name) is None
    assert peak_flops(name, "bfloat16") is None


def test_volta_and_turing_have_no_bfloat16() -> None:
    assert peak_flops("Tesla T4", "bfloat16") is None
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert peak_flops("Tesla T4", "float32") == pytest.approx(8.1e12)


def test_every_figure_has_a_source_and_a_plausible_order() -> None:
    for name, device in DEVICES.items():
        assert device.source, name
        if device.bfloat16 is not None and device.tf32 is not None:
            assert device.float32 <= device.tf32 * 1.01 < device.bfloat16 * 1.01
            assert device.bfloat16 / device.tf32 == pytest.approx(2, rel=0.02)
