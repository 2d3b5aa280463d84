"""docs/LEARN.md and recipes/learn: a chapter for each recipe, in order; shown output is real output."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.checkpoint.convert import to_hugging_face
from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.errors import ConfigError
from shoal.mesh.mesh import Mesh
from shoal.models.build import build_model, initialize
from shoal.resolve.layout_checks import refusals
from shoal.resolve.resolve import resolve
from tests.cli.commands import Place
from tests.training.test_equivalence import train_here
from tests.world import World, laid_out

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "LEARN.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes" / "learn").glob("*.yaml"))
CHAPTERS = dict(re.findall(r"^## (\d+)\. (.+?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL))  # number -> title and text
TABLE = runpy.run_path(str(ROOT / "scripts" / "learn_table.py"), run_name="learn_table")


def refused() -> list[tuple[str, str]]:
    """Return (command, message) of each rejection on the page; the command is the last one before the message."""
    found = []
    for block in re.finditer(r"^```\n(shoal: [^\n]* in the config\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        *_, command = re.findall(r"`(shoal train [^`]+)`", PAGE[: block.start()])
        found.append((command, block[1].strip()))
    return found


def config_of(number: int) -> Config:
    return resolve(RECIPES[number - 1]).config


def test_a_chapter_for_each_recipe_in_their_order() -> None:
    assert list(CHAPTERS) == [str(n + 1) for n in range(len(RECIPES))]
    for number, recipe in zip(CHAPTERS, RECIPES, strict=True):
        assert recipe.name.startswith(f"{int(number):02}-")
        assert recipe.read_text(encoding="utf-8").startswith(f"# Step {number} of docs/LEARN.md: ")
        first = re.search(r"```sh\nshoal train (\S+)", CHAPTERS[number])
        assert first is not None
        assert first[1] == f"recipes/learn/{recipe.name}"


@pytest.mark.parametrize("number", CHAPTERS)
def test_each_chapter_has_its_parts(number: str) -> None:
    text = CHAPTERS[number]
    assert text.count("```mermaid") == 1
    assert "**Experiment.**" in text
    assert len(re.findall(r"^Read next: ", text, re.MULTILINE)) == 1
    assert "Expect: " in text.replace("\n", " ")
    if int(number) > 3:
        assert "<!-- table: " in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_legal(recipe: Path) -> None:
    config = resolve(recipe).config
    assert not list(refusals(config, config.launch.processes))
    layout = find_layout(config.parallel, config.launch.processes)
    assert isinstance(layout, Layout)
    assert config.launch.processes in (1, 2)
    assert layout.world_size == config.launch.processes


def test_the_steps_differ_only_in_what_they_teach() -> None:
    one, two, three = config_of(1), config_of(2), config_of(3)
    on_two = one.replace("launch", processes=2)
    assert config_of(4) == three.replace("train", micro_batch=8).replace("parallel", dp_shard=2)
    assert config_of(5) == on_two.replace("parallel", tp=2)
    assert config_of(6) == two.replace("launch", processes=2).replace("parallel", pp=2)
    assert config_of(7) == on_two.replace("parallel", cp=2)
    assert config_of(8) == one.replace("train", dtype="bfloat16", activation_checkpointing="full")
    assert config_of(9) == three.replace("train", repro="bitwise")


def test_the_refusals_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(refused()) >= 5
    for command, shown in refused():
        args, rest = build_parser("train").parse_known_args(shlex.split(command)[1:])
        overrides, _ = read_overrides(args, rest)
        with pytest.raises(ConfigError) as error:
            resolve(args.recipe, overrides)
        assert f"shoal: {error.value}" == shown


@pytest.mark.parametrize("name", TABLE["TABLES"])
def test_each_table_has_its_rows_and_the_bytes_of_its_formula(name: str) -> None:
    """Sent bytes equal the formula, plus at most 4%: headers, and a few numbers."""
    lines = PAGE.partition(f"<!-- table: {name} begin -->")[2].partition(f"<!-- table: {name} end -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    keys = TABLE["TABLES"][name]
    assert len(rows) == len(keys)
    for key, row in zip(keys, rows, strict=True):
        formula = TABLE["ROWS"][key].formula
        if name != "memory" and formula is not None:
            assert row[6] == TABLE["mb"](formula(), 2)
            assert 1 <= float(row[5].split()[0]) / float(row[6].split()[0]) <= 1.04, row
        assert all(row[:5])


def shoals_losses(mesh: Mesh, config: Config, steps: int) -> list[float]:
    mesh = laid_out(mesh, dp_shard=config.parallel.dp_shard, dp_replicate=2 // config.parallel.dp_shard)
    return [record.loss for record in train_here(mesh, config, steps)]


def plain_losses(mesh: Mesh, script: Path, exported: Path, prepared: Path, steps: int) -> list[float]:
    sys.path.insert(0, str(script.parent))  # as Python does for a script that it starts
    losses: list[float] = runpy.run_path(str(script))["train"](exported, prepared, steps)
    return losses


@pytest.mark.parametrize(("script", "number"), [("01_ddp_basics.py", 3), ("02_fsdp_training.py", 4)])
def test_plain_torch_has_the_same_losses(
    world: Callable[[int], World], script: str, number: int, tmp_path: Path
) -> None:
    config = config_of(number).replace("data", folder=str(tmp_path / "data"))
    config = config.replace("launch", runs=str(tmp_path / "runs"), name="few")
    steps = 5  # of the warmup, whose learning rates do not depend on the length of a run
    ours = world(2).run(shoals_losses, config, steps)[0]
    model = build_model(config.replace("model", vocab_size=257).model, compute_dtype=torch.float32)
    initialize(model, config.train.seed, "cpu")
    weights = to_hugging_face("llama", {name: p.detach() for name, p in model.named_parameters()})
    save_file(weights, tmp_path / "model.safetensors")
    [prepared] = (tmp_path / "data").glob("dummy-bytes-*")
    for losses in world(2).run(plain_losses, ROOT / "docs" / "learn" / script, tmp_path, prepared, steps):
        assert losses == pytest.approx(ours, rel=1e-6)
        assert len(losses) == steps


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_trains(recipe: Path, tmp_path: Path) -> None:
    """Run a few steps; the first loss is that of one device (nearly, in bfloat16)."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    place = Place(tmp_path)
    few = ["--train.steps=2", "--optim.warmup_steps=1", "--train.sample_tokens=5"]
    assert "held-out text" in place.good("train", f"recipes/learn/{recipe.name}", *few)
    assert place.losses(recipe.stem)[0][1] == pytest.approx(5.5404, abs=5e-4)
