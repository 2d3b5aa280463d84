"""
The table of the fields of metrics.jsonl in docs/TRAINING.md, written from `shoal.run.records`.

    python scripts/metrics_table.py            write it into docs/TRAINING.md
    python scripts/metrics_table.py --check    exit with 1 if the page differs
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from shoal.run.records import Evaluation, StepRecord

PAGE = Path(__file__).resolve().parents[1] / "docs" / "TRAINING.md"
BEGIN, END = "<!-- metrics: begin (written by scripts/metrics_table.py) -->", "<!-- metrics: end -->"
KINDS = {StepRecord: "steps", Evaluation: "evaluations"}


def table() -> str:
    """Return a row for each field of each kind of line, as Markdown."""
    written: dict[str, list[str]] = {}
    facts = {}
    for kind, name in KINDS.items():
        for field in dataclasses.fields(kind):
            written.setdefault(field.name, []).append(name)
            facts[field.name] = field.metadata
    rows = [
        f"| `{name}` | {'all lines' if len(kinds) == len(KINDS) else kinds[0]} | {facts[name]['unit']} "
        f"| {facts[name]['meaning']} |"
        for name, kinds in written.items()
    ]
    return "\n".join(["| field | of | unit | meaning |", "| --- | --- | --- | --- |", *rows])


def with_table(page: str) -> str:
    """Return `page` with the text between the two marks replaced. Raises ValueError if a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/TRAINING.md lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    wanted = with_table(page)
    if page == wanted:
        return 0
    if check:
        print(
            "docs/TRAINING.md: the table of metrics is out of date; run python scripts/metrics_table.py",
            file=sys.stderr,
        )
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
