"""A rehearsal of scripts/gpu_check.py: everything that runs without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "gpu_check.py")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    # The script's dataclasses look up their module in sys.modules.
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise later tests would inherit it
        spec.loader.exec_module(module)
    return module


class Allocator:
    """A fake device's memory, as `torch.cuda` reports it."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def take(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)

    def reset(self) -> None:
        self.most = self.now


def test_memory_is_counted_from_what_was_in_use_before(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", memory.reset)
    memory.take(1000)  # a reference's peak, mostly freed
    memory.take(-900)

    def work() -> torch.Tensor:
        memory.take(30)
        memory.take(-20)
        return torch.ones(())

    target = script.Target(torch.device("cuda"), tmp_path, quick=True)
    assert script.with_memory(target, work)[1] == 30


@pytest.mark.parametrize(("mebibytes", "passes"), [(60, True), (128, False)])
def test_attention_that_holds_all_the_scores_fails(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mebibytes: int, passes: bool
) -> None:
    monkeypatch.setattr(script, "with_memory", lambda target, work: (work(), mebibytes * 2**20))
    passed, said = script.check_attention(script.Target(torch.device("cpu"), tmp_path, quick=True))
    assert passed is passes
    assert f"{mebibytes} MiB" in said


def test_a_quickstart_that_fails_is_in_the_report(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(target: Any) -> None:
        raise RuntimeError("shoal train ended with 1")

    monkeypatch.setattr(script, "CHECKS", [])
    monkeypatch.setattr(script, "speeds", lambda target: ["measured"])
    monkeypatch.setattr(script, "quickstart", fails)
    assert script.main(["--device", "cpu"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["quickstart"] == {"failed": "RuntimeError: shoal train ended with 1"}
    assert report["speed"] == ["measured"]


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
    assert report["versions"]["torch"].startswith(torch.__version__)
    assert report["device"]
    assert report["commit"]
    assert [timed.get("failed") for timed in report["speed"]] == [None]
    assert report["speed"][0]["tokens_per_second"] > 0
