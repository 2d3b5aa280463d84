"""The architecture: imports between rooms (the folders of src/shoal) go one way; quick commands do not import torch."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shoal"

# A floor (layer) may import from itself and from the floors listed before it. Imports within a floor form no cycle either.
FLOORS: list[set[str]] = [
    {"errors", "system"},
    {"config", "hub"},
    {"resolve", "mesh"},
    {"run", "plan", "plan.rehearse", "plan.speed", "plan.choice"},
    {"elastic", "fault", "metrics", "metrics.profile", "trackers"},
    {
        "data.corpus",
        "data.tokens",
        "data.pretokenized",
        "data.stored",
        "data.filters",
        "data.packing",
        "data.order",
        "data",
        "models",
        "optim",
        "checkpoint",
    },
    {"parallel", "launch", "doctor"},
    {"training"},
    {
        "infer",
        "bench",
        "report",
        "report.curves",
        "report.runs",
        "report.compare",
        "report.live",
        "report.page",
        "report.profile",
        "report.pictures",
        "report.causes",
    },
    {"commands", "cli", "__main__", "__init__"},
]
WITHOUT_TORCH = [
    "bench.calibrate",
    "bench.choose",
    "bench.generate",
    "bench.io",
    "bench.layouts",
    "bench.memory",
    "bench.pictures",
    "bench.result",
    "bench.save",
    "bench.scaling",
    "bench.speed",
    "bench.steps",
    "bench.table",
    "bench.timed_steps",
    "bench.trial",
    "bench.versus",
    "bench.worker_process",
    "checkpoint.memory_tier",
    "checkpoint.saved",
    "cli",
    "commands.bench",
    "commands.bench_parser",
    "commands.comparing",
    "commands.dashboard",
    "commands.doctor",
    "commands.flags",
    "commands.launch",
    "commands.launch_hosts",
    "commands.launch_jobs",
    "commands.launch_logs",
    "commands.launch_parser",
    "commands.launch_table",
    "commands.live",
    "commands.machine",
    "commands.models",
    "commands.parser",
    "commands.plan",
    "commands.plot",
    "commands.profile",
    "commands.recipes",
    "commands.records",
    "commands.report",
    "commands.setup",
    "commands.sizes",
    "commands.sync",
    "commands.train",
    "commands.worker",
    "config.auto",
    "config.layout",
    "config.options",
    "config.owners",
    "config.presets",
    "config.schedules",
    "data.order.audit",
    "data.order.ledger",
    "data.order.quarantine",
    "data.prepare",
    "doctor.examine",
    "doctor.findings",
    "doctor.judge_folder",
    "doctor.judge_node",
    "doctor.judge_wires",
    "doctor.probe",
    "doctor.slurm",
    "doctor.speed",
    "elastic.crashes",
    "elastic.heartbeat",
    "elastic.kernel_log",
    "elastic.oom",
    "elastic.pump",
    "elastic.stops",
    "elastic.watch",
    "errors",
    "fault.compiling",
    "fault.limit",
    "fault.stragglers",
    "hub.fetch",
    "hub.find",
    "hub.folder",
    "hub.transfer",
    "infer.asked",
    "infer.out_folder",
    "infer.target",
    "launch.attached",
    "launch.chain",
    "launch.command",
    "launch.hosts",
    "launch.job_table",
    "launch.jobs",
    "launch.meeting_place",
    "launch.scheduler",
    "launch.setup",
    "launch.site",
    "launch.slurm",
    "launch.torchrun",
    "mesh.place",
    "mesh.slurm_step",
    "metrics.profile.costs",
    "metrics.profile.memory",
    "metrics.profile.records",
    "metrics.profile.trace",
    "models.sampling",
    "plan.choice.budget",
    "plan.choice.candidates",
    "plan.choice.choose",
    "plan.choice.devices",
    "plan.choice.price",
    "plan.choice.sketch",
    "plan.choice.table",
    "plan.estimate",
    "plan.fit",
    "plan.fits",
    "plan.hardware",
    "plan.length",
    "plan.machine",
    "plan.rehearse.step",
    "plan.speed.calibration",
    "plan.speed.corrections",
    "plan.speed.measured",
    "plan.speed.rates",
    "plan.speed.seconds",
    "plan.topology",
    "report.amounts",
    "report.causes.cause",
    "report.causes.failure",
    "report.causes.findings",
    "report.causes.logs",
    "report.causes.signatures",
    "report.causes.table",
    "report.compare.comparison",
    "report.compare.words",
    "report.curves.build",
    "report.curves.cached_log",
    "report.curves.curves",
    "report.curves.growing",
    "report.curves.numbers",
    "report.curves.pyramid",
    "report.curves.ranks",
    "report.curves.stored",
    "report.curves.table",
    "report.live.screen",
    "report.page.content",
    "report.page.guard",
    "report.page.html",
    "report.page.markdown",
    "report.page.packing",
    "report.page.rank_view",
    "report.page.served_runs",
    "report.page.server",
    "report.pictures.anatomy",
    "report.pictures.architecture",
    "report.pictures.card",
    "report.pictures.cost",
    "report.pictures.details",
    "report.pictures.loss",
    "report.profile.table",
    "report.profile.view",
    "report.runs.cost",
    "report.runs.facts",
    "report.runs.listing",
    "resolve.checks",
    "resolve.layout_checks",
    "resolve.precedence",
    "resolve.recipe",
    "resolve.recipe_text",
    "resolve.resolve",
    "resolve.schema",
    "resolve.undecided",
    "run.console",
    "run.events",
    "run.folder",
    "run.goodput",
    "run.log_lines",
    "run.narrator",
    "run.now",
    "run.phases",
    "run.profiles",
    "run.records",
    "run.starts",
    "run.tail",
    "system.memory",
    "system.network",
    "system.output",
    "system.repository",
    "system.secrets",
    "system.signals",
    "system.torch_private",
    "trackers.alerts",
    "trackers.beside",
    "trackers.choice",
    "trackers.feeding",
    "trackers.following",
    "trackers.points",
    "trackers.process",
    "trackers.replay",
    "trackers.tracker",
    "training.last_words",
]


@functools.cache
def modules() -> dict[str, Path]:
    """Return {dotted name below `shoal`: file}, without the `__init__` of folders, which contain no code."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if len(parts) == 1 or parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


