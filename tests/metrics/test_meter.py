"""MFU is reported against a published or configured peak, or not at all."""

from __future__ import annotations

import pytest
import torch

from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.metrics import meter
from shoal.metrics.meter import Meter
from shoal.metrics.moment import Moment
from shoal.plan.estimate import flops_per_token
from shoal.resolve.resolve import resolve

CPU = Mesh(Place(), torch.device("cpu"))
GPU = Mesh(Place(), torch.device("cuda"))


@pytest.fixture(autouse=True)
def _no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `Moment` by one on the CPU: without CUDA, torch creates no events. No test here reads a time."""
    monkeypatch.setattr(meter, "Moment", lambda device: Moment(torch.device("cpu")))


@pytest.fixture
def config() -> Config:
    return resolve(
        None, [("model.vocab_size", "5000", "--"), ("train.steps", "1", "--"), ("data.corpus", "dummy", "--")]
    ).config


def test_a_cpu_has_none(config: Config) -> None:
    found = Meter(config, CPU)
    assert found.mfu(1000.0) is None
    assert found.describe_mfu() == ""


@pytest.mark.parametrize("mesh", [CPU, GPU])
def test_a_peak_that_is_given_counts(mesh: Mesh, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "device_name", lambda device: "NVIDIA GeForce GTX 1080")
    found = Meter(config.replace("metrics", peak_tflops=0.5), mesh)
    assert found.mfu(1000.0) == pytest.approx(
        1000 * flops_per_token(config.model, config.data.seq_len, "causal") / 5e11
    )
    assert "metrics.peak_tflops" in found.describe_mfu()


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA GeForce GTX 1080", None)])
def test_a_gpu_has_its_data_sheets_or_none(
    name: str, peak: float | None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "device_name", lambda device: name)
    found = Meter(config.replace("train", dtype="bfloat16"), GPU)
    needed = flops_per_token(config.model, config.data.seq_len, "causal")
    assert found.mfu(1e6) == (None if peak is None else pytest.approx(1e6 * needed / peak))
    assert ("metrics.peak_tflops" in found.describe_mfu()) == (peak is None)
