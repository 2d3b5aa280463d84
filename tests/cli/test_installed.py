"""shoal installed from its wheel, outside the repository, and the output of its first commands."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import Place, clean_environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ci  # the resolved values are tested in tests/resolve/test_typed.py


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder that contains only `books`, with the unpacked wheel next to it."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheel")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = (folder / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "work" / "books").mkdir(parents=True)
    for number in range(6):
        text = " ".join(f"In chapter {number} the boat number {n} went out." for n in range(400))
        (folder / "work" / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    place = Place(folder / "work")
    (place.folder / "recipe.yaml").unlink()
    return place


def shoal(place: Place, *arguments: str, code: int = 0, **environment: str) -> str:
    """Return the output of the wheel's `shoal`, which PYTHONPATH puts before an editable installation."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], cwd=place.folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, timeout=200,
        env=clean_environment() | {"PYTHONPATH": str(place.folder.parent / "site")} | environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def test_the_wheel_has_every_recipe(place: Place) -> None:
    site = place.folder.parent / "site" / "shoal"
    assert {p.relative_to(site / "recipes") for p in (site / "recipes").glob("**/*.yaml")} == {
        p.relative_to(ROOT / "recipes") for p in (ROOT / "recipes").glob("**/*.yaml")
    }
    assert str(site / "recipes" / "quickstart.yaml") in shoal(place, "config", "quickstart")


def test_the_wheel_has_every_file_of_the_page(place: Place) -> None:
    page = Path("report", "page", "static")
    ours, theirs = ROOT / "src" / "shoal" / page, place.folder.parent / "site" / "shoal" / page
    files = {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
    assert Path("uplot", "LICENSE") in files
    assert {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()} == files


def test_init_writes_a_recipe_once(place: Place) -> None:
    assert "mine.yaml" in shoal(place, "init", "mine.yaml")
    written = (place.folder / "mine.yaml").read_bytes()
    assert written == (ROOT / "recipes" / "start.yaml").read_bytes()
    assert "mine.yaml" in shoal(place, "init", "mine.yaml", code=2)
    assert (place.folder / "mine.yaml").read_bytes() == written
    assert "shoal init" in shoal(place, "init", "no/where.yaml", code=2) or not (place.folder / "no").exists()
    resolved = yaml.safe_load(shoal(place, "config", "mine"))  # finds mine.yaml; the totals are comments
    assert resolved["model"]["preset"] == "tiny"


def test_without_a_recipe_one_is_suggested(place: Place) -> None:
    for words in (["train"], ["train", "--lr", "1"], ["config"]):
        said = shoal(place, *words, code=2)
        assert "quickstart" in said
        assert "shoal init" in said
    for words in (["--help"], ["train", "--help"]):
        assert "recipes/" not in shoal(place, *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian", "quickstart"], "did you mean train?"),
        (["train", "quickstat"], "did you mean quickstart?"),
        (["generate", "x", "--promt", "y"], "did you mean --prompt?"),
        (["bench", "speed", "--pears"], "did you mean --peers?"),
        (["eval", "x", "--dtype", "bf17"], "bfloat16"),
        (["train", "quickstart", "--name", "x" * 300], "launch.name"),
        (["train", "x" * 5000], "too long"),
        (["goodput", "x" * 5000], "too long"),
        (["eval", "x" * 300], "too long"),
        (["train", "quickstart", "--data.folder", "\udcff"], "--data.folder"),
        (["export", "x", "--out", "\udcff\udcfe"], "--out"),
    ],
    ids=lambda words: " ".join(words)[:30].encode(errors="replace").decode() if isinstance(words, list) else "",
)
def test_what_is_mistyped_gets_one_message(place: Place, words: list[str], named: str) -> None:
    said = shoal(place, *words, code=2)
    assert named in said
    assert len(said.splitlines()) < 12


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "n0"}, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "MASTER_ADDR": "n0"}, "SLURM_NTASKS"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "1"}, "RANK"),
    ],
    ids=str,
)
def test_a_launchers_variables_that_are_not_whole(place: Place, environment: dict[str, str], named: str) -> None:
    assert named in shoal(place, "train", "quickstart", code=2, **environment)


def test_what_is_typed_replaces_the_recipes_and_is_named_first(place: Place) -> None:
    """The output ends with the totals, as comments."""
    said = shoal(place, "config", "quickstart", "--model.preset", "gpt2", "--train.epochs", "2").splitlines()
    assert all(word in said[0] for word in ("gpt2", "model.dim 192"))
    assert all(word in said[1] for word in ("--train.epochs 2", "train.steps 1200"))
    amounts = [line.removeprefix("# ").partition(":")[0] for line in said[-5:]]
    assert amounts[-1] == "memory"
    assert "parameters" in amounts


def test_a_model_trains_on_a_folder_without_a_recipe(place: Place) -> None:
    """It first prints its assumptions, and that MASTER_ADDR is unused."""
    said = shoal(
        place, "train", "--model.preset", "tiny", "--data.paths", "books", "--data.tokenizer", "bytes", "--max-steps", "2",
        "--batch_size", "16", "--dtype", "fp32", "--processes", "2", MASTER_ADDR="nowhere",
    )  # fmt: skip
    assert "shoal init" in said.splitlines()[0]
    lines = said.splitlines()
    assert sum("MASTER_ADDR" in line for line in lines) == 1  # not once per process
    assert sum("attention:" in line for line in lines) == 1
    assert "held-out" in said
    assert (place.folder / "runs" / "run" / "config.yaml").is_file()
