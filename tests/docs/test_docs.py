"""The documentation matches the code: commands, links, options and recipes."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.config.options import SECTIONS, options
from shoal.resolve.recipe import find_recipe
from shoal.resolve.resolve import resolve
from tests.cli.commands import Place
from tests.packaged import make_files, recipes
from tests.test_rooms import imported, modules, room

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
# Made by runs; a page may link to a picture before it is committed.
PICTURES = ROOT / "docs" / "pictures"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def shell_lines() -> Iterator[tuple[Path, str]]:
    """Yield each command line of the fenced sh blocks of all pages, without its comment."""
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "sh"):
            block = re.sub(r"<<'(\w+)'.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
            for line in block.splitlines():
                if command := line.partition("#")[0].strip():
                    yield page, command


def shoal_commands() -> list[tuple[str, list[str]]]:
    """Return (page, arguments) of every `shoal ...` in a sh block, also after `-m` of another launcher."""
    found = []
    for page, line in shell_lines():
        words = shlex.split(line)
        if "shoal" in words and (words[0] == "shoal" or words[words.index("shoal") - 1] == "-m"):
            found.append((name(page), words[words.index("shoal") + 1 :]))
    return found


def shown_recipes() -> set[str]:
    """Return the names of the recipes that a page shows inline: "Put this into `mine.yaml`"."""
    return {name for page in PAGES for name in re.findall(r"into `(\w+\.yaml)`", page.read_text(encoding="utf-8"))}


def test_pages_have_commands() -> None:
    assert len(PAGES) >= 8
    assert len(shoal_commands()) >= 5


@pytest.mark.parametrize(
    ("page", "arguments"), shoal_commands(), ids=lambda v: " ".join(v) if isinstance(v, list) else v
)
def test_commands_parse_and_their_recipes_exist(
    page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [word.replace("{task}", "0") for word in arguments]
    args, rest = build_parser(*arguments[:2]).parse_known_args(arguments)
    overrides, stray = read_overrides(args, rest)
    if not hasattr(args, "overrides"):  # an action or a verb without the config's options
        stray = rest
    assert not stray
    assert all(key in options() for key, _, _ in overrides)
    if arguments[0] == "launch" and any(
        key == "launch.nodes" for key, _, _ in overrides
    ):  # chooses where they meet itself
        overrides.append(("launch.rendezvous", "node0:29400", "shoal launch"))
    recipe = getattr(args, "recipe", None)
    if recipe is not None and str(recipe) not in shown_recipes():
        path = ROOT / find_recipe(recipe)
        monkeypatch.chdir(tmp_path)
        make_files(path, tmp_path)
        resolve(path, overrides)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page, line in shell_lines():
        words = shlex.split(line)
        if "make" in words:
            asked = {w for w in words[words.index("make") + 1 :] if "=" not in w}
            assert asked <= targets, f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.parent == PICTURES:
            continue
        assert file.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_are_named_exist(page: Path) -> None:
    sections = "|".join(SECTIONS)
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.\w+)(?=[`:=, ])", text))
    unknown = named - options().keys()
    assert all(n.endswith((".py", ".jsonl")) for n in unknown), f"{name(page)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Check paths such as `training/loop.py`, relative to src/shoal or the root."""
    for path in re.findall(
        r"`((?:src|tests|scripts|docs|recipes|[a-z]+)/[\w/]+\.(?:py|yaml|sh))`", page.read_text("utf-8")
    ):
        assert any((base / path).is_file() for base in (ROOT, ROOT / "src" / "shoal")), f"{name(page)}: {path}"


def test_the_table_of_options_is_what_the_code_says() -> None:
    module = runpy.run_path(str(ROOT / "scripts" / "tables.py"))
    page = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    assert page == module["with_table"]("options"), "run python scripts/tables.py"
    assert all(f"`{key}`" in page for key in options())


def test_python_names_exist() -> None:
    """Check every `shoal.module.name` of API.md."""
    for module, attribute in re.findall(
        r"`shoal((?:\.[a-z_]+)+)\.(\w+)", (ROOT / "docs" / "API.md").read_text("utf-8")
    ):
        path = ROOT / "src" / "shoal" / Path(*module.strip(".").split("."))
        tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert attribute in defined, f"shoal{module}.{attribute}"


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "python"):
            ast.parse(re.sub(r"^  ", "", block, flags=re.MULTILINE) if block.startswith("  ") else block)


def test_the_picture_of_the_house_is_what_the_code_says() -> None:
    module = runpy.run_path(str(ROOT / "scripts" / "draw_house.py"))
    assert module["PICTURE"].read_text(encoding="utf-8") == module["svg"](), "run python scripts/draw_house.py"


def test_models_import_what_the_page_says() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    [said] = re.findall(r"`models` imports only (.+?)\. ", page.replace("\n", " "))
    assert set(re.findall(r"`(\w+)`", said)) == set().union(
        *({room(t) for t in imported(path)} for name, path in modules().items() if room(name) == "models")
    ) - {"models"}


@pytest.mark.parametrize("recipe", recipes(), ids=name)
def test_recipes_are_valid(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(recipe, tmp_path)
    resolve(recipe)


def test_recipes_shown_inline_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the README's recipes, with the files that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "stories.jsonl").touch()
    shown = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml")
    assert len(shown) == 2
    (tmp_path / "mine.yaml").write_text(shown[0], encoding="utf-8")
    resolve(tmp_path / "mine.yaml")
    (tmp_path / "lines.yaml").write_text(shown[1], encoding="utf-8")
    resolve(tmp_path / "lines.yaml", [("train.steps", "10", "the test")])


def test_the_learners_steps_differ_only_in_what_they_teach() -> None:
    one, two, three = (resolve(ROOT / "recipes" / "learn" / f).config for f in (
        "01-one-device.yaml", "02-accumulation.yaml", "03-data-parallel.yaml"))  # fmt: skip
    assert one.replace("train", micro_batch=2) == two
    assert two.replace("launch", processes=2) == three


@pytest.mark.slow
def test_the_readmes_first_commands_run(tmp_path: Path) -> None:
    """Run `make train`'s command and the two commands after it, with few steps."""
    assert "shoal train recipes/quickstart.yaml" in (ROOT / "Makefile").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    place = Place(tmp_path)
    few = [
        "--train.steps=3",
        "--optim.warmup_steps=1",
        "--train.sample_tokens=10",
        "--data.tokenizer_sample_bytes=1000000",
    ]
    assert "held-out text" in place.good("train", "recipes/quickstart.yaml", *few)
    for page, arguments in shoal_commands():
        if page == "README.md" and arguments[0] in ("generate", "eval"):
            place.good(*arguments)


@pytest.mark.slow
def test_the_readmes_own_text_recipe_trains(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "books").mkdir()
    for number in range(6):
        text = " ".join(f"In chapter {number} the boat number {n} went out." for n in range(4000))
        (tmp_path / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    [recipe, _] = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    assert "held-out text" in place.good("train", "mine.yaml")
