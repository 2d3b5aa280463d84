"""Which steps and ranks a profile records, and its folder, which disturbs no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.options import Config
from shoal.errors import RunError, ShoalError
from shoal.run.folder import RunFolder
from shoal.run.profiles import Steps, check_is_scratch, config_of_profile, default_steps, folder_of, prepare, read_ranks


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10..12", Steps(10, 12)), ("7", Steps(7, 7)), (" 1..1 ", Steps(1, 1)), ("1,000..1,002", Steps(1000, 1002))],
)
def test_ranges_of_steps(text: str, steps: Steps) -> None:
    assert Steps.read(text) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12..10", "--steps 12..10 ends before it begins; give --steps 10..12"),
        ("0..3", "the first step of a run is 1"),
        ("0", "the first step of a run is 1"),
        ("ten", "is not a range of steps"),
        ("-1..3", "is not a range of steps"),
        ("1..2..3", "is not a range of steps"),
        ("", "is not a range of steps"),
    ],
)
def test_wrong_ranges_say_what_to_give(text: str, words: str) -> None:
    with pytest.raises(ShoalError, match=words):
        Steps.read(text)


def test_steps_beyond_the_run_say_which_are_there() -> None:
    Steps(8, 10).check(10)
    with pytest.raises(ShoalError, match=r"the run has 10 steps; give --steps 8\.\.10"):
        Steps(10, 12).check(10)
    with pytest.raises(ShoalError, match=r"the run has 1 step; give --steps 1\.\.1"):
        Steps(10, 12).check(1)


@pytest.mark.parametrize(
    ("total", "after", "steps"),
    [
        (100, 0, "10..12"),
        (12, 0, "10..12"),
        (11, 0, "9..11"),
        (3, 0, "1..3"),
        (2, 0, "1..2"),
        (1, 0, "1..1"),
        (100, 50, "60..62"),
        (55, 50, "53..55"),
        (52, 50, "51..52"),
        (51, 50, "51..51"),
    ],
)
def test_default_steps(total: int, after: int, steps: str) -> None:
    found = default_steps(total, after)
    assert str(found) == steps
    assert found.first > after
    found.check(total)


def test_no_step_is_left() -> None:
    with pytest.raises(ShoalError, match="nothing is left"):
        default_steps(10, 10)


def test_ranks() -> None:
    assert list(read_ranks(None, 3)) == [0, 1, 2]
    assert list(read_ranks("2, 0,2", 3)) == [0, 2]
    for wrong in ("3", "-1", "a", ""):
        with pytest.raises(ShoalError, match="ranks are 0 to 2"):
            read_ranks(wrong, 3)


def test_an_ordinary_run_is_not_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a-profile")
    run.path.mkdir()
    (run.path / "config.yaml").write_text("{}")
    with pytest.raises(RunError, match="an ordinary run"):
        check_is_scratch(run)
    with pytest.raises(RunError, match="an ordinary run"):
        prepare(run, None, 0)
    assert (run.path / "config.yaml").is_file()


def test_a_second_profile_begins_anew_and_keeps_results(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a-profile")
    prepare(run, None, 0)
    result = folder_of(run, 10)
    result.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "lock", "profile/step-00000010/summary.json"):
        (run.path / name).write_text("x")
    prepare(run, None, 0)
    assert {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()} == {
        "lock",
        "profile/step-00000010/summary.json",
    }


def test_a_checkpoint_is_linked_and_the_run_is_left_as_it_is(tmp_path: Path) -> None:
    source, run = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "a-profile")
    saved = source.checkpoints / "step-00000020"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("state")
    (source.path / "ledger.jsonl").write_text("line")
    (source.path / "tokenizer").mkdir()
    (source.path / "tokenizer" / "tokenizer.json").write_text("t")
    prepare(run, source, 20)
    copy = run.checkpoints / "step-00000020" / "state.json"
    assert copy.read_text() == "state"
    assert copy.stat().st_ino == (saved / "state.json").stat().st_ino
    assert (run.path / "tokenizer" / "tokenizer.json").read_text() == "t"
    (run.path / "ledger.jsonl").write_text("longer line")  # what a run appends to is a copy
    prepare(run, None, 0)  # clears the links, not what they lead to
    assert not run.checkpoints.exists()
    assert (saved / "state.json").read_text() == "state"
    assert (source.path / "ledger.jsonl").read_text() == "line"


def test_the_run_of_a_profile_has_a_name_of_its_own() -> None:
    config = config_of_profile(Config().replace("launch", name="a").replace("checkpoint", fast="/dev/shm/x"))
    assert (config.launch.name, config.launch.max_restarts, config.checkpoint.fast) == ("a-profile", 0, None)
