"""The files that shoal's own recipes name, so that the recipes resolve without a fetch."""

from __future__ import annotations

from pathlib import Path

import yaml

from shoal.resolve.recipe import PACKAGED

FROM_WEIGHTS = {"alpaca-llama-3.2-1b"}  # resolved only where its model is


def recipes() -> list[Path]:
    """Return the packaged recipes that need no model's weights."""
    return sorted(path for path in PACKAGED.glob("**/*.yaml") if path.stem not in FROM_WEIGHTS)


def make_files(recipe: Path, folder: Path) -> list[Path]:
    """Create an empty file for each of the recipe's paths below `folder`; return the files."""
    data = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("data", {})
    made = [folder / path.replace("*", "0") for key in ("paths", "val_paths") for path in data.get(key, [])]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return made
