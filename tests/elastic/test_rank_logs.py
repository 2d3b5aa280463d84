"""The logs that a real launcher writes for its workers, and what a failed job is explained by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.run_options import Launch
from shoal.elastic.rank_logs import wants_logs
from shoal.report.causes.cause import first_cause
from shoal.report.causes.logs import attempts
from shoal.run.folder import RunFolder

Launched = Callable[[str], tuple[int, list[dict[str, Any]]]]
# Rank 0 waits until rank 1 is gone, and says that it lost a peer. Rank 1 fails.
FAILING = """
import os, sys
if os.environ["RANK"] == "1":
    os.open(sys.argv[1], os.O_WRONLY)
    print("about to fail", flush=True)
    {failure}
open(sys.argv[1]).read()
print("Connection closed by peer [10.0.0.1]:7", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


@pytest.mark.usefixtures("in_job")
def test_each_worker_has_a_log_under_slurm(
    launched: Launched,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, _ = launched(FAILING.format(failure="raise KeyError('tokens')"))
    shown = capfd.readouterr()
    folder = RunFolder(tmp_path / "run")
    [attempt] = attempts(folder.logs)
    assert code == 1
    assert (attempt.job, attempt.restart) == ("42", 1)
    assert {path.name for path in attempt.folder.glob("rank-*")} == {"rank-0.log", "rank-1.log"}
    log = (attempt.folder / "rank-1.log").read_text()
    assert log.splitlines()[0].endswith(", job 42, restart 1")
    assert log.splitlines()[-1].endswith("run ended: ended with code 1")
    assert "out about to fail" in log
    assert "about to fail" not in shown.out
    assert "rank 1: KeyError: 'tokens'" in shown.err
    cause = first_cause(folder)
    assert cause is not None
    assert cause.first.rank == 1
    assert cause.first.finding.what == "raised KeyError: 'tokens'"
    assert [each.rank for each in cause.followed] == [0]


@pytest.mark.usefixtures("in_job")
def test_the_message_of_a_worker_is_in_its_log(launched: Launched, tmp_path: Path) -> None:
    failure = "import json; json.dump({'message': 'no such corpus', 'timestamp': 1}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w')); os._exit(2)"
    code, _ = launched(FAILING.format(failure=failure))
    cause = first_cause(RunFolder(tmp_path / "run"))
    assert code == 2
    assert cause is not None
    assert (cause.first.rank, cause.first.finding.what) == (1, "reported: no such corpus")


def test_on_one_node_without_slurm_workers_print_to_the_terminal(
    launched: Launched,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert wants_logs(Launch(nodes=2))
    assert not wants_logs(Launch())
    launched(FAILING.format(failure="os._exit(7)"))
    assert "about to fail" in capfd.readouterr().out
    assert not (tmp_path / "run" / "logs").exists()
    cause = first_cause(RunFolder(tmp_path / "run"))  # from the events
    assert cause is not None
    assert (cause.first.rank, cause.first.finding.signature.name) == (1, "exit code")
