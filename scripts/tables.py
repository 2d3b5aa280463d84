"""
Write the tables of the pages from the code: all options into docs/API.md, the fields of metrics.jsonl and ranks.jsonl into
docs/TRAINING.md.

    python scripts/tables.py            write the pages
    python scripts/tables.py --check    exit with 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from shoal.config.data_options import Data
from shoal.config.keys import SOURCES, option_at
from shoal.config.option import option_fields, option_name
from shoal.config.options import SECTIONS
from shoal.resolve.resolve import expectation
from shoal.run.records import Evaluation, RanksRecord, StepRecord

DOCS = Path(__file__).resolve().parents[1] / "docs"
KINDS = {StepRecord: "steps", Evaluation: "evaluations"}


def options_table() -> str:
    """Return a heading, a sentence and a table for each section, as Markdown."""
    parts = []
    for name, section in SECTIONS.items():
        about = " ".join((section.__doc__ or "").split())
        head = (
            f"### `{name}`\n\n{about}\n\n| option | takes | default | unit | meaning |\n| --- | --- | --- | --- | --- |"
        )
        keys = [f"{name}.{option_name(f)}" for f in option_fields(section)]
        if section is Data:
            keys += [f"{SOURCES}NAME.{name}" for name in ("weight", "max_epochs")]
        parts.append("\n".join([head, *(_row(key) for key in keys)]))
    return "\n\n".join(parts)


def _row(key: str) -> str:
    f = option_at(key)
    assert f is not None, key
    unit = str(f.metadata["unit"])
    takes = expectation(key).replace(f" ({unit})", "") if unit else expectation(key)
    fixed = " *" if f.metadata["past"] else ""
    cells = [f"`{key}`{fixed}", takes, f"`{_default(f.default)}`", unit, str(f.metadata["help"])]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    """Return a default value as written in a recipe."""
    return (
        json.dumps(list(value))
        if isinstance(value, tuple)
        else value
        if value and isinstance(value, str)
        else json.dumps(value)
    )


def metrics_table() -> str:
    """Return the table of metrics.jsonl as Markdown: a row for each field, and the kinds of lines that have it."""
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


def ranks_table() -> str:
    """Return the table of ranks.jsonl as Markdown: a row for each field."""
    rows = [f"| `{f.name}` | {f.metadata['unit']} | {f.metadata['meaning']} |" for f in dataclasses.fields(RanksRecord)]
    return "\n".join(["| field | unit | meaning |", "| --- | --- | --- |", *rows])


TABLES = {
    "options": (DOCS / "API.md", options_table),
    "metrics": (DOCS / "TRAINING.md", metrics_table),
    "ranks": (DOCS / "TRAINING.md", ranks_table),
}


def with_table(name: str) -> str:
    """Return the page of a table with the text between its two marks replaced. Raises ValueError if a mark is missing."""
    page, table = TABLES[name]
    begin, end = f"<!-- {name}: begin (written by scripts/tables.py) -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"docs/{page.name} lacks {begin!r} or {end!r}")
    return f"{before}{begin}\n\n{table()}\n\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check, outdated = parser.parse_args().check, 0
    for name, (page, _) in TABLES.items():
        wanted = with_table(name)
        if page.read_text(encoding="utf-8") == wanted:
            continue
        if check:
            print(
                f"docs/{page.name}: the table of {name} is out of date; run python scripts/tables.py", file=sys.stderr
            )
            outdated = 1
        else:
            page.write_text(wanted, encoding="utf-8")
    return outdated


if __name__ == "__main__":
    sys.exit(main())
