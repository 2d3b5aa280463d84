"""The dtype chosen for `train.dtype: auto` on a CPU, and the warning about a slow one."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from shoal.config.options import Config
from shoal.launch import torchrun
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.run.folder import RunFolder
from shoal.system import cpu
from shoal.training import finish_config as settle
from shoal.training.finish_config import choose_dtype, describe_slow_bfloat16
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("wanted", "rates", "settled"),
    [
        ("auto", None, "float32"),  # no instructions: nothing is measured
        ("auto", [2.0, 1.0], "bfloat16"),
        ("auto", [1.0, 2.0], "float32"),
        ("auto", [0.0, 0.0], "float32"),  # there was no time to measure
        ("bfloat16", None, "bfloat16"),
        ("float32", None, "float32"),
    ],
)
def test_auto_is_float32_unless_bfloat16_was_seen_to_be_faster(
    wanted: str, rates: list[float] | None, settled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object, **options: object) -> list[float]:
        assert rates is not None, "measured unexpectedly"
        return rates

    monkeypatch.setattr(settle, "product_rates", measured)
    monkeypatch.setattr(settle, "multiplies_bfloat16", lambda: rates is not None)
    assert choose_dtype(wanted, ALONE) == settled


def seeing(quick: bool, rates: list[float]) -> AbstractContextManager[Any]:
    """Patch the detected hardware: whether the CPU has bfloat16 instructions, and the rates of matrix products."""
    return mock.patch.multiple(settle, multiplies_bfloat16=lambda: quick, product_rates=lambda *_, **__: rates)


def settle_with(mesh: Mesh, ratios: list[float]) -> str:
    """Choose the dtype. ratios: by rank, the speed of bfloat16 relative to float32; 0 means no bfloat16 instructions."""
    ratio = ratios[mesh.place.rank]
    with mock.patch.multiple(settle, multiplies_bfloat16=lambda: ratio > 0, product_rates=lambda *a, **o: [ratio, 1.0]):
        return choose_dtype("auto", mesh)


@pytest.mark.parametrize(
    ("ratios", "settled"), [([3.0, 0.5], "bfloat16"), ([1.5, 0.5], "float32"), ([9.0, 0.0], "float32")]
)
def test_all_ranks_settle_on_the_same(ratios: list[float], settled: str, world: Callable[[int], World]) -> None:
    assert world(2).run(settle_with, ratios) == [settled, settled]


def test_slow_bfloat16_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "product_rates", lambda *args, **options: [1.0, 97.0])
    assert re.search(r"\b97 times", describe_slow_bfloat16(ALONE.device))
    monkeypatch.setattr(settle, "product_rates", lambda *args, **options: [0.0, 0.0])  # there was no time to measure
    assert "far longer" in describe_slow_bfloat16(ALONE.device)


def settled_with(mesh: Mesh, folder: str, dtype: str, quick: bool, rates: list[float]) -> tuple[str, list[str]]:
    """Return the dtype that `finish_config` chooses, and its warnings. quick, rates: the detected hardware, as in `seeing`."""
    said: list[str] = []
    rows = SimpleNamespace(check_rows=lambda size: None)
    prepared: Any = SimpleNamespace(vocab_size=257, tokenizer=rows)
    config = Config().replace("train", dtype=dtype)
    with mock.patch.multiple(settle, multiplies_bfloat16=lambda: quick, product_rates=lambda *a, **o: rates):
        return settle.finish_config(config, RunFolder(Path(folder)), prepared, mesh, said.append).train.dtype, said


@pytest.mark.parametrize(
    ("dtype", "quick", "count"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_slow_bfloat16_is_said_once_by_the_first_rank_and_the_run_goes_on_with_it(
    dtype: str, quick: bool, count: int, world: Callable[[int], World], tmp_path: Path
) -> None:
    first, second = world(2).run(settled_with, str(tmp_path / "new"), dtype, quick, [1.0, 97.0])
    assert (first[0], second) == (dtype, (dtype, []))
    assert len(first[1]) == count
    assert all("97 times" in line for line in first[1])


def test_a_resume_keeps_what_was_measured_and_another_run_measures_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise a killed run would end with other bits, and one busy moment would decide for all later runs."""
    wanted = Config().replace("train", dtype="auto", steps=1, device="cpu").replace("launch", processes=2)
    folder = RunFolder(tmp_path / "first")
    folder.path.mkdir()
    folder.save_config(wanted.replace("train", dtype="bfloat16").replace("launch", threads=3))
    measured: list[object] = []

    def rates(*args: object, **options: object) -> list[float]:
        measured.append(args)
        return [1.0, 2.0]

    monkeypatch.setattr(settle, "product_rates", rates)
    monkeypatch.setattr(settle, "multiplies_bfloat16", lambda: True)
    kept = folder.with_earlier_choices(wanted)
    assert kept.train.dtype == "bfloat16"
    assert choose_dtype(kept.train.dtype, ALONE) == "bfloat16"
    assert not measured
    monkeypatch.setattr(torchrun, "count_cores", lambda: 16)
    monkeypatch.setattr(torchrun, "free_cores", lambda: 16.0)
    assert torchrun.plan_processes(wanted, 0, before=folder.begun()).launch.threads == 3
    for count, name in enumerate(("second", "third"), start=1):
        another = RunFolder(tmp_path / name).with_earlier_choices(wanted)
        assert another.train.dtype == "auto"
        assert choose_dtype(another.train.dtype, ALONE) == "float32"
        assert len(measured) == count


def test_what_is_measured_at_a_start_takes_half_a_second_at_most() -> None:
    assert settle.MEASURING_SECONDS + cpu.LOOK_SECONDS <= 0.5
