"""Pictures of results show the measured numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.bench.pictures import PANELS, draw, draw_performance, draw_scaling
from shoal.bench.result import FIGURES, Row
from tests.bench.test_result import result


def scaled(processes: int, rates: list[float], mode: str = "strong", cores: int = 2) -> Row:
    facts = {
        "processes": processes,
        "method": "DDP" if mode else "single",
        "mode": mode,
        "devices": min(processes, cores),
    }
    return Row(f"{processes} {mode}", facts | {"shares_cores": processes > cores}, {"tokens_per_second": rates})


def test_the_curve_is_the_median_beside_the_ideal() -> None:
    rows = [scaled(1, [100, 90, 120], ""), scaled(2, [150, 160, 180]), scaled(4, [150, 155, 130])]
    for figure in draw_scaling(result(rows, verb="bench scaling")):
        axes: Any = figure.axes[0]
        lines = {line.get_gid(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert lines == {
            "strong-DDP": [[1, 100], [2, 160], [4, 150]],
            "strong-ideal": [[1, 100], [2, 200], [4, 200]],  # four processes have two cores
        }


def test_bars_have_the_span_of_the_repeats(tmp_path: Path) -> None:
    rows = [
        Row("shoal", {}, {"tokens_per_second": [80.0, 100.0, 110.0]}),
        Row("peer", {}, {"tokens_per_second": [50.0]}),
    ]
    for figure in draw_performance(result(rows)):
        axes: Any = figure.axes[0]
        assert [bar.get_width() for bar in axes.patches] == [100, 50]
        [bars] = [each for each in axes.containers if hasattr(each, "errorbar")]
        spans = bars.errorbar.lines[2][0].get_segments()
        assert [segment[:, 0].tolist() for segment in spans] == [[80, 110], [50, 50]]
    assert {path.suffix for path in draw(result(rows), tmp_path)} == {".png", ".svg"}


@pytest.mark.parametrize("verb", PANELS)
def test_every_benchmark_has_a_picture(verb: str, tmp_path: Path) -> None:
    figures = {name: [2.0, 1.0, 3.0] for name in FIGURES}
    row = Row("a row", scaled(1, [1.0]).facts, figures)
    assert len(draw(result([row], verb=verb), tmp_path)) == (4 if verb == "bench scaling" else 2)
