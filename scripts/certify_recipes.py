"""
Certify every recipe: `python scripts/certify_recipes.py [--only learn]`.

Runs `shoal verify` on each recipe in its own layout, and on the quickstart in other layouts, and writes docs/certificates.md.
Exits with 1 if a certificate reports FAIL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shoal.bench.environment import describe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "certificates.md"
QUICKSTART_LAYOUTS = [
    ["--processes", "2"],
    ["--processes", "3"],
    ["--parallel.dp_shard", "2"],
    ["--parallel.dp_shard", "2", "--train.dtype", "bfloat16"],
    ["--parallel.dp_shard", "3", "--train.repro", "bitwise"],
    ["--parallel.tp", "2"],
    ["--parallel.tp", "4"],
    ["--parallel.cp", "2"],
    ["--parallel.pp", "2"],
    ["--parallel.pp", "2", "--parallel.dp_shard", "2", "--optim.name", "adamw"],
]
HEAD = """# Certificates of the recipes

The results of `shoal verify` for each recipe in its own layout, and for the quickstart in other layouts. Each cell has the
difference from one process, and the allowed difference, which is measured on one process with sums in another order.
`python scripts/certify_recipes.py` writes this page.

| recipe | layout | dtype | loss | gradient norm | worst gradient | worst update | resumed | |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def verify(recipe: Path, options: list[str], runs: Path) -> tuple[dict[str, Any], float]:
    """Verify a recipe with these options; return the certificate and the seconds that this took."""
    begun = time.perf_counter()
    data = ["--data.folder", str(ROOT / "data"), "--launch.runs", str(runs)]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "verify", str(recipe), *options, *data],
        capture_output=True,
        text=True,
        check=False,
    )
    certificate = runs / f"verify-{recipe.stem}" / "certificate.json"
    if not certificate.is_file():
        raise RuntimeError(
            f"{recipe.name} {' '.join(options)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    found: dict[str, Any] = json.loads(certificate.read_text())
    certificate.unlink()
    return found, time.perf_counter() - begun


def rows(recipe: Path, options: list[str], found: dict[str, Any]) -> list[str]:
    """Return the rows of a certificate `found`: one for each dtype compared."""
    name = f"`{recipe.relative_to(ROOT / 'recipes')}`"
    extra = [o for o in options if o in ("bitwise", "adamw")] or (
        [found["repro"]] if found["repro"] == "bitwise" else []
    )
    lines = []
    for dtype, findings in found["findings"].items():
        cells = [
            "bitwise identical"
            if f["allowed"] == f["difference"] == 0
            else f"{f['difference']:.1e} of {f['allowed']:.1e}"
            for f in findings
        ]
        layout = ", ".join([found["layout"], *extra])
        resumed = "bitwise identical" if found["resumed_same_bits"] else "DIFFERENT bits"
        verdict = "PASS" if found["passed"] else "FAIL"
        lines.append(f"| {name} | {layout} | {dtype} | {' | '.join(cells)} | {resumed} | {verdict} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only recipes whose path contains this; does not write the page")
    arguments = parser.parse_args()
    jobs = [(recipe, list[str]()) for recipe in sorted((ROOT / "recipes" / "learn").glob("*.yaml"))]
    jobs = [(ROOT / "recipes" / "quickstart.yaml", options) for options in QUICKSTART_LAYOUTS] + jobs
    jobs = [job for job in jobs if arguments.only in str(job[0])]
    lines, passed = [], True
    with tempfile.TemporaryDirectory() as runs:
        for number, (recipe, options) in enumerate(jobs, 1):
            found, seconds = verify(recipe, options, Path(runs))
            passed &= found["passed"]
            lines += rows(recipe, options, found)
            print(f"[{number}/{len(jobs)}] {lines[-1]} {seconds:.0f} s", flush=True)
    if not arguments.only:
        lines = list(dict.fromkeys(lines))  # auto may choose the dtype that another case asks for
        PAGE.write_text(f"{HEAD}{chr(10).join(lines)}\n\n```\n{describe()}\n```\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
