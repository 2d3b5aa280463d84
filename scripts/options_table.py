"""
Write the table of all options in docs/API.md from `shoal.config.options`.

    python scripts/options_table.py            write docs/API.md
    python scripts/options_table.py --check    exit with 1 if docs/API.md is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shoal.config.option import option_fields, option_name
from shoal.config.options import SECTIONS, options
from shoal.resolve.resolve import expectation

PAGE = Path(__file__).resolve().parents[1] / "docs" / "API.md"
BEGIN, END = "<!-- options: begin (written by scripts/options_table.py) -->", "<!-- options: end -->"


def table() -> str:
    """Return a heading, a sentence and a table for each section, as Markdown."""
    parts = []
    for name, section in SECTIONS.items():
        about = " ".join((section.__doc__ or "").split())
        head = (
            f"### `{name}`\n\n{about}\n\n| option | takes | default | unit | meaning |\n| --- | --- | --- | --- | --- |"
        )
        keys = [f"{name}.{option_name(f)}" for f in option_fields(section)]
        parts.append("\n".join([head, *(_row(key) for key in keys)]))
    return "\n\n".join(parts)


def _row(key: str) -> str:
    f = options()[key]
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


def with_table(page: str) -> str:
    """Return `page` with the tables between the two marks replaced. Raises ValueError if a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/API.md lacks {BEGIN!r} or {END!r}")
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
        print("docs/API.md: the table of options is out of date; run python scripts/options_table.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
