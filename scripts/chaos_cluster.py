"""
Inject random cluster faults into runs on a real Slurm of four nodes, and check that each ends with the undisturbed weights.

    python scripts/chaos_cluster.py                       100 faults, five per run: seeds 0 to 19; resumes where it stopped
    python scripts/chaos_cluster.py --again               the same from the beginning
    python scripts/chaos_cluster.py --first 7 --count 1   seed 7 alone, with its output
    python scripts/chaos_cluster.py --plan '{"nodes": 2, "min_nodes": null, "faults": [{"kind": "signal"}]}'

Needs root, Linux namespaces and Slurm: scripts/install_slurm.sh.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cluster.bed import Bed, lacking
from tests.cluster.case import Case, drawn
from tests.cluster.training import Undisturbed
from tests.cluster.trial import Trial, Verdict

from shoal.run.events import read_json_lines
from shoal.run.jsonl import PatientLines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=20, help="number of seeds, with five faults each")
    parser.add_argument("--plan", type=json.loads, help="run this case instead, as the results have it")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos-cluster"), help="folder for the results")
    options = parser.parse_args()
    if why := lacking():
        print(why, file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "results.jsonl"
    if options.again:
        results.unlink(missing_ok=True)
    if options.plan is not None:
        cases = {f"plan-{time.time():.0f}": Case.of(options.plan)}
    else:
        cases = {f"seed-{s}": drawn(s) for s in range(options.first, options.first + options.count)}
    done = {line["name"] for line in read_json_lines(results)}
    if waiting := {name: case for name, case in cases.items() if name not in done}:
        run_all(waiting, options.folder, results, talks=len(cases) == 1)
    return summarize([line for line in read_json_lines(results) if line["name"] in cases])


def run_all(cases: Mapping[str, Case], folder: Path, results: Path, *, talks: bool) -> None:
    """Run the cases one after another on one bed, and append each result to `results` at once."""
    lines = PatientLines(results)
    with tempfile.TemporaryDirectory(prefix="shoal-bed-") as place, Bed(Path(place)) as bed:
        undisturbed = Undisturbed(Path(place) / "undisturbed")
        try:
            for name, case in cases.items():
                verdict = run_one(bed, name, case, undisturbed, folder, talks=talks)
                plain = {"name": name, "seconds": round(verdict.seconds, 1), "problems": verdict.problems}
                lines.add({**plain, "case": case.plain})
                lines.sync()
        finally:
            undisturbed.close()


def run_one(bed: Bed, name: str, case: Case, undisturbed: Undisturbed, folder: Path, *, talks: bool) -> Verdict:
    """Run a case and print the verdict. Keep the run's folder in `folder` if it failed; also print its output if `talks`."""
    trial = Trial(bed, case, name, undisturbed)
    verdict = trial.run()
    print(f"{name}: {'WRONG' if verdict.problems else 'right'} in {verdict.seconds:.0f} s, {case}", flush=True)
    if verdict.problems or talks:
        print("\n".join([*verdict.problems, verdict.output]), flush=True)
    if verdict.problems:
        explain(case)
        shutil.copytree(trial.training.folder, folder / name, dirs_exist_ok=True)
        (folder / name / "slurm.log").write_text(bed.logs(200), encoding="utf-8")
    shutil.rmtree(trial.training.folder, ignore_errors=True)
    return verdict


def explain(case: Case) -> None:
    """Print the commands that repeat the run, or each of its faults alone."""
    print("to repeat it, and each fault alone:")
    for each in (case, *case.alone()):
        print(f"  python scripts/chaos_cluster.py --plan '{json.dumps(each.plain)}'")


def summarize(results: list[dict[str, Any]]) -> int:
    """Print the totals; return the exit code."""
    faults = Counter(fault["kind"] for line in results for fault in line["case"]["faults"])
    wrong = [line["name"] for line in results if line["problems"]]
    print(
        f"{len(results) - len(wrong)} of {len(results)} runs, with {faults.total()} faults, ended with the undisturbed weights, in "
        f"{sum(line['seconds'] for line in results):.0f} s; {dict(faults)}"
    )
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
