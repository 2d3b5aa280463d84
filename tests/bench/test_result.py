"""The schema of results: what is written is read back, and anything else is rejected with one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.bench.result import FIGURES, Result, Row, read_result
from shoal.errors import ShoalError


def result(rows: list[Row], verb: str = "bench speed", **changes: Any) -> Result:
    """Return a result with these rows, of a machine and a config that do not matter."""
    values: dict[str, Any] = {
        "command": "shoal bench speed", "date": "2026-01-01T00:00:00Z", "commit": "abc", "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 8}, "instructions": "AVX2",
        "recipe": {"name": "default", "model": "llama", "tokens_to_train": None, "options": {"train.dtype": "float32"}},
    }  # fmt: skip
    return Result(verb=verb, rows=rows, **(values | changes))


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [Row("shoal", {"processes": 2, "split": {"data": 0.1}}, {"tokens_per_second": [1.5, 2.0], "loss": [3.25]})]
    written = result(rows, notes=["it is fast"])
    path = tmp_path / "new" / "a.json"
    written.save(path)
    assert read_result(path) == written
    assert json.loads(path.read_text())["rows"][0]["figures"]["tokens_per_second"] == [1.5, 2.0]  # every repeat


def test_every_figure_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    for name, figure in FIGURES.items():
        assert f"| `{name}` | {figure.unit} |" in page, name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "not JSON"),
        ("[]", "not an object"),
        ('{"kind": "something else"}', "not an object with"),
        ('{"kind": "shoal bench", "version": 99}', "version 99"),
        ('{"kind": "shoal bench", "version": 1, "rows": [{"name": "a"}]}', "damaged"),
        ('{"kind": "shoal bench", "version": 1, "rows": []}', "damaged"),
        (
            '{"kind": "shoal bench", "version": 1, "rows": [{"name": "a", "facts": {}, "figures": {"loss": [NaN]}}]}',
            "finite",
        ),
    ],
)
def test_another_file_is_not_taken_for_a_result(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ShoalError, match=why):
        read_result(path)
