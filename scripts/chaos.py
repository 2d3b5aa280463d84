"""
Random faults in a small run, trained for real: does it come to the weights of a run that nothing disturbed?

    python scripts/chaos.py                    100 faults, seeds 0 to 99
    python scripts/chaos.py --first 37 --count 1    that one again, with what it printed
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chaos.case import drawn
from tests.chaos.trial import Laboratory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=100, help="how many seeds")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="where the runs are")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    laboratory = Laboratory(options.folder)
    failed = []
    faults: Counter[str] = Counter()
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.count):
        case = drawn(seed)
        verdict = laboratory.try_out(case, f"seed-{seed}")
        faults[case.fault] += 1
        said = "right" if not verdict.problems else "WRONG: " + "; ".join(verdict.problems)
        happened = ", ".join(e for e in verdict.events if e not in ("started", "saved", "finished"))
        print(f"seed {seed:4}  {case}: {said}  ({happened or 'nothing happened'})", flush=True)
        if verdict.problems:
            failed.append(seed)
        if verdict.problems or options.count == 1:
            print(verdict.output)
        shutil.rmtree(options.folder / "runs" / f"seed-{seed}", ignore_errors=True)
    good = options.count - len(failed)
    print(
        f"{good} of {options.count} came to the right weights, in {time.perf_counter() - begun:.0f} s; {dict(faults)}"
    )
    if failed:
        print(f"wrong: seeds {', '.join(map(str, failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
