"""The slow rank is found, with its phase and its first step, and no cell of the map hides it."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from shoal.report.curves.ranks import PHASES, RATIO_UNIT, RankMap
from shoal.run.records import read_ranks
from tests.report.synthetic import SLOW, write_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_ranks(folder / "ranks.jsonl", 12_000, 48, seed=1, slow={37: "data", 5: "backward"}, slow_from=5000)
    return folder


def test_slow_ranks_have_their_phase_and_first_step(run: Path) -> None:
    found = RankMap.open(run).slow()
    assert [(each.rank, each.phase, each.first_step, each.last_step) for each in found] == [(5, "backward", 5000, None)]
    assert found[0].factor == pytest.approx(1 + 0.55 * (SLOW - 1), rel=0.02)


def test_the_map_keeps_the_slowest(run: Path) -> None:
    records = read_ranks(run / "ranks.jsonl")
    steps = np.array([each.step for each in records])
    total = np.array([np.sum([each.busy_seconds[phase] for phase in PHASES], axis=0) for each in records])
    ratio = total / np.sort(total, axis=1)[:, 23:24]
    ranks = RankMap.open(run)
    for columns, rows, first, last in [
        (256, 256, 0, 12_000),
        (10, 7, 0, 12_000),
        (16, 48, 3000, 9000),
        (1, 1, 0, 12_000),
    ]:
        view = ranks.view(first, last, columns=columns, rows=rows)
        inside = ratio[(steps >= first) & (steps <= last)]
        assert view.ratio.shape[0] <= rows
        assert view.ratio.shape[1] <= columns
        np.testing.assert_allclose(view.ratio.max(), inside.max(), rtol=1e-5)
        by_rank = np.pad(inside.max(axis=0), (0, -48 % view.ranks_per_row))
        np.testing.assert_allclose(
            view.ratio.max(axis=1), by_rank.reshape(-1, view.ranks_per_row).max(axis=1), rtol=1e-5
        )
        assert PHASES[view.phase[5 // view.ranks_per_row, -1]] == "backward"
        found = view.as_json()
        cells = np.frombuffer(base64.b64decode(found["ratio"]), np.uint8)
        assert np.abs(cells.reshape(view.ratio.shape) / RATIO_UNIT - view.ratio).max() <= 0.5 / RATIO_UNIT + 1e-6


def test_reading_on_equals_reading_at_once(run: Path, tmp_path: Path) -> None:
    data = (run / "ranks.jsonl").read_bytes()
    ranks = RankMap.open(tmp_path)
    assert (ranks.ranks, ranks.slow(), ranks.timeline()["step"]) == (0, [], None)
    assert ranks.as_json()["step"] == []
    cut = [0, 100, 40_000, 250_000, 250_001, len(data)]
    for start, stop in itertools.pairwise(cut):
        with (tmp_path / "ranks.jsonl").open("ab") as file:
            file.write(data[start:stop])
        ranks.refresh()
    expected = json.dumps(RankMap.open(run, tmp_path / "other").as_json())
    assert json.dumps(ranks.as_json()) == expected
    write_ranks(tmp_path / "long.jsonl", 40_000, 48, seed=1)
    (tmp_path / "ranks.jsonl").write_bytes((tmp_path / "long.jsonl").read_bytes())
    assert ranks.refresh()
    assert (tmp_path / "cache" / "curves" / "ranks").is_file()
    assert json.dumps(RankMap.open(tmp_path).as_json()) == json.dumps(ranks.as_json())


def test_a_restart_with_other_ranks_takes_steps_again(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks.jsonl", 1000, 4, seed=1)
    write_ranks(tmp_path / "more.jsonl", 1500, 6, seed=2, slow={5: "reduce"}, slow_from=700)
    lines = (tmp_path / "more.jsonl").read_text().splitlines(keepends=True)
    again = "".join(line for line in lines if json.loads(line)["step"] > 500)
    with (tmp_path / "ranks.jsonl").open("a") as file:
        file.write('{"step": 3, "busy\n{"step": 1}\n' + again)
    ranks = RankMap.open(tmp_path)
    assert ranks.steps.tolist() == [2, *range(100, 1501, 100)]
    assert ranks.ranks == 6
    assert (ranks.view().ratio[4:, 0] == 0).all()
    assert len(ranks.memory["peak_memory_bytes"]) == 6


def test_of_two_ranks_the_slow_one_is_found(tmp_path: Path) -> None:
    write_ranks(tmp_path / "ranks.jsonl", 1000, 2, seed=1, slow={0: "forward"})
    assert [each.rank for each in RankMap.open(tmp_path).slow()] == [0]
    timeline = RankMap.open(tmp_path).timeline(500)
    assert timeline["step"] == 500
    assert timeline["ranks"] == [0, 1]
    assert timeline["wait_seconds"][0] == 0 < timeline["wait_seconds"][1]
