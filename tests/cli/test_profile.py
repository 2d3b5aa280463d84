"""`shoal profile` as a user runs it: a recipe on two processes, and a run from its checkpoint, which stays unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.cli.commands import Place


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.ci
def test_a_recipe_on_two_processes_and_a_run_from_its_checkpoint(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.good(
        "train",
        "recipe.yaml",
        "--name",
        "a",
        "--processes",
        "1",
        "--train.steps",
        "12",
        "--checkpoint.keep",
        "9",
        "--checkpoint.background",
        "false",
    )
    run = tmp_path / "runs" / "a"
    before = contents(run)

    said = place.good("profile", "runs/a", "--steps", "8..9")
    assert contents(run) == before
    scratch = tmp_path / "runs" / "a-profile"
    assert "resumed from" in said
    taken = losses(scratch)
    assert set(taken) == {6, 7, 8, 9}  # from the checkpoint of step 5
    assert taken == {step: losses(run)[step] for step in taken}
    table = said[said.index("profile of steps 8 to 9 of 12, 1 process") :].splitlines()
    header = next(number for number, line in enumerate(table) if line.startswith("operator"))
    assert table.index("", header) - header == 11  # ten operators
    assert max(map(len, table[:-3])) <= 80
    assert "no communication between processes" in said

    again = place.good("profile", "a", "--steps", "11", "--processes", "2", "--parallel.dp_shard", "2", "--ranks", "1")
    assert contents(run) == before
    assert "hidden behind computing" in again
    assert sorted(p.name for p in (scratch / "profile").iterdir()) == ["step-00000008", "step-00000011"]
    assert [p.name for p in (scratch / "profile" / "step-00000011").glob("*.gz")] == ["rank1.trace.json.gz"]
    assert "USDT" not in again

    assert "ends before it begins" in place.refused("profile", "recipe.yaml", "--steps", "12..10")
    assert "the run has 40 steps; give --steps 38..40" in place.refused("profile", "recipe.yaml", "--steps", "40..42")
    assert "the run has 12 steps" in place.refused("profile", "runs/a", "--steps", "13")
    assert "its ranks are 0 to 0" in place.refused("profile", "runs/a", "--ranks", "0,1")
    assert "are 5, 10" in place.refused("profile", "runs/a", "--steps", "11", "--checkpoint", "7")
    assert "--checkpoint needs a run" in place.refused("profile", "recipe.yaml", "--checkpoint", "5")
    assert not (tmp_path / "runs" / "recipe-profile").exists()
    assert contents(run) == before
