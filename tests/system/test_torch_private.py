"""The list of torch's private names: each exists in this torch, all used ones are listed, a missing one is named."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from scripts import test_torch
from torch.distributed.fsdp import FSDPModule

from shoal.bench.environment import describe
from shoal.commands.plan import _second_count
from shoal.config.options import Model
from shoal.errors import LaunchError
from shoal.fault.compiling import told_of_compilations
from shoal.models.hf import HuggingFaceModel
from shoal.parallel import recompute
from shoal.parallel.apply import parallelize
from shoal.parallel.fsdp_gradients import ShardedGradients
from shoal.parallel.recompute import checkpointed, set_activation_budget
from shoal.parallel.ring import Ring
from shoal.resolve.layout_checks import refusals
from shoal.system import torch_private
from shoal.system.torch_private import (
    PRIVATE,
    TESTED,
    Feature,
    Private,
    exists,
    is_tested,
    minor,
    require,
    version_notes,
)
from tests.cli.commands import Place, clean_environment
from tests.parallel.layouts import config_of
from tests.parallel.matrix import cover

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "shoal"
NAMES = [name for private in PRIVATE.values() for name in private.names]
LISTED = {part for name in NAMES for part in re.split(r"[.:]", name)}

# Private names that are not torch's, by owner.
OTHERS = {
    "os": {"_exit"},
    "sys": {"_base_executable"},
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
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if path != Path(torch_private.__file__)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def used(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield private names that are read as attributes, imported, or named in a string, with their lines."""
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
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
    assert not found, "torch's belong to shoal/system/torch_private.py, others' to OTHERS here"


def test_no_private_name_is_listed_that_is_not_used() -> None:
    parsed = trees()
    mentioned = {name for tree in parsed.values() for name, _ in used(tree)} | {
        n for t in parsed.values() for n in defined(t)
    }
    last = {re.split(r"[.:]", name)[-1]: name for name in NAMES}
    assert [name for leaf, name in last.items() if is_private(leaf) and leaf not in mentioned] == []


def test_what_a_class_overrides_of_torch_is_listed() -> None:
    """This includes attributes of torch that we set, and names of ours that would hide torch's."""
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


@pytest.mark.parametrize("name", PRIVATE["processes"].names)
def test_a_torch_without_a_name_of_its_elastic_agent_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "exists", lambda each: each != name)
    with pytest.raises(LaunchError) as caught:
        require("processes")
    assert f"starting and restarting processes uses {name.replace(':', '.')}, which torch " in str(caught.value)
    assert "torchrun" in str(caught.value)


def _sharded_gradients() -> None:
    ShardedGradients(Mock(spec=FSDPModule), Mock(), Mock(), Mock())


def _told_of_compilations() -> None:
    with told_of_compilations(Mock(), compiles=True):
        pass


# How a run reaches each call of `require`, by the function that contains it. If the call were removed, these functions would
# continue or fail on the missing name, without a `LaunchError`.
ASKED: dict[tuple[str, str, Feature], Callable[[], object]] = {
    ("fault/compiling.py", "told_of_compilations", "compile"): _told_of_compilations,
    ("parallel/recompute.py", "set_activation_budget", "compile"): lambda: set_activation_budget(1.0),
    ("parallel/recompute.py", "_kept_operators", "selective"): lambda: checkpointed(Mock(), "selective"),
    ("parallel/ring.py", "__init__", "ring"): lambda: Ring(Mock()),
    ("parallel/fsdp_gradients.py", "__init__", "bitwise_shards"): _sharded_gradients,
    ("parallel/apply.py", "parallelize", "train"): lambda: parallelize(
        Mock(), Mock(), parallel=Mock(), train=Mock(), data=Mock(), weights=Mock(), say=Mock()
    ),
    ("commands/plan.py", "_second_count", "trace"): lambda: _second_count(Mock()),
    ("models/hf.py", "__init__", "hf"): lambda: HuggingFaceModel(Model(), torch.float32),
}


@pytest.mark.parametrize("place", ASKED, ids=lambda place: f"{place[0]} {place[2]}")
def test_a_feature_asks_before_it_is_used(place: tuple[str, str, Feature], monkeypatch: pytest.MonkeyPatch) -> None:
    recompute._kept_operators.cache_clear()
    private = PRIVATE[place[2]]
    gone = Private(private.feature, ("torch:_gone",), private.instead)
    monkeypatch.setitem(PRIVATE, place[2], gone)
    with pytest.raises(LaunchError, match=r"uses torch\._gone"):
        ASKED[place]()


def test_every_place_that_asks_is_tried() -> None:
    """`launch` is tested below, in a process that it ends."""
    found = {
        (path.relative_to(SOURCE).as_posix(), function.name, call.args[0].value)  # type: ignore[attr-defined]
        for path, tree in trees().items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "require"
    }
    assert found == {*ASKED, ("launch/torchrun.py", "_launch", "processes")}
    needed = {feature for feature, private in PRIVATE.items() if not private.optional}
    assert {feature for _, _, feature in found} == needed


def test_the_range_is_the_one_that_is_declared_and_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [torch] = [line for line in project["dependencies"] if line.startswith("torch>")]
    major, last = minor(TESTED[-1])
    assert torch == f"torch>={'.'.join(map(str, minor(TESTED[0])))},<{major}.{last + 1}"
    lines = (ROOT / "docs" / "SETUP.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    [header] = [row for row in table if row[0] == "torch" and row[1:2] == ["names"]]
    assert header == ["torch", *test_torch.PARTS, test_torch.QUICKSTART]
    rows = [row for row in table if re.fullmatch(r"\d+\.\d+\.\d+", row[0])]
    assert [row[0] for row in rows] == list(TESTED)
    assert all(len(row) == len(header) and all(row) for row in rows)
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert pinned[1] in TESTED


@pytest.mark.parametrize("part", [part for part, words in test_torch.PARTS.items() if "-k" in words])
def test_what_a_part_selects_is_there(part: str) -> None:
    """Otherwise a renamed test would silently drop out of its part."""
    words = test_torch.PARTS[part]
    files = [(ROOT / word).read_text(encoding="utf-8") for word in words if word.endswith(".py")]
    functions = [f.name for text in files for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef)]
    names = [name for name in functions if name.startswith("test_")]
    if "tests/parallel/test_matrix.py" in words:  # its tests are named after their cells
        names += [str(cell) for cell in cover()]
    for word in re.split(r" or | and |not ", words[words.index("-k") + 1]):
        assert not word or any(word in name for name in names), word


@pytest.mark.parametrize(
    ("code", "last", "fine", "said"),
    [
        (0, "== 3 passed in 1.00s ==", True, "3 of 3"),
        (0, "== 3 passed, 2 skipped in 1.00s ==", True, "3 of 3, 2 skipped"),
        (0, "== 5 skipped in 1.00s ==", False, "0 of 0, 5 skipped"),
        (1, "== 1 failed, 3 passed in 1.00s ==", False, "3 of 4"),
        (5, "== 9 deselected in 1.00s ==", False, "0 of 0 (exit code 5)"),
    ],
)
def test_a_part_passes_where_a_test_passed_and_none_failed(
    code: int, last: str, fine: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_torch, "call", lambda *args: (code, f"a line\n{last}\n"))
    outcome = test_torch.tests("names", Path("python"), tmp_path)
    assert (outcome.fine, outcome.said) == (fine, said)


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
    monkeypatch.setattr("shoal.resolve.layout_checks.torch_version", lambda: version)
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
from shoal import cli
from shoal.system import torch_private
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
