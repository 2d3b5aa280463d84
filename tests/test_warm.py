"""The test suite's own tools: commands that are forked, and tests that may not be skipped."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests import warm
from tests.cli.commands import clean_environment
from tests.conftest import fail_if_skipped

ENVIRONMENT = {"PATH": "/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("arguments", "changes", "alike"),
    [
        (["train"], {}, True),
        (["train"], {"SHOAL_FAULTS": "[]", "RANK": "1", "TMPDIR": "/x"}, True),
        (["train"], {"ATEN_CPU_CAPABILITY": "avx2"}, False),
        (["train"], {"OMP_NUM_THREADS": "2"}, False),
        (["train"], {"HF_HOME": "/x"}, False),
        (["eval", "--threads", "2"], {}, False),
        (["train", "--launch.threads=2"], {}, True),  # sets OMP_NUM_THREADS of the workers only
    ],
)
def test_what_is_read_at_the_start_decides(arguments: list[str], changes: dict[str, str], alike: bool) -> None:
    assert warm.starts_alike(warm.shoal(*arguments), ENVIRONMENT | changes, ENVIRONMENT) is alike


def test_the_first_command_of_a_verb_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(warm, "seen_by_all", tmp_path)
    monkeypatch.setattr(warm, "_seen", set())
    started = [warm.popen_of(verb) for verb in ("train", "train", "eval")]
    assert started == [subprocess.Popen, warm.Popen, subprocess.Popen]
    monkeypatch.setattr(warm, "_seen", set())  # as in another pytest worker
    assert warm.popen_of("train") == warm.Popen


def test_a_forked_command_is_a_child_with_its_own_output_and_exit_code(tmp_path: Path) -> None:
    process = warm.Popen(
        warm.shoal("train", "nothing.yaml"), cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert psutil.Process(process.pid).ppid() == os.getpid()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nothing.yaml" in output
    assert "Traceback" not in output


def test_a_forked_command_dies_of_a_signal(tmp_path: Path) -> None:
    read = subprocess.PIPE
    process = warm.Popen(
        warm.shoal("generate", "--chat"), cwd=tmp_path, env=clean_environment(), stdin=read, stdout=read, stderr=read
    )
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()


@pytest.mark.parametrize(("ci", "reason", "outcome"), [
    ("true", "Skipped: no such package", "failed"),
    ("true", "Skipped: needs vectors of two widths", "skipped"),
    ("", "Skipped: no such package", "skipped"),
])  # fmt: skip
def test_in_ci_a_skipped_test_fails(monkeypatch: pytest.MonkeyPatch, ci: str, reason: str, outcome: str) -> None:
    monkeypatch.setenv("CI", ci)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, reason))
    assert fail_if_skipped(report).outcome == outcome
