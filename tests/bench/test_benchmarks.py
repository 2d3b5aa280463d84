"""Benchmarks on real processes: what they report is consistent, and agrees with what is known without them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.bench import layouts, memory_worker, scaling, step_worker, trial
from shoal.bench.memory import bench_memory
from shoal.bench.result import Result, read_result
from shoal.bench.scaling import bench_scaling
from shoal.bench.trial import Asked
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.mesh.mesh import Mesh
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from tests.cli.commands import Place
from tests.parallel.layouts import NeverStop, mesh_for
from tests.world import World

RECIPE = """
model: {dim: 64, num_layers: 4, num_heads: 4, max_seq_len: 64}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 64, document_mask: false}
optim: {lr: 1e-2}
train: {steps: 6, global_batch: 16, micro_batch: 4, dtype: float32, device: cpu}
launch: {threads: 1}
"""


def step(mesh: Mesh, config: Config) -> dict[str, Any]:
    return step_worker.measure(config, mesh_for(mesh, config.parallel), NeverStop())


def memory(mesh: Mesh, config: Config) -> dict[str, Any]:
    return memory_worker.measure(config, mesh_for(mesh, config.parallel), NeverStop())


@pytest.fixture
def asked(tmp_path: Path, world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Asked]:
    """Return a function that makes the command line of a benchmark, whose workers are the session's processes."""

    def run(module: str, config: Config, folder: Path, *, what: str, **_: Any) -> dict[str, Any]:
        found: dict[str, Any] = world(config.launch.processes or 1).run(memory if "memory" in module else step, config)[
            0
        ]
        return found

    monkeypatch.setattr(trial, "run_worker", run)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda verb: Asked(
        verb, f"shoal {verb}", tmp_path / "recipe.yaml", [], 1, as_json=True, out=tmp_path / "out.json"
    )


def silent() -> Narrator:
    return Narrator.of(Console(speaks=False))


def test_strong_scaling_trains_the_same_in_every_layout(
    asked: Callable[[str], Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one core, two processes share it: the result says so, and does not count them as two devices."""
    for module in (layouts, scaling):
        monkeypatch.setattr(module, "count_cores", lambda: 1)
    bench_scaling(asked("bench scaling"), processes="1,2", modes=["strong"], methods="ddp,fsdp", narrator=silent())
    found = read_result(tmp_path / "out.json")
    single, *rest = found.rows
    assert [row.name for row in found.rows] == [
        "single, 1 process",
        *(f"{m}, 2 processes, strong" for m in ("DDP", "FSDP")),
    ]
    for row in rest:
        assert row.figures["loss"] == pytest.approx(single.figures["loss"], rel=1e-4)
        assert row.facts["global_batch"] == single.facts["global_batch"]
    consistent(found)
    assert [row.facts["devices"] for row in found.rows] == [1, 1, 1]
    for words in (
        "loss: the same in all layouts",
        "* 2 processes share 1 core: these rows measure how processes share cores",
    ):
        assert any(note.startswith(words) for note in found.notes)


def test_memory_is_as_predicted(asked: Callable[[str], Asked], tmp_path: Path) -> None:
    bench_memory(asked("bench memory"), processes="2", narrator=silent())
    ddp, fsdp = read_result(tmp_path / "out.json").rows
    for row in (ddp, fsdp):
        assert row.figures["allocated_bytes"] == pytest.approx(row.figures["predicted_bytes"], rel=0.03)
        assert len(row.facts["allocated_by_rank"]) == 2
    assert fsdp.median("allocated_bytes") < ddp.median("allocated_bytes")


def test_memory_of_a_case_that_this_machine_cannot_hold_is_not_measured(
    asked: Callable[[str], Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**30, total=2**30))
    monkeypatch.setattr("shoal.bench.memory.BESIDE", 2**30)  # of each process
    with pytest.raises(ShoalError, match="no case fits this machine's memory"):
        bench_memory(asked("bench memory"), processes="2", narrator=silent())
    assert "warning: FSDP, 2 processes: its processes need 2.0 GiB, and 1.0 GiB are free" in capsys.readouterr().err


def consistent(found: Result) -> None:
    """Check a result of scaling: each ratio is that of the same repeat's figures."""
    by_name = {row.name: row for row in found.rows}
    for row in found.rows:
        first = by_name[row.facts["compared_with"]]
        speedup = row.median("tokens_per_second") / first.median("tokens_per_second")
        assert row.median("speedup") == pytest.approx(speedup)
        assert row.median("efficiency") == pytest.approx(speedup / row.facts["devices"] * first.facts["devices"])
        assert row.median("step_seconds") == pytest.approx(
            row.facts["tokens_per_step"] / row.median("tokens_per_second")
        )


@pytest.mark.ci
def test_a_person_measures_scaling_and_compares(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = (
        "--processes",
        "1,2",
        "--method",
        "ddp",
        "--weak",
        "--repeats",
        "1",
        "--out",
        "a.json",
        "--pictures",
        "drawn",
    )
    said = place.good("bench", "scaling", "recipe.yaml", *options)
    assert re.search(r"^DDP +weak +2 +32 ", said, re.MULTILINE)  # method, scaling, processes, batch
    found = read_result(tmp_path / "a.json")
    consistent(found)
    assert found.command == f"shoal bench scaling recipe.yaml {' '.join(options)}"
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        f"{name}.{suffix}" for name in ("performance", "scaling") for suffix in ("png", "svg")
    }
    judged = json.loads(place.answer("compare", "a.json", "a.json", "--json"))
    assert {row["verdict"] for row in judged["rows"]} <= {"same", "cannot tell"}
    assert {row["ratio"] for row in judged["rows"]} == {1}
    assert judged["warnings"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "sped"], "did you mean speed?"),
        (["bench", "speed", "recipe.yaml", "--repeats", "0"], "--repeats 0"),
        (["bench", "scaling", "recipe.yaml", "--processes", "1,3"], "does not divide among 3 processes"),
        (["bench", "scaling", "recipe.yaml", "--method", "tp", "--processes", "3"], "parallel.tp 3 does not divide"),
        (["bench", "scaling", "recipe.yaml", "--launch.processes", "2"], "use --processes"),
        (["bench", "memory", "recipe.yaml", "--processes", "1"], "at least 2"),
        (["bench", "generate", "recipe.yaml"], "do not fit model.max_seq_len 64"),
        (["compare", "recipe.json", "recipe.json"], "not a result of shoal bench"),
    ],
)  # fmt: skip
def test_bad_input_has_one_message(tmp_path: Path, words: list[str], said: str) -> None:
    place = Place(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "recipe.json").write_text("{}")
    assert said in place.refused(*words)