@functools.cache
def imported(path: Path) -> set[str]:
    """Return the modules that a module imports from shoal, also inside functions and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shoal":
            below = node.module.partition(".")[2]
            inside = {f"{below}.{a.name}".removeprefix(".") for a in node.names}
            names |= (inside & modules().keys()) or ({below} if below else set())
        elif isinstance(node, ast.Import):
            names |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("shoal.")}
    return names


def room(module: str) -> str:
    """Return the room of a module: its folder, or the module itself if it is in no folder."""
    return module.rpartition(".")[0] or module


def floor(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if room(module) in names:
            return number
    raise AssertionError(f"{module} has no place in the house")


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_run_one_way(module: str) -> None:
    for target in imported(modules()[module]):
        assert floor(target) <= floor(module), f"{module} imports {target}, which is above it"


def in_a_circle(arrows: dict[str, set[str]]) -> set[str]:
    """Return the names that are on a cycle of arrows."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = set(arrows[name])
        while ahead:
            seen |= (new := ahead)
            ahead = set().union(*(arrows[n] for n in new)) - seen
        return seen

    return {name for name in arrows if name in reached(name)}


def test_no_circle() -> None:
    between_modules = {module: imported(path) for module, path in modules().items()}
    rooms: dict[str, set[str]] = {room(module): set() for module in between_modules}
    for module, targets in between_modules.items():
        rooms[room(module)] |= {room(t) for t in targets} - {room(module)}
    assert in_a_circle(rooms) == set()
    assert in_a_circle(between_modules) == set()
    assert in_a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


def test_the_hall_is_small() -> None:
    assert len([p for p in SOURCE.iterdir() if p.name != "__pycache__"]) <= 28
    assert len(FLOORS) <= 10


def test_models_know_nothing_of_parallelism() -> None:
    for module, path in modules().items():
        if module.startswith("models."):
            assert not any(t.startswith(("parallel", "launch", "elastic", "training")) for t in imported(path)), module


def test_rank_and_world_size_are_read_in_one_place() -> None:
    readers = []
    for module, path in modules().items():
        strings = {
            n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)
        }
        if strings & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            readers.append(module)
    assert readers == ["mesh.place"]


def test_what_answers_at_once_does_not_import_torch() -> None:
    names = ", ".join(f"shoal.{m}" for m in WITHOUT_TORCH)
    code = f"import sys, {names}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_nothing_is_pickled() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        used |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not used & {"pickle", "torch.load"}, module
        assert "torch.save" not in used or module == "bench.save_worker", module  # it times it, and reads nothing back
