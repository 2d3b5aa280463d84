"""The facts of runs: real ones, damaged ones, and long ones whose best evaluation is found without parsing every line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from shoal.config.options import Config, Optim
from shoal.report.runs import best, listing
from shoal.report.runs.facts import RunFacts, all_runs, differences
from shoal.report.runs.written_options import written_options
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics

STEP = '{"step":%d,"tokens":%d,"loss":3.5,"lr":0.001,"grad_norm":1.0,"tokens_per_second":%d,"step_seconds":0.1,"mfu":null,"memory_bytes":1}\n'
HELD_OUT = '{"step":%d,"tokens":%d,"val_loss":%s,"val_bits_per_byte":1.0}\n'


def test_a_real_run(finished: Path) -> None:
    folder = RunFolder(finished / "runs" / "done")
    found, metrics = RunFacts.read(folder), read_metrics(folder.metrics_file)
    assert (found.name, found.state, found.step, found.total_steps, found.restarts) == ("done", "finished", 4, 4, 0)
    assert (found.loss, found.tokens) == (metrics.steps[-1].loss, metrics.steps[-1].tokens)
    assert (found.best_val_loss, found.best_val_step) == (metrics.evaluations[-1].val_loss, 4)
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.config is not None
    assert differences([found.config, found.options]) == {}  # both readers of the config agree


def scene(folder: Path, *lines: str, events: tuple[str, ...] = ("started",), steps: int = 100) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"train:\n  steps: {steps}\n  seed: 1\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "events.jsonl").write_text("".join(f'{{"time": 5.0, "event": "{e}"}}\n' for e in events))
    return RunFolder(folder)


def test_states(tmp_path: Path) -> None:
    steps = [STEP % (n, n, n) for n in range(1, 11)]
    assert RunFacts.read(scene(tmp_path / "a", *steps, events=("started", "stopped"))).state == "stopped"
    assert RunFacts.read(scene(tmp_path / "b", *steps, events=("started", "stopped", "started"))).state == "crashed"
    assert RunFacts.read(scene(tmp_path / "c", *steps, steps=10)).state == "finished"
    assert RunFacts.read(scene(tmp_path / "d", events=())).state == "not started"
    running = scene(tmp_path / "e", *steps)
    running.lock()
    assert RunFacts.read(RunFolder(running.path)).state == "running"
    running.release()
    assert RunFacts.read(RunFolder(running.path)).state == "crashed"
    RunFolder(running.path).lock()  # looking took nothing away


def test_a_folder_with_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: [\n")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3, "val_loss"')
    found = RunFacts.read(RunFolder(tmp_path))
    assert (found.state, found.loss, found.best_val_loss, found.options, found.config) == (
        "not started",
        None,
        None,
        {},
        None,
    )


def test_the_last_line_may_be_half_written(tmp_path: Path) -> None:
    found = RunFacts.read(scene(tmp_path, STEP % (1, 10, 7), STEP % (2, 20, 9), (STEP % (3, 30, 9))[:50]))
    assert (found.step, found.tokens, found.tokens_per_second) == (2, 20, 8)


def test_the_best_evaluation_is_kept_and_a_rewritten_file_is_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best, "_WORTH_KEEPING", 0)
    lines = [
        STEP % (n, n, 9) + (HELD_OUT % (n, n, 3 + abs(n - 50) / 100) if n % 10 == 0 else "") for n in range(1, 101)
    ]
    folder = scene(tmp_path, *lines)
    assert best.best_evaluation(folder).step == 50
    cache = tmp_path / "cache" / "facts.json"
    kept = json.loads(cache.read_text())
    assert (kept["val_loss"], kept["last_step"], kept["searched"]) == (3.0, 100, folder.metrics_file.stat().st_size)
    with folder.metrics_file.open("a") as file:  # what was searched is not read again: this cached loss is believed
        file.write(HELD_OUT % (101, 101, 2.5) + HELD_OUT % (102, 102, "NaN"))
    cache.write_text(json.dumps(kept | {"val_loss": 2.9, "step": 7}))
    assert dataclasses.astuple(best.best_evaluation(folder))[:3] == (2.5, 101, 102)
    folder = scene(tmp_path, *lines[:40])  # a resume from step 40 forgets what came later
    assert (best.best_evaluation(folder).step, best.best_evaluation(folder).last_step) == (40, 40)


def test_options_are_those_of_the_whole_config(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = Config(optim=Optim(lr=3e-4, schedule="wsd"))
    folder.save_config(config)
    assert differences([config, written_options(folder.config_file)]) == {}
    other = config.replace("optim", lr=1e-3).replace("launch", name="other")
    assert differences([config, other, config]) == {"optim.lr": [3e-4, 1e-3, 3e-4]}
    assert differences([{"a.x": 1}, {}]) == {"a.x": [1, None]}


def test_a_table_says_what_differs(tmp_path: Path, finished: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished / "runs" / "done", tmp_path / name)
    config = tmp_path / "two" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    runs = listing.sort([RunFacts.read(folder) for folder in all_runs(tmp_path)], "time")
    assert listing.differs_in(runs) == ["seed 0", "seed 5"]
    assert listing.as_json(runs)["differences"] == {"train.seed": [0, 5]}
    many = [dataclasses.replace(runs[0], options={f"s.o{i}": int(i == n) for i in range(8)}) for n in range(4)]
    assert listing.differs_in(many) == ["o0 1", "o1 1", "o2 1", "o3 1"]  # not the values that most runs have


def test_sorting(tmp_path: Path) -> None:
    runs = [RunFacts.read(scene(tmp_path / str(n), STEP % (1, 1, 1))) for n in range(3)]
    runs = [dataclasses.replace(r, best_val_loss=v) for r, v in zip(runs, (2.0, None, 1.0), strict=True)]
    assert [r.name for r in listing.sort(runs, "loss")] == ["2", "0", "1"]
    assert [r.name for r in listing.sort(runs[::-1], "name")] == ["0", "1", "2"]
