"""
Inject random faults into small real runs, and check that each run reaches the weights of an undisturbed one.

    python scripts/chaos.py                         100 faults, five per run: seeds 0 to 19
    python scripts/chaos.py --first 7 --count 1     seed 7 again, with its output
    python scripts/chaos.py --processes 2 --plan '[{"step": 5, "phase": "write", "rank": 1, "fault": "kill"}]'
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chaos.case import Case, drawn
from tests.chaos.trial import Laboratory

from shoal.fault.inject import Injected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=20, help="number of seeds, with five faults each")
    parser.add_argument("--plan", type=json.loads, help="run these faults instead: a JSON list, as in SHOAL_FAULTS")
    parser.add_argument("--processes", type=int, default=2, help="number of processes for --plan")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="folder for the runs")
    options = parser.parse_args()
    if options.plan is not None:
        cases = {"plan": Case(options.processes, tuple(Injected(**each) for each in options.plan))}
    else:
        cases = {f"seed-{s}": drawn(s) for s in range(options.first, options.first + options.count)}
    shutil.rmtree(options.folder, ignore_errors=True)
    laboratory = Laboratory(options.folder)
    begun = time.perf_counter()
    wrong = [name for name, case in cases.items() if not passes(laboratory, name, case, talks=len(cases) == 1)]
    faults = Counter(fault.fault for case in cases.values() for fault in case.faults)
    print(
        f"{len(cases) - len(wrong)} of {len(cases)} runs, with {faults.total()} faults, reached the right weights in "
        f"{time.perf_counter() - begun:.0f} s; {dict(faults)}"
    )
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


def passes(laboratory: Laboratory, name: str, case: Case, *, talks: bool) -> bool:
    """Run a case and print the verdict. Also print the run's output if it failed or `talks` is true."""
    begun = time.perf_counter()
    verdict = laboratory.try_out(case, name)
    said = "WRONG" if verdict.problems else "right"
    print(f"{name}: {said} in {time.perf_counter() - begun:.0f} s, {case}", flush=True)
    if verdict.problems or talks:
        print(verdict.output)
    if verdict.problems:
        print(verdict.explain(case), flush=True)
    laboratory.forget(name)
    return not verdict.problems


if __name__ == "__main__":
    sys.exit(main())
