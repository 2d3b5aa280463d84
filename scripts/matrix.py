"""
Compare every layout with one process, for each family, precision, checkpointing mode and compile; write docs/matrix.md.

    python scripts/matrix.py [--only PATTERN] [--again] [--limit-minutes N]
    python scripts/matrix.py --write              only write the page, from existing results
    python scripts/matrix.py --words              only refresh the wording of the rejections on the page

Results are stored in build/matrix.jsonl cell by cell, so a stopped run resumes; remove that file to start over. Output of the
processes goes to build/matrix.log. Needs no network. Exits with 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, also in child processes
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).resolve().parents[1] / "build" / "inductor")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.parallel.matrix import (
    FAMILIES,
    ROUNDING,
    SLACK,
    WORST,
    WORST_NUMBER,
    Bench,
    Cell,
    Measured,
    cells,
    legal,
    problem,
    refused,
)  # fmt: skip
from tests.parallel.setups import GROUPS, LAYOUTS, TOGETHER
from tests.world import Worlds

from shoal.bench.environment import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "matrix.jsonl"
LOG = ROOT / "build" / "matrix.log"
PAGE = ROOT / "docs" / "matrix.md"
REJECTED, FAILED = "## Rejected\n", "## Failed\n"


@dataclass(frozen=True)
class Result:
    """The result of a cell: its measurements, or the error it ended with."""

    cell: str
    commit: str
    date: str
    seconds: float
    measured: Measured | None
    error: str | None

    def problem(self, cell: Cell) -> str | None:
        return problem(cell, self.measured) if self.measured else self.error


def results() -> dict[str, Result]:
    """Return the last stored result of each cell."""
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        fields = json.loads(line)
        if fields["measured"]:
            fields["measured"] = Measured(**fields["measured"])
        found[fields["cell"]] = Result(**fields)
    return found


# Running.


def run(todo: list[Cell], limit_seconds: float) -> None:
    """Run cells. For each, append the result to `RESULTS` and print one line. Stop before the first cell after the time limit."""
    RESULTS.parent.mkdir(exist_ok=True)
    console = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)  # child processes inherit both descriptors
    os.dup2(log, 2)
    commit, worlds = _commit(), Worlds()
    start, cost, done = time.monotonic(), sum(cell.cost for cell in todo), 0.0
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a", encoding="utf-8") as file:
        bench = Bench(Path(folder), worlds)
        for number, cell in enumerate(todo, 1):
            if time.monotonic() - start > limit_seconds:
                print(f"stopped at the time limit with {len(todo) - number + 1} cells left", file=console)
                break
            result = one(bench, cell, commit)
            if result.error:
                worlds.close()  # other processes may still wait for the failed one
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()
            done += cell.cost
            left = (time.monotonic() - start) * (cost - done) / done
            said = (result.problem(cell) or "pass").strip().splitlines()[-1]
            print(f"{number}/{len(todo)}, {left:.0f} s left: {cell}: {result.seconds:.1f} s, {said}", file=console)
        worlds.close()


def one(bench: Bench, cell: Cell, commit: str) -> Result:
    start = time.monotonic()
    measured = error = None
    try:
        measured = bench.run(cell)
    except Exception:  # including a dead process: record it and continue with the next cell
        error = traceback.format_exc()
    date = datetime.date.today().isoformat()
    return Result(str(cell), commit, date, round(time.monotonic() - start, 1), measured, error)


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + " with changes" * bool(git("status", "--porcelain", "src"))


# The page.


def page(found: dict[str, Result]) -> str:
    reasons = {cell: refused(cell) for cell in cells()}
    counts = Counter(text for texts in reasons.values() for text in texts)
    numbers = {text: number for number, (text, _) in enumerate(counts.most_common(), 1)}
    parts = [_head(found), *(_table(name, found, reasons, numbers) for name in GROUPS)]
    parts.append(_rejections(counts))
    failed = [(cell, text) for cell in legal() if str(cell) in found and (text := found[str(cell)].problem(cell))]
    parts.append(
        f"{FAILED}\n" + ("\n\n".join(f"`{cell}`:\n\n```\n{_end(text)}\n```" for cell, text in failed) or "None.")
    )
    return "\n\n".join(parts) + "\n"


def _rejections(counts: Counter[str]) -> str:
    lines = [f"| {number} | {count} | {text} |" for number, (text, count) in enumerate(counts.most_common(), 1)]
    head = [
        "The messages of shoal. A cell may be rejected for several reasons.\n",
        "| | cells | |",
        "| --- | --- | --- |",
    ]
    return "\n".join([REJECTED, *head, *lines])


def with_words(page: str) -> str:
    """Return the page with the current messages of rejections. Their numbers and counts stay, because the cells are the same."""
    before, _, rest = page.partition(REJECTED)
    counts = Counter(text for cell in cells() for text in refused(cell))
    return f"{before}{_rejections(counts)}\n\n{FAILED}{rest.partition(FAILED)[2]}"


def _head(found: dict[str, Result]) -> str:
    every, can = sum(1 for _ in cells()), legal()
    got = [found[str(cell)] for cell in can if str(cell) in found]
    failed = sum(1 for cell in can if str(cell) in found and found[str(cell)].problem(cell))
    commits = ", ".join(f"{commit} ({number})" for commit, number in Counter(r.commit for r in got).most_common())
    lines = [line for line in describe().splitlines() if line[:13].strip() in ("python", "torch", "cpu", "system")]
    return f"""# The matrix

