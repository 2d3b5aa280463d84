"""scripts/check_english.py: finds the phrases that the project's prose avoids, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_docs import ROOT

SCRIPT = ROOT / "scripts" / "check_english.py"

BAD = [
    "is refused before it starts, with what would do",
    "keep those of each so many steps too, for ever",
    "busy so many times as long as the others; null: nobody looks",
    "has no tokenizer, so text is nothing to it",
    "A store that has gone is borne.",
    "Where a number that is none comes from: a step once more",
    "What cannot hold together is refused.",
    "Raises `DataError` where the disk is full.",
    "tokens 3 is no multiple of 2",
    "The run goes on from where it stopped.",
    "a report of what was seen",
]
GOOD = [
    "Invalid combinations are rejected up front, with a suggested fix.",
    "maximum gradient norm; 0 disables clipping",
    "There is no GPU, and it is no longer needed; connection refused.",
    "Cast the weight where it is used, on disk or not.",
    "Continue the run with `--refused nobody`.",
    "made of rows, which stand for nothing else",
]


def found_in(path: Path, text: str) -> list[str]:
    """Return `line: phrase` of each finding in a file with this text."""
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=False)
    assert done.returncode == bool(done.stdout), done.stderr
    return [line.partition(f"{path.name}:")[2] for line in done.stdout.splitlines() if f"{path.name}:" in line]


def test_each_bad_sentence_is_found_and_no_good_one(tmp_path: Path) -> None:
    bad = found_in(tmp_path / "bad.md", "\n\n".join(BAD))
    assert {int(line.partition(":")[0]) for line in bad} == set(range(1, 2 * len(BAD), 2))
    assert found_in(tmp_path / "good.md", "\n\n".join(GOOD)) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"""Module."""\n\n\ndef f():\n    """\n    Do it.\n\n    Nobody waits.\n    """\n', 8),
        ("x = 1\n# because nobody\n# waits\n", 2),
        ("x = 1\n# split so\n# many times\n", 2),
        ('def f(n):\n    print(f"{n} is no multiple of 3")\n', 2),
        ('raise ValueError(\n    "it goes on for "\n    "three steps"\n)\n', 2),
    ],
)
def test_python_is_read_by_its_prose(text: str, line: int, tmp_path: Path) -> None:
    found = found_in(tmp_path / "some.py", text)
    assert len(found) == 1
    assert found[0].startswith(f"{line}:")


def test_code_is_not_prose(tmp_path: Path) -> None:
    assert found_in(tmp_path / "page.md", "Text.\n\n```\nshoal: refused, nobody\n```\n\nSee `refused`.\n") == []
    assert found_in(tmp_path / "some.py", 'nobody = {"refused": "anew"}\n') == []


def test_sentences_are_drawn_by_their_seed() -> None:
    def drawn(seed: int) -> list[str]:
        command: list[Any] = [sys.executable, SCRIPT, "docs", "--draw", "5", "--seed", str(seed)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert len(drawn(1)) == 5
    assert drawn(1) == drawn(1) != drawn(2)
    for line in drawn(1):
        path, number, sentence = line.split(":", 2)
        [first_word, *_] = re.findall(r"[A-Za-z]{2,}", sentence.partition("] ")[2])
        near = (ROOT / path).read_text(encoding="utf-8").splitlines()[max(0, int(number) - 5) : int(number) + 5]
        assert any(first_word in text for text in near), line
