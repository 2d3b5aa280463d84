"""scripts/gpu_check.py: all of it that runs without a GPU is rehearsed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "gpu_check.py")


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_what_needs_no_gpu_is_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text(encoding="utf-8"))
    assert {c["name"]: c["passed"] for c in report["checks"] if c["passed"] is not True} == {"float16": None}
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]
    assert report["commit"]
    assert [timed.get("failed") for timed in report["speed"]] == [None]
    assert report["speed"][0]["tokens_per_second"] > 0