Every layout below, with each model family ({", ".join(FAMILIES)}), precision (float32, bfloat16, float16), activation
checkpointing (none, full, selective, budget), with and without `torch.compile`: {every} cells of {len(LAYOUTS)} layouts.

| cells | |
| --- | --- |
| {len(got) - failed} | pass |
| {failed} | fail |
| {every - len(can)} | rejected before any process starts, with a suggested fix |
| {len(can) - len(got)} | not run yet |

Command: `make matrix`, or `python scripts/matrix.py`. A stopped run resumes.
Date: {max((r.date for r in got), default="-")}. Commits, and cells measured at each: {commits or "-"}.

```
{chr(10).join(lines)}
processes      gloo, one thread each
```

Each cell trains the same small model (4 blocks, width 48; 8 blocks if a schedule needs 8 stages) for one step of 8 sequences.
Its gradient is assembled from all processes, whose replicas must be bitwise identical, and compared with the gradient of one
process in float32, without checkpointing and without the compiler.

- float32: the number is the error of the worst parameter's gradient: the norm of the difference divided by that gradient's
  norm, after 1e-8 of the whole gradient's norm is subtracted from it. Allowed: {WORST:.0e}, and {WORST_NUMBER:.0e} for the loss and the
  reported norm.
- bfloat16: the numbers are the relative error of the whole gradient, and that of one process in bfloat16, which is due to
  rounding alone. Allowed for the gradient, the loss and the norm: {ROUNDING} times the error of one process, plus {SLACK:.0e}.
- "same bits": the layout has `train.repro: bitwise`, and the gradient, loss and norm are bitwise identical to those of one
  process (if `cp` or `tp` is larger than 1: to the same layout without data parallelism).

`3/3` counts the supported checkpointing modes that pass; the number is the largest error among them. `rejected 2` refers to a line of
the table at the end; combinations that no layout supports (float16 on this device, budget without the compiler) are not
repeated in each row. The layouts under "{TOGETHER}" cover every supported pair of features that no other layout covers; they run
only without checkpointing and without the compiler."""


def _table(group: str, found: dict[str, Result], reasons: dict[Cell, list[str]], numbers: dict[str, int]) -> str:
    """Return a table with a row per layout and family, or per layout if there are few columns."""
    mine = [cell for cell in reasons if cell.layout in GROUPS[group] and cell.dtype != "float16"]
    compiled = any(cell.compile for cell in mine)

    def place(cell: Cell) -> tuple[str, str]:
        """Return a cell's row and column."""
        if compiled:
            return f"{cell.layout} | {cell.family}", cell.dtype + ", compiled" * cell.compile
        return cell.layout, f"{cell.dtype}, {cell.family}"

    entries: dict[tuple[str, str], list[Cell]] = {}
    for cell in mine:
        entries.setdefault(place(cell), []).append(cell)
    columns = list(dict.fromkeys(column for _, column in entries))
    rows = sorted({row for row, _ in entries}, key=lambda row: list(LAYOUTS).index(row.partition(" | ")[0]))
    heads = ["layout", "model", *columns] if compiled else ["layout", *columns]
    lines = [f"## {group}\n", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        said = [_entry(entries[row, column], found, reasons, numbers) for column in columns]
        lines.append(f"| {row} | {' | '.join(said)} |")
    return "\n".join(lines)


def _entry(row: list[Cell], found: dict[str, Result], reasons: dict[Cell, list[str]], numbers: dict[str, int]) -> str:
    """Return the entry for cells that differ only in checkpointing."""
    row = [cell for cell in row if cell.compile or cell.checkpointing != "budget"]
    can = [cell for cell in row if not reasons[cell]]
    said = ""
    if why := sorted({numbers[text] for cell in row for text in reasons[cell]}):
        said = "rejected " + ", ".join(map(str, why))
    if not can:
        return said
    got = [(cell, found[str(cell)]) for cell in can if str(cell) in found]
    if not got:
        return "; ".join(filter(None, ["not run", said]))
    passed = sum(1 for cell, result in got if not result.problem(cell))
    parts = [f"{passed}/{len(can)}"]
    if len(got) < len(can):
        parts.append(f"{len(can) - len(got)} not run")
    return "; ".join(filter(None, [", ".join(parts + _errors(r.measured for _, r in got if r.measured)), said]))


def _errors(every: Iterable[Measured]) -> list[str]:
    if not (of := list(every)):
        return []
    parts = ["same bits"] if all(m.same_bits for m in of) else []
    if any(m.own_total for m in of):
        worst = max(of, key=lambda m: m.total)
        return [*parts, f"{worst.total:.1e} (one process {worst.own_total:.1e})"]
    return [*parts, f"{max(m.worst for m in of):.1e}"]


def _end(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="run only cells that match this regular expression, such as 'tp 2 .*gpt2'",
    )
    parser.add_argument("--again", action="store_true", help="also rerun failed cells")
    parser.add_argument(
        "--limit-minutes", type=float, default=float("inf"), metavar="N", help="start no cell after N minutes"
    )
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    parser.add_argument("--words", action="store_true", help="run nothing, only refresh the page's rejections")
    args = parser.parse_args()
    if args.words:
        PAGE.write_text(with_words(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    have = results()
    todo = [cell for cell in legal() if re.search(args.only, str(cell))]
    todo = [c for c in todo if str(c) not in have or (args.again and have[str(c)].problem(c))]
    if todo and not args.write:
        run(todo, args.limit_minutes * 60)
    have = results()
    PAGE.write_text(page(have), encoding="utf-8")
    return int(any(str(cell) in have and have[str(cell)].problem(cell) for cell in legal()))


if __name__ == "__main__":
    sys.exit(main())
