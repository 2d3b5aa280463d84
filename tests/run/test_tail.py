"""Following a file that grows, is cut, or is replaced."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.run.records import forget_after
from shoal.run.tail import Tail


def add(path: Path, *steps: int, end: str = "\n") -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"step": step, "loss": 1.0}) for step in steps) + end)


def steps(tail: Tail) -> list[int]:
    return [line["step"] for line in tail.read()]


def test_each_line_comes_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail) == []
    add(path, 1, 2)
    add(path, 3, end="")  # still being written
    assert steps(tail) == [1, 2]
    with path.open("a", encoding="utf-8") as file:
        file.write("\nnot JSON\n[1]\n")
    assert steps(tail) == [3]
    assert steps(tail) == []
    assert not tail.rewritten


def test_a_file_that_a_resume_rewrites_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(path, *range(1, 11))
    tail = Tail(path)
    tail.read()
    forget_after(path, 4)
    add(path, *range(5, 13))  # longer than before
    assert steps(tail) == list(range(1, 13))
    assert tail.rewritten
    add(path, 13)
    assert steps(tail) == [13]
    assert not tail.rewritten


def test_a_file_cut_in_place_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(path, 1, 2, 3)
    tail = Tail(path)
    tail.read()
    path.write_text("")
    add(path, 7, 8, 9, 10)
    assert steps(tail) == [7, 8, 9, 10]
    assert tail.rewritten


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(path, *range(1000))
    tail = Tail(path, last_bytes=500)
    found = steps(tail)
    assert found == list(range(1000 - len(found), 1000))
    assert 10 < len(found) < 25


def test_skipped_lines_do_not_come(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    add(old, 1, 2)
    tails = [Tail(path, last_bytes=0) for path in (old, new)]
    for tail in tails:
        tail.skip()
    add(old, 3)
    add(new, 1, 2, 3)
    assert [steps(tail) for tail in tails] == [[3], [1, 2, 3]]
