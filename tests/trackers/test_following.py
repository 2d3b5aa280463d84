"""What a tracker is sent: each line once, in order, and after a resume the steps that were taken again."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from shoal.run.records import Evaluation
from shoal.trackers import following
from shoal.trackers.following import Follower
from shoal.trackers.points import of_evaluation, of_ranks, of_step
from tests.trackers.written import Written, evaluation, ranks_record, step_record


def sent_by(follower: Follower, to: dict[str, dict[int, float]]) -> None:
    """Send a batch to a tracker that is a dict, which forgets the steps after a cut."""
    batch = follower.read()
    if batch.cut is not None:
        for curve in to.values():
            for step in [step for step in curve if step > batch.cut]:
                del curve[step]
    for each in batch.scalars:
        for name, value in each.values.items():
            assert each.step not in to.setdefault(name, {}), "sent twice"
            to[name][each.step] = value


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_tracker_ends_with_the_lines_of_the_file(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that crash and resume, readers that crash and resume, batches of a few lines: the curve is that of the file."""
    monkeypatch.setattr(following, "LINES_AT_ONCE", 7)
    monkeypatch.setattr(following.Followed.read, "__defaults__", (7,))
    draw = random.Random(seed)
    run = Written(tmp_path / "run")
    kept = tmp_path / "kept"
    kept.mkdir()
    run.start()
    at, follower, tracker = 0, Follower(run.folder, kept), dict[str, dict[int, float]]()
    for _ in range(60):
        match draw.choice(["steps", "steps", "read", "read", "read", "reader dies", "run dies", "torn line"]):
            case "steps":
                more = draw.randint(1, 6)
                run.steps(at + 1, at + more, split_every=1000)
                at += more
            case "read":
                sent_by(follower, tracker)
                follower.commit(safe=True)
            case "reader dies":
                follower = Follower(run.folder, kept)
            case "run dies":
                at = draw.randint(0, at)
                run.start(at)
            case "torn line" if run.folder.metrics_file.is_file():
                with run.folder.metrics_file.open("ab") as file:
                    file.write(b'{"step": 3, "lo')  # the writer starts a new line after it
    for _ in range(200):
        sent_by(follower, tracker)
        follower.commit(safe=True)
    assert not follower.read()
    assert sorted(tracker.get("train/loss", {}).items()) == curve_of(run, "loss")
    assert sorted(tracker.get("val/loss", {}).items()) == curve_of(run, "val_loss")


def curve_of(run: Written, key: str) -> list[tuple[int, float]]:
    lines = run.folder.metrics_file.read_bytes().splitlines() if run.folder.metrics_file.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith(b"}") and line.count(b"{") >= 1 and valid(line)]
    return [(r["step"], r[key]) for r in records if key in r]


def valid(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_what_was_not_safe_is_sent_again_after_a_crash_and_never_before(tmp_path: Path) -> None:
    run = Written(tmp_path / "run")
    run.start()
    run.steps(1, 4)
    follower = Follower(run.folder, tmp_path)
    assert [each.step for each in follower.read().scalars] == [1, 2, 3, 4]
    assert [each.step for each in follower.read().scalars] == [1, 2, 3, 4]  # not committed
    follower.commit(safe=False)
    assert not follower.read()
    assert [each.step for each in Follower(run.folder, tmp_path).read().scalars] == [1, 2, 3, 4]
    run.steps(5, 5)
    follower.read()
    follower.commit(safe=True)
    assert Follower(run.folder, tmp_path).read().scalars == []


def test_events_and_samples_are_notes(tmp_path: Path) -> None:
    run = Written(tmp_path / "run")
    run.start()
    run.steps(1, 3)
    run.sample("end", "once upon")
    follower = Follower(run.folder, tmp_path)
    notes = follower.read().notes
    assert [(note.name, note.step) for note in notes] == [("events/started", 0), ("samples/end", 3)]
    assert "Made-up GPU" in notes[0].text
    assert notes[1].text == "once upon"
    follower.commit(safe=True)
    run.sample("end", "once upon a time")
    run.event("went back", step=3, to=1)
    again = Follower(run.folder, tmp_path).read().notes
    assert [note.name for note in again] == ["events/went_back", "samples/end"]


def test_no_field_of_a_record_is_left_out() -> None:
    """Each number of a record is in the points exactly once; time and replica are the points' own."""
    for record, values in (
        (step_record(3), of_step(step_record(3), 2)),
        (evaluation(3), of_evaluation(evaluation(3))),
        (ranks_record(3), of_ranks(ranks_record(3))),
    ):
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if field.name in ("step", "time", "replica") or (type(record), field.name) == (Evaluation, "tokens"):
                continue
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if field.name == "busy_seconds":
                numbers = [0.2, 0.3]  # the mean and the maximum
            for number in numbers:
                assert any(number == pytest.approx(each) for each in values.values()), field.name
    assert of_step(step_record(7), 2).keys() == of_step(step_record(3), 2).keys() - {"train/grad_norm"}  # an overflow
    assert of_step(step_record(3), 2)["speed/tokens_per_second_per_device"] == 5003 / 2
    assert of_ranks(ranks_record(3))["memory/peak_reserved_bytes/total"] == 1500
