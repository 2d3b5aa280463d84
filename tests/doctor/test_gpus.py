"""GPUs as nvidia-smi's XML describes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shoal.doctor.gpus import look_at_gpus
from tests.doctor.recorded import NO_DRIVER, XID_79, process, smi


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: what the doctor sees if nvidia-smi prints a text."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def look(text: str, *, log: str = "", code: int = 0) -> dict[str, Any]:
        (tmp_path / "out").write_text(text)
        (tmp_path / "log").write_text(log)
        for name, script in {"nvidia-smi": f"cat {tmp_path}/out; exit {code}", "dmesg": f"cat {tmp_path}/log"}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        return look_at_gpus()

    return look


def test_a_healthy_node(seen: Any) -> None:
    found = seen(smi(count=8))
    assert (found["problem"], found["driver"], len(found["cards"])) == ("", "570.124.06", 8)
    card = found["cards"][0]
    assert (card["name"], card["mebibytes"], card["watts"]) == ("NVIDIA H100 80GB HBM3", 81559.0, 700.0)
    assert not any(card[key] for key in ("uncorrected", "waits_for_reset", "slowdowns", "processes"))


def test_an_older_driver_has_other_names(seen: Any) -> None:
    old = smi(changed={"hw_thermal": "Active"}).replace("clocks_event_reason", "clocks_throttle_reason")
    old = old.replace("gpu_power_readings", "power_readings").replace("current_power_limit", "power_limit")
    card = seen(old)["cards"][1]
    assert card["slowdowns"] == ["hw_thermal_slowdown"]
    assert card["watts"] == 700.0


def test_a_driver_that_tells_little(seen: Any) -> None:
    card = seen(
        "<nvidia_smi_log><gpu id='1'><fb_memory_usage><total>N/A</total></fb_memory_usage></gpu></nvidia_smi_log>"
    )
    assert card["cards"] == [{
        "address": "1", "name": "", "mebibytes": None, "used_mebibytes": None, "uncorrected": 0, "waits_for_reset": False,
        "slowdowns": [], "watts": None, "default_watts": None, "processes": [],
    }]  # fmt: skip


def test_processes_and_errors(seen: Any) -> None:
    found = seen(smi(changed={"processes": process(7, "python")}), log=XID_79)
    assert found["cards"][1]["processes"] == [[7, "python"]]
    assert [(address, number) for address, number, _ in found["xids"]] == [("0000:2b:00", "79")]


def test_a_driver_that_fails(seen: Any) -> None:
    assert seen(NO_DRIVER, code=9)["problem"] == NO_DRIVER
    assert "not XML" in seen("Unable to determine the device handle")["problem"]
