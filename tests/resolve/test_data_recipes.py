"""shoal's own recipes of public datasets: valid where the dataset is, and elsewhere an error that says how to get it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.hub.catalog import CATALOG, fetched_by
from shoal.resolve.recipe import PACKAGED
from shoal.resolve.resolve import resolve
from tests.packaged import FROM_WEIGHTS, make_files, recipes

OF_DATA = [path for path in recipes() if "/" not in path.relative_to(PACKAGED).as_posix() and path.stem in CATALOG]


def test_there_is_a_recipe_for_each_common_dataset() -> None:
    found = {path.stem for path in OF_DATA}
    assert found == {"tinystories", "tinystories-text", "wikitext-103", "openwebtext", "fineweb-edu"}
    assert {path.stem for path in PACKAGED.glob("alpaca*.yaml")} == FROM_WEIGHTS


@pytest.mark.parametrize("recipe", OF_DATA, ids=lambda path: path.stem)
def test_it_is_valid_where_its_files_are_and_elsewhere_says_how_to_get_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(recipe)
    missing = [problem.what for problem in caught.value.problems]
    assert all(f"(shoal fetch data {recipe.stem} fetches it)" in what for what in missing)
    held_out = [what for what in missing if "data.val_paths does not exist" in what]
    assert len(missing) - len(held_out) == 1
    assert bool(held_out) == bool(CATALOG[recipe.stem].held_out), "validation files that are fetched are used"
    for path in make_files(recipe, tmp_path):
        assert fetched_by(str(path.relative_to(tmp_path))) == f"shoal fetch data {recipe.stem}"
    assert resolve(recipe).config.data.text_key == "text"
    hint = re.search(rf"shoal train {recipe.stem} (.*)", recipe.read_text(encoding="utf-8"))
    if hint is not None:  # for a CPU
        flags = re.findall(r"--(\S+) (\S+)", hint[1])
        assert resolve(recipe, [(key, value, f"--{key}") for key, value in flags]).config.train.steps == 600


def test_the_recipe_of_instructions_names_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"shoal fetch model unsloth/Llama-3\.2-1B fetches it"):
        resolve(PACKAGED / "alpaca-llama-3.2-1b.yaml")
