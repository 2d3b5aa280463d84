"""The house: imports between rooms run one way, and what promises to answer at once does not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shoal"

# Each floor may import from itself and from the floors before it.
FLOORS: list[set[str]] = [
    {"errors", "disk", "address", "secrets", "__init__", "output", "torch_private", "cpu"},
    {"config", "presets"},
    {"layout", "pipeline_plan", "hub", "recipe"},
    {"refusals", "precedence"},
    {"contradictions"},
    {"resolve"},
    {"plan", "launch.place", "metrics.lines", "metrics.trackers", "metrics.compression"},
    {"fault.heartbeat", "fault.limit", "fault.signals"},  # what a worker and its launcher both know
    {"runs"},
    {"launch", "metrics.console", "metrics.narrator"},
    {"parallel.mesh", "parallel.store", "parallel.region"},  # nouns: they cross every border above
    {"data", "models", "optim", "checkpoint", "metrics", "fault"},
    {"parallel"},
    {"train", "infer.generate", "infer.sampling"},
    {"infer", "bench", "report"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
WITHOUT_TORCH = [
    "cli", "verbs", "config", "recipe", "precedence", "report.amounts", "resolve", "contradictions", "refusals", "layout", "pipeline_plan", "presets", "runs", "errors", "secrets", "plan.estimate", "plan.hardware", "launch.torchrun", "launch.place", "launch.watch", "launch.stops", "launch.crashes", "launch.listen", "fault.heartbeat", "fault.limit", "fault.signals", "metrics.console", "metrics.trackers", "hub.find", "hub.folder", "hub.fetch", "hub.transfer", "data.prepare", "data.open", "data.ledger", "metrics.goodput", "checkpoint.saved", "checkpoint.memory", "fault.stragglers", "output", "torch_private", "metrics.narrator", "plan.length", "train.last_words", "infer.asked", "infer.target", "infer.sampling", "infer.out_folder", "plan.fit", "launch.oom", "fault.compiling",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name below `shoal` -> file; a room's `__init__` is the room's."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """What a module imports from shoal, also inside functions and for types alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shoal":
            below = node.module.partition(".")[2]
            names |= {below} if below else {a.name for a in node.names if not a.name.startswith("__")}
        elif isinstance(node, ast.Import):
            names |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("shoal.")}
    return names


def floor(module: str) -> int:
    """By the longest name that fits: `metrics.console` before `metrics`."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, names in enumerate(FLOORS):
            if name in names:
                return number
    raise AssertionError(f"{module} has no place in the house")


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_run_one_way(module: str) -> None:
    for target in imported(modules()[module]):
        assert floor(target) <= floor(module), f"{module} imports {target}, which stands above it"


def test_models_know_nothing_of_parallelism() -> None:
    for module, path in modules().items():
        if module.startswith("models."):
            assert not any(t.startswith(("parallel", "launch", "train")) for t in imported(path)), module


def test_rank_and_world_size_are_read_in_one_place() -> None:
    readers = []
    for module, path in modules().items():
        strings = {
            n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)
        }
        if strings & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            readers.append(module)
    assert readers == ["launch.place"]


def test_what_answers_at_once_does_not_import_torch() -> None:
    names = ", ".join(f"shoal.{m}" for m in WITHOUT_TORCH)
    code = f"import sys, {names}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_nothing_is_pickled() -> None:
    for module, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, module
        assert "torch.load" not in text, module
        assert "torch.save" not in text, module
