"""The view of a profile and its table: bounded, complete in what they sum, and at most 80 columns wide."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.metrics.profile.records import (
    ModuleCost,
    ModuleMemory,
    OperatorCost,
    Overlap,
    Profile,
    RankMemory,
    RankProfile,
    Timeline,
    read_memory,
    write_memory,
)
from shoal.report.profile.table import cut, dearest, lines
from shoal.report.profile.units import percent, seconds, size
from shoal.report.profile.view import largest, profile_view, profile_views
from shoal.run.phases import PHASES


def rank_of(number: int, ranges: int = 100, *, communicates: bool = True) -> RankProfile:
    chance = random.Random(number)
    names = [f"blocks.{i}.attention" for i in range(50)]
    spans = [[2, i * 1e-3, chance.random() * 1e-3, i % 50] for i in range(ranges)]
    operators = [
        OperatorCost(
            name=f"aten::a_long_name_of_an_operator_{i}", calls=20 * i, cpu_seconds=1.0 / (i + 1), device_seconds=0.0, share=0.1 / (i + 1),
            module="blocks.*.a_long_name_of_a_module.inside", module_share=0.5,
        )
        for i in range(50)
    ]  # fmt: skip
    moved = 0.5 if communicates else 0.0
    return RankProfile(
        rank=number, device="cpu", trace=f"rank{number}.trace.json.gz", trace_bytes=10**6, events=1000, steps=[10, 11],
        step_seconds=[1.0, 2.0], usual_step_seconds=1.2, recording_bytes=5, stopped_early=False,
        phase_seconds=dict.fromkeys(PHASES, 0.6), outside_seconds=0.2, operators=operators,
        modules=[ModuleCost(name=name, calls=2, forward_seconds=0.1, backward_seconds=0.2) for name in names],
        overlap=Overlap(communication_seconds=moved + number * moved, compute_seconds=2.0, hidden_seconds=0.5 * moved),
        timeline=Timeline(names=names, ranges=spans, collectives=[[0.1, 0.2, 0]] * ranges, dropped=7),
    )  # fmt: skip


def written(folder: Path, ranks: list[RankProfile]) -> Profile:
    folder.mkdir(parents=True)
    profile = Profile(
        run="a-profile", first=10, last=11, world_size=len(ranks), layout={"dp_shard": len(ranks), "tp": 1}, total_steps=1000,
        ranks=ranks,
    )  # fmt: skip
    modules = [
        ModuleMemory(
            name=f"blocks.{i}.q", parameter_bytes=100, gradient_bytes=100, optimizer_bytes=200, activation_bytes=7
        )
        for i in range(30)
    ]
    memory = [
        RankMemory(rank=r.rank, modules=modules, peak_bytes=300, peak_seconds=0.5, other_bytes=90, cuda={})
        for r in ranks
    ]
    profile.write(folder)
    write_memory(folder, memory)
    return profile


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    profile = written(tmp_path / "step-00000010", [rank_of(0), rank_of(1)])
    found = Profile.read(tmp_path / "step-00000010")
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(profile))
    assert found.overlap.percent == pytest.approx(100 * 0.5 / 1.5)
    assert [each.rank for each in read_memory(tmp_path / "step-00000010")] == [0, 1]
    summary = json.loads((tmp_path / "step-00000010" / "summary.json").read_text())
    assert summary["overlap"]["percent"] == pytest.approx(100 * 0.5 / 1.5)
    assert summary["ranks"][0]["overhead"] == pytest.approx(1.25)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": 1}'])
def test_a_damaged_summary_is_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunError, match="run shoal profile again"):
        Profile.read(tmp_path)


def test_the_table_fits_80_columns_and_has_ten_operators(tmp_path: Path) -> None:
    profile = written(tmp_path / "p", [rank_of(number) for number in range(4)])
    shown = list(lines(profile, read_memory(tmp_path / "p"), tmp_path / "p"))
    assert max(map(len, shown[:-2])) <= 80  # the last lines name the folder
    assert sum("aten::" in line for line in shown) == 10
    assert "1.25 times as long" in shown[1]
    # 4 ranks of 2 steps: the first operator takes 4 s in 8 steps
    assert next(line for line in shown if "aten::" in line).split()[1:3] == ["500", "ms"]
    assert any("hidden behind" in line for line in shown)


def test_without_communication_it_says_so(tmp_path: Path) -> None:
    profile = written(tmp_path / "p", [rank_of(0, communicates=False)])
    assert "no communication between processes" in list(lines(profile, [], tmp_path))
    view = profile_view(tmp_path / "p")
    assert [each["percent"] for each in view["overlap"]] == [None, None]


@pytest.mark.parametrize("count", [1, 4, pytest.param(64, marks=pytest.mark.ci)])
def test_the_view_is_bounded_and_its_sums_are_not(tmp_path: Path, count: int) -> None:
    profile = written(tmp_path / "p", [rank_of(number, ranges=2000) for number in range(count)])
    view = profile_view(tmp_path / "p")
    assert len(json.dumps(view)) < 400_000
    assert len(view["ranks"]) + view["hidden_ranks"] == count
    assert sum(len(rank["timeline"]["ranges"]) for rank in view["ranks"]) <= 4000
    for rank in view["ranks"]:
        line = rank["timeline"]
        assert len(line["ranges"]) + len(line["collectives"]) + line["dropped"] == 2000 + 2000 + 7
        assert [r[1] for r in line["ranges"]] == sorted(r[1] for r in line["ranges"])
    assert view["overlap"][0]["communication_seconds"] == pytest.approx(
        profile.overlap.communication_seconds / (2 * count)
    )
    assert {0, count - 1} <= {
        rank["rank"] for rank in view["ranks"]
    }  # the one that waits least and the one that waits most
    assert view["operators"][0]["seconds"] == pytest.approx(0.5)


def test_the_largest_stay_in_their_order() -> None:
    chance = random.Random(1)
    entries = [[0.0, float(i), chance.random()] for i in range(100)]
    kept = largest(entries, 10, place=2)
    assert sorted(kept, key=lambda e: e[2]) == sorted(entries, key=lambda e: e[2])[-10:]
    assert [e[1] for e in kept] == sorted(e[1] for e in kept)


def test_profiles_of_a_run_are_also_those_of_the_run_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "a-profile" / "profile" / "step-00000010", [rank_of(0)])
    (tmp_path / "a-profile" / "profile" / "step-00000020").mkdir()  # not complete
    assert [view["folder"] for view in profile_views(tmp_path / "a")] == ["step-00000010"]
    assert len(profile_views(tmp_path / "a-profile")) == 1
    assert profile_views(tmp_path / "b") == []


def test_amounts_have_units() -> None:
    assert [seconds(x) for x in (0.0, 1e-6, 0.0123, 1.0, 75.0)] == ["0.00 us", "1.00 us", "12.3 ms", "1.00 s", "75.0 s"]
    assert [size(x) for x in (0, 1023, 1024, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "5.00 MiB",
        "3.00 GiB",
    ]
    assert percent(None) == "-"
    assert percent(12.34) == "12.3%"
    assert cut("abcdefghijklmnop", 10) == "abcd...nop"


def test_operators_of_ranks_are_joined() -> None:
    [first, *_] = dearest([rank_of(0), rank_of(1)])
    assert (first.seconds, first.calls) == (0.5, 0.0)
    assert first.share == pytest.approx(0.1)
