"""
Layouts against one process: each layout, and every pair of two features or of a feature and a value of another axis.

`scripts/matrix.py` runs all cells. Exact, uncompiled cells that are not in `cover()` run here too, marked slow.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shoal.config.layout import AXES
from shoal.resolve.layout_checks import refusals
from tests.parallel.layouts import config_of
from tests.parallel.matrix import FAMILIES, Bench, Cell, Measured, cells, cover, legal, problem, refused, thin
from tests.parallel.setups import GROUPS, LAYOUTS, on
from tests.world import Worlds

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
REST = [cell for cell in legal() if cell.plain and cell.checkpointing == "none" and cell not in cover()]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, worlds: Worlds) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"), worlds)


def _in_every_run(cell: Cell) -> bool:
    """
    Return whether `make test` runs the cell. CI runs all.

    Uncompiled: all with fewer than 8 processes, and every sixth with 8. Compiled: one with 2 processes, and one with 8.
    """
    if not cell.compile and cell.processes < 8:
        return True
    some = [each for each in cover() if (each.compile, each.processes) == (cell.compile, cell.processes)]
    return cell.processes in (2, 8) and some.index(cell) % (len(some) if cell.compile else 6) == 0


def _marks(cell: Cell) -> list[pytest.MarkDecorator]:
    return [pytest.mark.ci] * (not _in_every_run(cell)) + [pytest.mark.torch] * (cell in thin())


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=_marks(cell)) for cell in cover()], ids=str)
def test_cell(bench: Bench, cell: Cell) -> None:
    assert problem(cell, bench.run(cell)) is None


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=str)
def test_every_layout_with_every_family(bench: Bench, cell: Cell) -> None:
    assert problem(cell, bench.run(cell)) is None


def test_every_pair_that_the_matrix_has_is_covered() -> None:
    covered = set().union(*(cell.pairs for cell in cover()))
    assert covered == set().union(*(cell.pairs for cell in legal()))
    assert {cell.layout for cell in cover()} == {cell.layout for cell in legal()}


FEATURES: dict[str, dict[str, Any]] = {
    "ddp": {"dp_replicate": 2},
    "fsdp": {"dp_shard": 2},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "offload": {"dp_shard": 2, "cpu_offload": True},
    "reshard never": {"dp_shard": 2, "reshard_after_forward": "never"},
    "reshard over a number": {"dp_shard": 4, "reshard_after_forward": 2},
    "tp": {"tp": 2},
    "bitwise": {"bitwise": True},
    **{name: {"cp": 2, "cp_method": name, "documents": name != "ring"} for name in ("allgather", "ulysses", "ring")},
    **{name: {"pp": 2, "pp_schedule": name} for name in ("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")},
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(sorted(FEATURES), 2)))
def test_every_pair_of_features_that_shoal_takes_is_in_the_matrix(one: str, other: str) -> None:
    options = FEATURES[one] | FEATURES[other]
    options["dp_shard"] = max(FEATURES[one].get("dp_shard", 1), FEATURES[other].get("dp_shard", 1))
    setup = on(math.prod(options.get(axis, 1) for axis in AXES), **options)
    if not setup.features >= {one, other}:
        return  # such as two schedules: no layout has both
    configs = [config_of(Path("unused"), "pair", family, **setup.options) for family in FAMILIES]
    if any(not list(refusals(config, setup.processes)) for config in configs):
        assert any((one, other) in cell.pairs for cell in cover())


def test_no_two_layouts_are_the_same() -> None:
    setups = [(setup.processes, sorted(setup.options.items(), key=str)) for setup in LAYOUTS.values()]
    assert len(list(itertools.groupby(sorted(setups, key=str)))) == len(LAYOUTS)


def test_every_refusal_says_what_to_set() -> None:
    texts = {text for cell in cells() for text in refused(cell)}
    assert texts
    assert [text for text in texts if " set " not in text] == []


def test_the_page_is_of_these_cells() -> None:
    page = PAGE.read_text(encoding="utf-8")
    every = list(cells())
    again = "run python scripts/matrix.py --write, or --words"
    assert f"{len(every)} cells of {len(LAYOUTS)} layouts" in page, again
    assert f"| {len(every) - len(legal())} | rejected" in page, again
    tables = [page.partition(f"## {group}\n")[2].partition("\n## ")[0] for group in GROUPS]
    rows = [row for table in tables for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)]
    assert list(dict.fromkeys(rows)) == ["layout", "---", *LAYOUTS], again
    assert [text for text in {text for cell in every for text in refused(cell)} if text not in page] == [], again


def test_the_page_tells_what_failed_from_what_was_not_run() -> None:
    with mock.patch.dict(os.environ):  # the script sets its own variables
        script = runpy.run_path(str(PAGE.parents[1] / "scripts" / "matrix.py"))
    fine, wrong = legal()[:2]
    measured = Measured(0.0, 0.0, 0.0, 2e-7, "norm.weight", 0.0, 0.0, 0.0, None)
    results = [
        script["Result"](str(fine), "abc", "2026-01-01", 1.0, measured, None),
        script["Result"](str(wrong), "abc", "2026-01-01", 1.0, None, "Traceback\nValueError: no such thing"),
    ]
    page = script["page"]({result.cell: result for result in results})
    for text in (
        "| 1 | pass |",
        "| 1 | fail |",
        f"| {len(legal()) - 2} | not run yet |",
        f"`{wrong}`:",
        "no such thing",
    ):
        assert text in page
    assert f"| {fine.layout} | {fine.family} | 1/3, 2 not run, 2.0e-07 |" in page
