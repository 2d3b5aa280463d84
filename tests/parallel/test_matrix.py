"""
Layouts against one process: every one, and every pair of features with each other and with the other axes.

`scripts/matrix.py` runs all cells. What is not in `cover()` of the exact, uncompiled cells runs here too, slowly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.matrix import FAMILIES, LAYOUTS, Bench, Cell, cells, cover, legal, problem, refused
from tests.world import World

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
REST = [cell for cell in legal() if cell.plain and cell.checkpointing == "none" and cell not in cover()]


@pytest.fixture(scope="module")
def bench(world: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"), world)


@pytest.mark.parametrize("cell", cover(), ids=str)
def test_cell(bench: Bench, cell: Cell) -> None:
    assert problem(cell, bench.run(cell)) is None


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=str)
def test_every_layout_with_every_family(bench: Bench, cell: Cell) -> None:
    assert problem(cell, bench.run(cell)) is None


def test_every_pair_of_features_that_can_be_had_is_covered() -> None:
    covered = set().union(*(cell.pairs for cell in cover()))
    assert covered == set().union(*(cell.pairs for cell in legal()))
    assert {cell.layout for cell in cover()} == {cell.layout for cell in legal()}
    # Features of layouts that have no pair: no layout has both, or shoal refuses it.
    features = set().union(*(setup.features for setup in LAYOUTS.values()))
    assert {f for pair in covered for f in pair} >= features


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
    again = "run python scripts/matrix.py --write"
    assert f"{len(every)} cells of {len(LAYOUTS)} layouts" in page, again
    assert f"| {len(every) - len(legal())} | refused" in page, again
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \|(?: [^|]+ \|){4}$", page, re.MULTILINE)
    assert rows[:1] == [("layout", "model")], again
    assert [row for row in rows if row[0] != "layout"] == list(itertools.product(LAYOUTS, FAMILIES)), again
    assert [text for text in {text for cell in every for text in refused(cell)} if text not in page] == [], again
