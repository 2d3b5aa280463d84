"""Workers that fail: a problem that a user can fix is its message alone, and nothing is left running."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from shoal.bench.worker_process import run_module
from shoal.errors import LaunchError, ShoalError


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("problem", ShoalError, "^the corpus is empty; set data.paths$"),
        ("memory", ShoalError, "^out of memory: "),
        ("bug", LaunchError, "^the work ended with code 1: ValueError: a bug$"),
        ("hang", LaunchError, "^the work did not end within 1 s$"),
    ],
)
def test_what_went_wrong_is_said(tmp_path: Path, how: str, kind: type[Exception], said: str) -> None:
    answer = tmp_path / "answer.json"
    limit = 1.0 if how == "hang" else None
    with pytest.raises(kind, match=said):
        run_module(
            "tests.bench.failing_worker", [str(answer), how], answer, processes=1, threads=1, limit_seconds=limit,
            what="the work",
        )  # fmt: skip
    assert not [p for p in psutil.Process().children() if "failing_worker" in " ".join(p.cmdline())]
