"""`parallel: auto` and `train.micro_batch: auto`: where they are recognized, shown, replaced and rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoal.config.auto import micro_batches
from shoal.config.layout import AXES
from shoal.config.options import Parallel
from shoal.errors import ConfigError, ShoalError
from shoal.resolve.recipe import read_override
from shoal.resolve.recipe_text import with_options
from shoal.resolve.resolve import Resolved, expectation, read_back, resolve, to_yaml
from shoal.resolve.undecided import flags_of, with_sizes_of

RECIPE = "model: {preset: tiny}\nparallel: auto\ntrain: {steps: 1, global_batch: 12, micro_batch: auto}\n"
BOTH = ["parallel", "train.micro_batch"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def flags(*texts: str) -> list[tuple[str, str, str]]:
    """Return --KEY=VALUE flags as the command line reads them."""
    return [(key, value, f"--{key}") for key, _, value in (text.removeprefix("--").partition("=") for text in texts)]


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (1, [1]), (7, [1, 7]), (8, [1, 2, 4, 8]), (12, [1, 2, 3, 4, 6, 12]), (96, [1, 2, 4, 8, 16, 32]),
        (4096, [2**n for n in range(11)]),
    ],
)  # fmt: skip
def test_micro_batches_divide_the_global_batch(batch: int, sizes: list[int]) -> None:
    assert micro_batches(batch) == sizes


def test_the_word_is_taken_out_and_shown(recipe: Path) -> None:
    found = resolve(recipe)
    assert found.undecided == {"parallel": f"{recipe}:2", "train.micro_batch": f"{recipe}:3"}
    assert found.config.parallel == Parallel()
    assert found.config.train.micro_batch == 6  # the largest divisor of 12 up to the default
    text = to_yaml(found.config, found.sources, found.undecided)
    said = yaml.safe_load(text)
    assert (said["parallel"], said["train"]["micro_batch"]) == ("auto", "auto")
    assert [line.split("# ")[1] for line in text.splitlines() if ": auto " in line and str(recipe) in line] == [
        f"{recipe}:2",
        f"{recipe}:3",
    ]


def test_what_a_command_writes_is_a_recipe_again(recipe: Path, tmp_path: Path) -> None:
    found = resolve(recipe)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(found.config, undecided=found.undecided), encoding="utf-8")
    assert list(resolve(again).undecided) == BOTH


@pytest.mark.parametrize(
    ("given", "left", "note"),
    [
        (["--parallel.tp=2"], ["train.micro_batch"], "--parallel.tp 2 replaces these options of"),
        (["--train.micro_batch=4"], ["parallel"], ""),
        (["--parallel.tp=2", "--parallel=auto"], BOTH, "--parallel.tp 2 has no effect: --parallel auto follows"),
        (
            ["--parallel=auto", "--parallel.tp=2"],
            ["train.micro_batch"],
            "--parallel auto has no effect: --parallel.tp 2",
        ),
    ],
)
def test_flags_replace_the_word(recipe: Path, given: list[str], left: list[str], note: str) -> None:
    found = resolve(recipe, flags(*given))
    assert list(found.undecided) == left
    assert any(note in each for each in found.notes) if note else not found.notes


def test_a_flag_replaces_a_recipes_layout(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("parallel: auto", "parallel: {tp: 2, pp_schedule: gpipe}"), encoding="utf-8")
    found = resolve(recipe, flags("--parallel=auto"))
    assert (list(found.undecided), found.config.parallel) == (BOTH, Parallel())
    assert "--parallel auto replaces these options of" in found.notes[0]
    assert "parallel.tp 2, parallel.pp_schedule gpipe" in found.notes[0]


def test_the_chosen_sizes_as_flags_replace_the_word(recipe: Path) -> None:
    """Workers get the user's flags, then those of the choice."""
    asked = resolve(recipe, flags("--parallel=auto"))
    chosen = asked.config.replace("parallel", dp_replicate=1, dp_shard=2, reshard_after_forward="never")
    chosen = with_sizes_of(asked.config, chosen.replace("train", micro_batch=3), asked.undecided)
    worker = resolve(recipe, flags("--parallel=auto", *flags_of(chosen, asked.undecided)))
    assert not worker.undecided
    assert worker.config == chosen


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("parallel: auto", "parallel: automatic", ":2: parallel is a section: put its options below it, indented; or write parallel: auto"),
        ("micro_batch: auto", "micro_batch: atuo", ":3: train.micro_batch must be an integer of at least 1 (sequences), or auto, not 'atuo'"),
        ("parallel: auto", "parallel: [auto]", "parallel is a section"),
        ("parallel: auto", "optim: auto", "optim is a section"),
        ("global_batch: 12", "global_batch: auto", "train.global_batch must be an integer"),
    ],
)  # fmt: skip
def test_other_words_are_rejected(recipe: Path, old: str, new: str, words: str) -> None:
    recipe.write_text(RECIPE.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve(recipe)
    assert words in str(caught.value)


def test_another_word_in_the_flag_is_rejected(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, flags("--parallel=ato"))
    assert "or --parallel auto, and shoal train chooses the layout" in str(caught.value)
    assert read_override("parallel", "auto", "--parallel").value == "auto"
    assert expectation("train.micro_batch").endswith(", or auto")


def test_what_every_choice_would_reject_is_rejected_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, flags("--train.micro_batch=5"))
    assert "does not divide train.global_batch 12" in str(caught.value)
    fixed = flags("--parallel.tp=3", "--parallel.dp_replicate=1")
    with pytest.raises(ConfigError) as caught:  # the preset has four heads
        resolve(recipe, fixed)
    assert "parallel.tp 3 does not divide model.num_heads" in str(caught.value)


def test_no_size_is_rejected_for_its_placeholder(recipe: Path) -> None:
    """Twelve replicas need micro-batches of one; the placeholder is 6."""
    found: Resolved = resolve(recipe, flags("--parallel.dp_replicate=12", "--launch.processes=12"))
    assert (list(found.undecided), found.config.train.micro_batch) == (["train.micro_batch"], 6)


def test_a_runs_own_config_never_has_the_word(recipe: Path) -> None:
    with pytest.raises(ShoalError) as caught:
        read_back(recipe)
    assert "parallel auto is for recipes" in str(caught.value)


def test_plan_writes_a_layout_in_place_of_the_word() -> None:
    text = "parallel: auto  # chosen\ntrain: {micro_batch: auto, steps: 3}\n"
    text = with_options(text, "parallel", {"dp_shard": 4}, frozenset(AXES) - {"dp_shard"})
    text = with_options(text, "train", {"micro_batch": 8})
    assert text == "parallel: {dp_shard: 4}  # chosen\ntrain: {micro_batch: 8, steps: 3}\n"
