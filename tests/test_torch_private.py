"""The list of torch's private names: each is in this torch, none is used that is not listed, a missing one is named."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shoal import torch_private
from shoal.bench.environment import describe
from shoal.errors import LaunchError
from shoal.refusals import refusals
from shoal.torch_private import PRIVATE, TESTED, Private, exists, is_tested, minor, require, version_notes
from tests.cli.commands import Place, clean_environment
from tests.parallel.layouts import config_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "shoal"
NAMES = [name for private in PRIVATE.values() for name in private.names]
LISTED = {part for name in NAMES for part in re.split(r"[.:]", name)}

# Private names that are not torch's, by whose they are.
OTHERS = {
    "os": {"_exit"},
    "namedtuple": {"_replace"},
    "transformers": {
        "_attn_implementation", "_is_stateful", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_model_mapping",
        "_no_split_modules", "_supports_flash_attn", "_supports_sdpa", "_name_or_path",
    },
    "tiktoken": {"_mergeable_ranks", "_pat_str", "_special_tokens"},
    "folders and keys": {"_bundled", "_sysconfigdata", "_token", "_bits_per_byte", "_SOCKET_IFNAME"},
}  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


@cache
def trees() -> dict[Path, ast.Module]:
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "torch_private.py"]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def used(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private names that are read from something, imported, or named in a string, with their lines."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        for name in filter(is_private, names):
            yield name, node.lineno  # type: ignore[attr-defined]


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_each_is_in_this_torch_if_it_was_seen_there() -> None:
    here = minor(torch_private.torch_version())
    untested = here not in map(minor, TESTED)
    for private in PRIVATE.values():
        if untested or here in map(minor, private.seen):
            assert [name for name in private.names if not exists(name)] == []
        else:
            assert private.optional, "needed, and not there"


@pytest.mark.parametrize(
    "name", ["torch:_none", "torch.nn:Module._none", "torch._none:x", "torch:ops.aten._none", "torch.nn:Module.train.x"]
)
def test_one_that_is_not_there_is_missed(name: str) -> None:
    assert not exists(name)


def test_no_private_name_is_used_that_is_not_listed() -> None:
    parsed = trees()
    ours = {name for tree in parsed.values() for name in defined(tree)}
    known = LISTED | ours | set().union(*OTHERS.values())
    found = {
        f"{path.relative_to(SOURCE)}:{line}: {n}"
        for path, tree in parsed.items()
        for n, line in used(tree)
        if n not in known
    }
    assert not found, "torch's belong to shoal/torch_private.py, others' to OTHERS here"


def test_no_private_name_is_listed_that_is_not_used() -> None:
    parsed = trees()
    mentioned = {name for tree in parsed.values() for name, _ in used(tree)} | {
        n for t in parsed.values() for n in defined(t)
    }
    last = {re.split(r"[.:]", name)[-1]: name for name in NAMES}
    assert [name for leaf, name in last.items() if is_private(leaf) and leaf not in mentioned] == []


def test_what_a_class_overrides_of_torch_is_listed() -> None:
    """Also an attribute of torch's object that we set, or one of ours that would hide one of torch's."""
    found = set()
    for path, tree in trees().items():
        origin = {
            a.asname or a.name: (n.module, a.name)
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                module, name = origin.get(ast.unparse(base), ("", ""))
                if not (module or "").startswith("torch."):
                    continue
                theirs: Any = getattr(importlib.import_module(module or ""), name)
                assert inspect.isclass(theirs)
                mine = set(filter(is_private, defined(node))) | {n for n, _ in used(node)}
                found |= {
                    f"{path.name}: {node.name}.{n}"
                    for n in mine - LISTED
                    if hasattr(theirs, n) or n in torch_private._set_by(theirs)
                }
    assert not found


def test_a_missing_one_says_which_feature_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for feature, private in PRIVATE.items():
        if not private.optional:
            require(feature)
        gone = Private(private.feature, (*private.names, "torch.distributed:_gone.away"), private.instead)
        monkeypatch.setitem(PRIVATE, feature, gone)
        with pytest.raises(LaunchError) as caught:
            require(feature)
        for word in (private.feature, "torch.distributed._gone.away", torch_private.torch_version(), private.instead):
            assert word in str(caught.value)


def test_the_range_is_the_one_that_is_declared_and_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [torch] = [line for line in project["dependencies"] if line.startswith("torch>")]
    major, last = minor(TESTED[-1])
    assert torch == f"torch>={'.'.join(map(str, minor(TESTED[0])))},<{major}.{last + 1}"
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|", (ROOT / "docs" / "SETUP.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(TESTED)
    assert (
        re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1] in TESTED
    )  # type: ignore[index]


@pytest.mark.parametrize("version", [*TESTED, "2.13.7", "2.13.0a0"])
def test_a_tested_torch_is_not_mentioned(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch_private, "torch_version", lambda: version)
    assert is_tested(version)
    assert version_notes() == []


@pytest.mark.parametrize("version", ["2.10.0", "2.99.0", "3.13.0", "2.99.0.dev20270101"])
def test_another_torch_is_one_note_and_refuses_ring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    monkeypatch.setattr(torch_private, "torch_version", lambda: version)
    monkeypatch.setattr("shoal.refusals.torch_version", lambda: version)
    [note] = version_notes()
    assert version in note
    ring = config_of(tmp_path, "ring", parallel__cp=2, parallel__cp_method="ring", data__document_mask=False)
    [refusal] = refusals(ring, 2)
    assert "parallel.cp_method ring" in refusal
    assert version in refusal
    assert list(refusals(ring.replace("parallel", cp_method="allgather"), 2)) == []


def test_env_says_whether_this_torch_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_line() -> str:
        return next(line for line in describe().splitlines() if line.startswith("torch "))

    assert ("not in the tested range" in torch_line()) != is_tested(torch_private.torch_version())
    monkeypatch.setattr("shoal.bench.environment.is_tested", lambda version: False)
    assert "not in the tested range" in torch_line()


IN_ANOTHER_TORCH = """
import sys
from shoal import cli, torch_private
needed = torch_private.PRIVATE["processes"]
gone = torch_private.Private(needed.feature, ("torch.distributed:_gone",), needed.instead)
torch_private.PRIVATE["processes"], torch_private.TESTED = gone, ("1.13.0",)
cli.main(["train", sys.argv[1]])
"""


def test_a_start_in_another_torch_is_one_line_and_a_missing_name_ends_it_with_2(tmp_path: Path) -> None:
    recipe = Place(tmp_path).folder / "recipe.yaml"
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_TORCH, str(recipe)], cwd=tmp_path, env=clean_environment(), capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert said.count("was not tested with this version of shoal") == 1
    assert f"{PRIVATE['processes'].feature} uses torch.distributed._gone" in " ".join(said.split())
