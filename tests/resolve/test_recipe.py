"""Texts that are not valid recipes: each is reported with its line, without a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.errors import Problem
from shoal.resolve.recipe import read_override, read_recipe
from shoal.resolve.resolve import read_back, resolve, to_yaml

from .test_resolve import GOOD, problems, write


def value_of(folder: Path, text: str) -> Any:
    """Return the value of a text, which is the same in a recipe and in a flag."""
    found: list[Problem] = []
    [setting] = read_recipe(write(folder, f"train:\n  steps: {text}\n"), found)
    assert not found
    assert read_override("train.steps", text, "").value == setting.value
    return setting.value


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("train:\n  steps: 1\x00\n", 2, "the character 0x00; remove it"),
        ("train:\n\n  steps: \x07\n", 3, "the character 0x07; remove it"),
        ("train:\n  steps: " + "[" * 2000 + "\n", None, "nested too deeply"),
        ('train:\n  steps: "\\U00FFFFFF"\n', None, "not YAML"),
        ('train:\n  steps: !!int ""\n', 2, "train.steps cannot be read: its text is not the int"),
        ("train:\n  steps: !!int 1:30\n", 2, "train.steps cannot be read: its text is not the int"),
        ("train:\n  steps: !!bool x\n", 2, "its text is not the bool"),
        ("train:\n  steps: !!float ''\n", 2, "its text is not the float"),
        ("train:\n  steps: !!timestamp x\n", 2, "its text is not the timestamp"),
        ("train:\n  steps: !secret x\n", 2, "train.steps cannot be read: could not determine a constructor"),
        ("train:\n  steps: &a [*a]\n", 2, "unconstructable recursive node"),
        ("train: &a\n  steps: *a\n", 2, "unconstructable recursive node"),
        ("train:\n  ? &a [*a]\n  : 1\n", 2, "there is no option train.(list)"),
        ("? &a [*a]\n: 1\n", 1, "there is no option (list)"),
    ],
)
def test_what_is_no_value(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    [found] = problems(tmp_path, text)
    assert words in found
    assert found.startswith(f"{tmp_path / 'recipe.yaml'}" + (f":{line}: " if line else ": "))


def test_what_is_wrong_there_hides_nothing_else(tmp_path: Path) -> None:
    found = problems(tmp_path, "train:\n  steps: !!int ''\n  dtype: bf17\noptim: {lr: fast}\n")
    assert [word in problem for word, problem in zip(("steps", "dtype", "lr"), found, strict=True)] == [True] * 3


@pytest.mark.parametrize("again", ["train:\n  steps: 2\n", "train:\n", "train: {steps: 1}\n"])
def test_a_section_that_stands_twice_is_a_problem(tmp_path: Path, again: str) -> None:
    found = problems(tmp_path, f"train:\n  steps: 1\nmodel: {{preset: tiny}}\n{again}")
    recipe = tmp_path / "recipe.yaml"
    assert found == [f"{recipe}:4: train is here and at {recipe}:1; merge the two sections"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0", 0), ("+5", 5), ("1_000", 1000), ("0x1F", 31), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0),
        ("08", "08"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0b1", "0b1"), ("2024-01-01", "2024-01-01"), ("=", "="),
        ("1_", "1_"), ("true", True), ("off", False), ("~", None),
    ],
)  # fmt: skip
def test_words_are_what_yaml_1_2_takes_them_for(tmp_path: Path, text: str, value: object) -> None:
    found = value_of(tmp_path, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["08", "1:30", "0b1", "2024-01-01", "="])
def test_a_name_is_saved_and_read_back(tmp_path: Path, name: str) -> None:
    config = resolve(write(tmp_path, GOOD), [("launch.name", name, "--name")]).config
    assert config.launch.name == name
    (tmp_path / "saved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read_back(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("text", ["[" * 2000, '"\\U00FFFFFF"', '!!int ""', "!!bool x", "&a [*a]", "!x", "{a", "\x00"])
def test_a_flag_that_is_no_value_is_text_as_it_stands(tmp_path: Path, text: str) -> None:
    assert read_override("data.tokenizer", text, "").value == text
    found = problems(tmp_path, GOOD, ("train.steps", text, "--train.steps"))
    assert found[0].startswith("--train.steps: train.steps")
