"""
Test another version of torch in its own environment: the parts that depend most on torch, in a few minutes.

    make test-torch VERSION=2.11.0              in .venv-torch-2.11.0, which is made if missing
    make test-torch VERSION=2.11.0 PARTS="layouts compile"
    make test-torch TORCH_ENV=DIR               in an existing environment with the packages of constraints.txt

Prints one line per part and the row for the table in docs/SETUP.md; exits with 1 if a part failed. Each part's output is in
build/test-torch/VERSION/. Needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 1800  # per part, on a busy machine
WARNING = re.compile(r"warning|deprecat", re.IGNORECASE)

# Each part's tests, as pytest selects them.
PARTS = {
    "names": ["tests/system/test_torch_private.py"],
    "layouts": ["tests/parallel/test_matrix.py", "-m", "torch", "-k", "not compiled"],
    "compile": ["tests/parallel/test_matrix.py", "-m", "torch", "-k", "compiled"],
    "comparison": ["tests/training/test_compile_check.py", "-m", "not ci"],
    "pipelines": ["tests/parallel/test_pipeline.py", "-k", "two_processes or test_with_sharded_stages"],
    "context": ["tests/parallel/test_context.py", "-m", "not slow"],
    "checkpoints": ["tests/checkpoint/test_store.py", "tests/parallel/test_checkpoints.py", "-m", "not ci and not slow"],
    "transformers": ["tests/parallel/test_hf_layouts.py", "-k", "gradients or computed_again or another_layout"],
    "restarts": ["tests/cli/test_runs.py", "-k", "is_killed_is_started_again or asked_to_stop_it_saves"],
}  # fmt: skip
QUICKSTART = "quickstart"
RECIPE = "recipes/quickstart.yaml"
SHORT = ("--optim.warmup_steps", "5", "--train.sample_tokens", "8")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one part; `said` is its line in the summary."""

    fine: bool
    said: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="version of torch, such as 2.11.0; unused with TORCH_ENV")
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, QUICKSTART], help="run only these parts")
    arguments = parser.parse_args()
    python = environment(arguments.version)
    version = output(python, "import importlib.metadata as m; print(m.version('torch'))")
    folder = ROOT / "build" / "test-torch" / version.partition("+")[0]
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for part in arguments.parts or [*PARTS, QUICKSTART]:
        print(f"torch {version}: {part} ...", flush=True)
        outcomes[part] = quickstart(python, folder) if part == QUICKSTART else tests(part, python, folder)
        print(f"torch {version}: {part}: {outcomes[part].said}, {outcomes[part].seconds:.0f} s", flush=True)
    print(f"\ntorch {version}, {sum(o.seconds for o in outcomes.values()):.0f} s; details in {folder}")
    for part, outcome in outcomes.items():
        print(f"  {'pass' if outcome.fine else 'FAIL'}  {part}: {outcome.said}")
    print("\n| torch | " + " | ".join(outcomes) + " |")
    print(f"| {folder.name} | " + " | ".join(outcome.said for outcome in outcomes.values()) + " |")
    return 0 if all(outcome.fine for outcome in outcomes.values()) else 1


def environment(version: str | None) -> Path:
    """Return the Python interpreter of TORCH_ENV, or of an environment with this version of torch, which is made if missing."""
    there = os.environ.get("TORCH_ENV")
    if there:
        python = Path(there).absolute() / "bin" / "python"
        if not python.exists():
            sys.exit(f"test-torch: TORCH_ENV is {there}, but {python} does not exist")
        return python
    if version is None:
        sys.exit("test-torch: set the version, make test-torch VERSION=2.11.0, or TORCH_ENV=DIR")
    folder = ROOT / f".venv-torch-{version}"
    if not (folder / "installed").exists():
        settings = {"VENV": str(folder), "TORCH_VERSION": version, "PYTHON": os.environ.get("PYTHON") or sys.executable}
        made = subprocess.run(["bash", "scripts/install.sh"], cwd=ROOT, env=os.environ | settings, check=False)
        if made.returncode:
            sys.exit(f"test-torch: cannot make {folder.name}")
    return folder / "bin" / "python"


def output(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def call(python: Path, arguments: list[str], log: Path) -> tuple[int, str]:
    """Run a command with this repository's shoal; return exit code and output, which is appended to `log`."""
    ours = {"PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "PASSIVE", "TEST_PATIENCE_SECONDS": "600"}
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        start = file.seek(0, os.SEEK_END)
        try:
            code = subprocess.run(
                [python, *arguments], cwd=ROOT, env=os.environ | ours, stdout=file, stderr=subprocess.STDOUT,
                timeout=LIMIT_SECONDS, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 124
        file.seek(start)
        return code, file.read()


def tests(part: str, python: Path, folder: Path) -> Outcome:
    log, start = folder / f"{part}.log", time.monotonic()
    log.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--color=no", "--durations=5", "-ra", "--timeout=1200"]
    arguments = ["-m", "pytest", *options, *PARTS[part]]
    code, text = call(python, arguments, log)
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", text.rstrip().rpartition("\n")[2])
    counts = {kind: int(count) for count, kind in found}
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    said = f"{passed} of {passed + counts.get('failed', 0) + counts.get('error', 0)}"
    said += f", {skipped} skipped" * bool(skipped) + f" (exit code {code})" * (code not in (0, 1))
    fine = code == 0 and passed > 0  # none passed if all were skipped
    return Outcome(fine, said, time.monotonic() - start)


def quickstart(python: Path, folder: Path) -> Outcome:
    """Run 20 steps of the quickstart on two processes, a resume with FSDP2, generation and an export; count warnings."""
    log, place = folder / "quickstart.log", folder / "quickstart"
    log.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    start = time.monotonic()
    where = ["--data.folder", str(folder.parent / "data"), "--launch.runs", str(place), "--processes", "2"]
    train = ["train", str(ROOT / RECIPE), *SHORT, *where]
    commands = {
        "train": [*train, "--train.steps", "20", "--checkpoint.every", "10"],
        "resume": [*train, "--parallel.dp_shard", "2", "--train.steps", "24"],
        "generate": ["generate", "quickstart", "--runs", str(place), "--prompt", "def ", "--tokens", "8"],
        "export": ["export", "quickstart", "--runs", str(place), "--out", str(place / "exported")],
        "env": ["env"],
    }
    failed, warnings = [], 0
    for name, arguments in commands.items():
        code, text = call(python, ["-m", "shoal", *arguments], log)
        failed += [f"{name} ended with {code}"] * bool(code)
        warnings += sum(1 for line in text.splitlines() if WARNING.search(line))
    said = "; ".join(failed) or "pass"
    return Outcome(not failed, said + f", {warnings} warnings" * bool(warnings), time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
