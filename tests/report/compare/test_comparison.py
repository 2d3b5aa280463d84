"""Comparing runs: false alarms and power by simulation, which runs are paired, what parts them, and the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.report.compare import words
from shoal.report.compare.comparison import Comparison, compare_series
from shoal.report.compare.series import first_parting, held_out
from tests.report.compare.simulated import REAL, Noise, group, run
from tests.warm import shoal

QUIET = dataclasses.replace(REAL, seed=0.0025, drift=0.0005)


def against(draws: np.random.Generator, noise: Noise, better: float = 0.0, *, runs: int = 5, **more: Any) -> Comparison:
    """Compare a group of simulated seeds with another group of others."""
    a = group(draws, range(runs), noise=noise, **more)
    return compare_series(a, group(draws, range(runs, 2 * runs), noise=noise, better=better, **more))


def differs(found: Comparison) -> bool:
    return found.loss.difference is not None and found.loss.difference.is_real


def test_a_true_difference_over_five_seeds_is_found() -> None:
    draws = np.random.default_rng(5)
    found = [against(draws, QUIET, 0.01, steps=60) for _ in range(20)]
    assert sum(map(differs, found)) >= 18
    assert {c.loss.verdict for c in found if differs(c)} == {"B is better"}
    assert {c.loss.name for c in found} == {"held-out loss"}


@pytest.mark.ci
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("runs", [1, 5])
def test_few_false_alarms(runs: int, evaluated: bool) -> None:
    draws = np.random.default_rng(6)
    found = [against(draws, REAL, runs=runs, evaluated=evaluated, steps=200) for _ in range(200)]
    assert sum(map(differs, found)) <= 5  # 1% of 200 is 2


def test_runs_with_the_same_seed_and_data_are_paired() -> None:
    draws = np.random.default_rng(7)
    a = group(draws, range(5), paired=True, evaluated=False, noise=QUIET, steps=100)
    b = group(draws, range(5), paired=True, evaluated=False, noise=QUIET, steps=100, better=0.02)
    assert compare_series(a, b[::-1]).paired
    found = compare_series(a, b).measures[-2].difference
    assert found is not None
    assert found.paired  # the batches that a pair shares are most of its noise
    assert found.is_real
    other_data = [
        dataclasses.replace(s, facts=dataclasses.replace(s.facts, options={**s.facts.options, "data.seq_len": 9}))
        for s in b
    ]
    assert not compare_series(a, other_data).paired


def test_two_single_runs_cannot_be_told_apart_within_the_assumed_noise() -> None:
    draws = np.random.default_rng(8)
    a, b = run(draws, seed=1), run(draws, seed=2, better=0.01)
    found = compare_series([a], [b])
    assert found.loss.verdict == "cannot tell"
    assert "cannot tell" in words.headline(found)
    text = "\n".join(words.lines(found))
    assert "assumed" in text
    assert "train.seed: 1 in A, 2 in B" in text
    far = compare_series([a], [run(draws, seed=2, better=0.2)])
    assert far.loss.verdict == "B is better"
    assert compare_series([a], [run(draws, seed=2, better=-0.2)]).is_worse


def test_equal_runs_are_the_same_and_the_first_difference_is_found() -> None:
    a = run(np.random.default_rng(9), seed=1, name="a")
    b = dataclasses.replace(a, facts=dataclasses.replace(a.facts, folder=type(a.facts.folder)(Path("b"))))
    assert words.headline(compare_series([a], [b])).startswith("the same")
    loss = a.loss.copy()
    loss[40] = np.nextafter(loss[40], 9)
    assert first_parting(a, dataclasses.replace(b, loss=loss)).step == 41
    norms = a.grad_norm.copy()
    norms[10] *= 2
    part = first_parting(a, dataclasses.replace(b, loss=loss, grad_norm=norms))
    assert (part.step, part.what, part.b) == (11, "grad_norm", 2.0)


def test_other_tokens_are_compared_in_bits_per_byte_only_on_the_same_text() -> None:
    draws = np.random.default_rng(10)
    other: dict[str, Any] = {"data.tokenizer": "bytes"}
    found = compare_series([run(draws)], [run(draws, **other)])
    assert found.loss.verdict == "not comparable"
    assert {m.name: m.verdict for m in found.measures}["speed"] == "cannot tell"


def test_the_last_evaluation_reads_more_text_than_one_on_the_way() -> None:
    draws = np.random.default_rng(11)
    long, short = run(draws, steps=100), run(draws, steps=50)
    on_the_way = dataclasses.replace(long.evaluations[0], step=50, tokens=50 * 1024)
    both = dataclasses.replace(long, evaluations=(on_the_way, *long.evaluations))
    assert held_out([both, short], "val_loss") is None
    assert held_out([both, both], "val_loss") is not None


def write(folder: Path, series: Any, seed: int) -> None:
    """Write a simulated run as the files of a run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"train:\n  seed: {seed}\n  steps: {len(series.steps)}\nlaunch:\n  name: {folder.name}\n"
    )
    rows = zip(series.steps, series.tokens, series.loss, series.speed, strict=True)
    lines = [
        {"step": int(s), "tokens": int(t), "loss": x, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": v, "step_seconds": 1024 / v,
         "mfu": None, "memory_bytes": 1}
        for s, t, x, v in rows
    ]  # fmt: skip
    lines.append(series.evaluations[0].as_line())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text(
        '{"time": 100.0, "event": "started", "step": 0}\n{"time": 200.0, "event": "finished"}\n'
    )


def test_the_commands(tmp_path: Path) -> None:
    draws = np.random.default_rng(12)
    for seed in range(3):
        write(tmp_path / "runs" / f"a{seed}", run(draws, seed=seed, steps=40, noise=QUIET), seed)
        write(tmp_path / "runs" / f"b{seed}", run(draws, seed=seed, steps=40, noise=QUIET, better=-0.2), seed)

    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(shoal(*arguments), cwd=tmp_path, capture_output=True, text=True, env=None)

    shown = say("compare", "a*", "vs", "b0", "b1", "b2", "--fail-if-worse")
    assert shown.returncode == 1, shown.stderr
    assert "B is worse: its held-out loss is" in shown.stdout
    assert all(
        len(line) <= 80 for line in shown.stdout.splitlines() if line.startswith(("held-out", "training", "speed,"))
    )
    listed = say("runs")
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert all(len(line) <= 80 for line in listed.stdout.splitlines())
    wrong = say("compare", "a0", "a1", "a2")
    assert wrong.returncode == 2
    assert "vs" in wrong.stderr
