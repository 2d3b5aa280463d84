"""The cost of a run against sums made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ShoalError
from shoal.report.runs.cost import cost, prices, prices_of
from shoal.run.folder import RunFolder
from shoal.run.goodput import account

HOUR = 3_600_000_000
BEGAN = 1_760_000_000_000_000


def write(folder: Path, lives: list[dict[str, Any]], starts: list[dict[str, Any]]) -> RunFolder:
    folder.mkdir()
    (folder / "time.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lives))
    (folder / "events.jsonl").write_text("".join(json.dumps({"event": "started"} | each) + "\n" for each in starts))
    (folder / "config.yaml").write_text("launch:\n  processes: 2\n  nodes: 2\n")
    return RunFolder(folder)


def life(began_hours: float, first: int, last: int, **hours: float) -> list[dict[str, Any]]:
    """Return the lines of a life that trained the steps after `first` to `last`."""
    begun = BEGAN + int(began_hours * HOUR)
    spent = {category: int(each * HOUR) for category, each in hours.items()}
    return [
        {"life": begun, "step": first, "reached": 0, "spent": {"start": spent["start"]}, "begin": True},
        {"life": begun, "step": last, "reached": spent["step"], "spent": spent},
    ]


def start(hours: float, processes: int, gpu: str | None) -> dict[str, Any]:
    gpus = [{"name": gpu, "memory_bytes": 80e9}] * processes if gpu else []
    return {
        "time": (BEGAN + hours * HOUR) / 1e6, "step": 0, "processes": processes, "device": "cuda:0" if gpu else "cpu", "gpus": gpus,
        "device_name": gpu or "AMD EPYC",
    }  # fmt: skip


@pytest.fixture
def two_lives(tmp_path: Path) -> RunFolder:
    """8 H100 for 2.5 h to step 100; an hour idle; then 4 A100 for 1.25 h, again from step 80 to 120."""
    lives = life(0, 0, 100, start=0.25, step=2.0, evaluation=0.25) + life(3.5, 80, 120, start=0.25, step=1.0)
    return write(
        tmp_path / "run", lives, [start(0.2, 8, "NVIDIA H100 80GB HBM3"), start(3.7, 4, "NVIDIA A100-SXM4-80GB")]
    )


def table(folder: Path, text: str) -> Path:
    file = folder / "prices.yaml"
    file.write_text(text)
    return file


def test_hours_and_money_of_two_lives(two_lives: RunFolder, tmp_path: Path) -> None:
    found = cost(
        two_lives, prices(table(tmp_path, "currency: EUR\nper_device_hour: {'*H100*': 3.0, 'NVIDIA A100*': 1.5}\n"))
    )
    assert found is not None
    # 20 of the first life's 100 steps were repeated: 0.4 h of 8 H100
    hours = {
        "step": 8 * 1.6 + 4 * 1.0,
        "lost": 8 * 0.4,
        "start": 8 * 0.25 + 4 * 0.25,
        "evaluation": 8 * 0.25,
        "idle": 8 * 1.0,
    }
    assert found.hours == pytest.approx({category: hours.get(category, 0) for category in found.hours})
    assert found.device_hours == pytest.approx(8 * 2.5 + 4 * 1.25)
    assert found.amount == pytest.approx(3.0 * 8 * 2.5 + 1.5 * 4 * 1.25)
    assert found.amounts["lost"] == pytest.approx(3.0 * 8 * 0.4)
    assert found.amounts["idle"] == pytest.approx(3.0 * 8)
    assert found.amounts["step"] == pytest.approx(3.0 * 8 * 1.6 + 1.5 * 4)
    assert found.in_words() == "67.50 EUR for 25 device-hours (9.60 EUR of it lost)"


def test_without_prices_machines_are_ones_own(two_lives: RunFolder) -> None:
    found = cost(two_lives, prices(None))
    assert found is not None
    assert found.amount == 0
    assert found.in_words() == "your own machines: 0, 25 device-hours"


def test_a_device_without_a_price_is_named(two_lives: RunFolder, tmp_path: Path) -> None:
    found = cost(two_lives, prices(table(tmp_path, "currency: EUR\nper_device_hour: {'*H100*': 3.0}\n")))
    assert found is not None
    assert found.unpriced == ["NVIDIA A100-SXM4-80GB"]
    assert found.in_words() == "no price for NVIDIA A100-SXM4-80GB, 25 device-hours"


def test_a_node_without_gpus_is_one_device(tmp_path: Path) -> None:
    """4 processes, 2 on each node of launch.processes 2."""
    run = write(tmp_path / "cpu", life(0, 0, 10, start=0.5, step=1.5), [start(0.1, 4, None)])
    found = cost(run, prices(table(tmp_path, "currency: USD\nper_device_hour: {CPU: 0.5}\n")))
    assert found is not None
    assert found.device_hours == pytest.approx(2 * 2.0)
    assert found.amount == pytest.approx(2.0)
    assert json.loads(json.dumps(found.as_json()))["devices"] == [{"name": "AMD EPYC", "per_hour": 0.5}]


def test_one_device_costs_the_time_of_the_account(two_lives: RunFolder) -> None:
    plain, by_devices = account(two_lives.time_file), account(two_lives.time_file, lambda life: 3)
    assert by_devices.spent == {category: 3 * each for category, each in plain.spent.items()}


def test_a_run_without_a_record_of_time_has_no_cost(tmp_path: Path) -> None:
    assert cost(RunFolder(tmp_path), prices(None)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not YAML"),
        ("currency: EUR\n", "needs two keys"),
        ("currency: EUR\nper_device_hour: {H100: cheap}\n", "the price of H100 is 'cheap'"),
        ("currency: EUR\nper_device_hour: {H100: -1}\n", "the price of H100 is -1"),
    ],
)
def test_a_table_that_is_none_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=message):
        prices(table(tmp_path, text))


def test_the_table_beside_the_runs_is_found(tmp_path: Path) -> None:
    assert prices_of(tmp_path).by_pattern is None
    table(tmp_path, "currency: EUR\nper_device_hour: {'*': 2}\n")
    assert prices_of(tmp_path).of("anything", "cuda") == 2.0
    with pytest.raises(ShoalError, match="cannot be read"):
        prices_of(tmp_path, tmp_path / "missing.yaml")
