"""
Measure what docs/RESULTS.md reports, and write that page: `python scripts/make_results.py [PART ...]`.

    long      5,000 steps of recipes/scale/13m.yaml on Debian's documentation, with a kill every few minutes (an hour and more)
    scaling   `shoal bench scaling` of the same model on 1, 2, 4 and 8 processes, by DDP and FSDP
    memory    `shoal bench memory` of GPT-2 medium (355M) by DDP and FSDP, on 2 and 4 processes
    plan      `shoal plan` of both models on devices that are not here: memory, time and cost, with intervals
    page      docs/RESULTS.md and its pictures, from the parts that are measured

Without a PART: all. Each part writes into build/results; a part that is there is not measured again (--again measures it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.results.corpus import write_corpus
from scripts.results.kills import train_through_kills
from scripts.results.page import write_page

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "build" / "results"
SMALL: Final = "recipes/scale/13m.yaml"
MEDIUM: Final = "recipes/scale/gpt2-355m-fsdp.yaml"
CORPUS: Final = "build/results/debian.jsonl"
RUN: Final = "debian-13m"
# 1,024 tokens a step, as the recipe, but in samples of 256
SHAPE: Final = ("--data.seq_len", "256", "--train.global_batch", "4")
LONG: Final = (
    SMALL, "--name", RUN, "--launch.runs", "build/results/runs", "--data.corpus", "jsonl", "--data.paths", CORPUS,
    "--data.text_key", "text", *SHAPE, "--train.micro_batch", "2", "--train.steps", "5000", "--optim.lr", "1e-3", "--optim.warmup_steps", "100",
    "--train.eval_every", "500", "--train.eval_tokens", "50000", "--checkpoint.every", "100", "--metrics.every", "10",
    "--train.sample_prompt", "The kernel",
)  # fmt: skip
SCALING: Final = (
    "bench", "scaling", SMALL, "--data.corpus", "dummy", "--data.seq_len", "256", "--train.global_batch", "8",
    "--train.micro_batch", "1", "--train.steps", "10", "--processes", "1,2,4,8", "--method", "ddp,fsdp",
)  # fmt: skip
MEMORY: Final = (
    "bench", "memory", MEDIUM, "--data.corpus", "dummy", "--data.tokenizer", "bytes", "--model.vocab_size", "50257",
    "--data.seq_len", "256", "--train.global_batch", "4", "--train.micro_batch", "1", "--train.dtype", "float32",
    "--processes", "2,4",
)  # fmt: skip
DEVICES: Final = "1xH100-80GB,2xH100-80GB,4xH100-80GB,8xH100-80GB,16xH100-80GB"
PLANS: Final[Mapping[str, tuple[str, ...]]] = {
    "plan-355m": ("plan", MEDIUM, "--devices", DEVICES, "--price", "2.5usd/h"),
    "plan-355m-16": ("plan", MEDIUM, "--devices", "16xH100-80GB"),
    "plan-13m": (
        "plan", SMALL, "--data.seq_len", "256", "--train.global_batch", "16", "--train.steps", "5000", "--devices",
        "1xcpu-8GB,2xcpu-8GB,4xcpu-8GB,8xcpu-8GB,16xcpu-8GB",
    ),
}  # fmt: skip


def measure_long(minutes: float) -> None:
    """Train the long run through its kills; draw it, and write down its goodput and its ledger."""
    if not (ROOT / CORPUS).is_file():
        write_corpus(ROOT / CORPUS)
    run = FOLDER / "runs" / RUN
    train_through_kills(LONG, run, minutes=minutes, log=FOLDER / "long.log")
    for name, command in {"goodput": ("goodput", str(run)), "ledger": ("ledger", str(run))}.items():
        _write(name, _shoal(command))


def measure_scaling() -> None:
    """Measure the speed on 1, 2, 4 and 8 processes."""
    _write("scaling", _shoal((*SCALING, "--out", str(FOLDER / "scaling.json"), "--pictures", str(FOLDER / "pictures"))))


def measure_memory() -> None:
    """Measure the memory of DDP and FSDP."""
    _write("memory", _shoal((*MEMORY, "--out", str(FOLDER / "memory.json"))))


def measure_plans() -> None:
    """Predict the runs on other devices."""
    for name, command in PLANS.items():
        _write(name, _shoal(command))


def _shoal(words: Sequence[str]) -> str:
    """Return what a command of shoal prints on stdout, behind the command itself. Ends this script if it fails."""
    print("shoal", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "shoal", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"shoal {' '.join(words)} ended with exit code {done.returncode}")
    return f"shoal {' '.join(words)}\n{done.stdout.rstrip()}\n"


def _write(name: str, text: str) -> None:
    (FOLDER / f"{name}.txt").write_text(text.replace(f"{ROOT}/", ""), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="long, scaling, memory, plan or page")
    parser.add_argument("--minutes", type=float, default=3.0, help="time between two kills")
    parser.add_argument("--again", action="store_true", help="measure a part that is already there, too")
    asked = parser.parse_args(argv)
    parts: dict[str, tuple[str, Callable[[], None]]] = {
        "long": ("ledger", lambda: measure_long(asked.minutes)), "scaling": ("scaling", measure_scaling),
        "memory": ("memory", measure_memory), "plan": ("plan-13m", measure_plans),
    }  # fmt: skip
    if wrong := [part for part in asked.parts if part not in (*parts, "page")]:
        parser.error(f"{wrong[0]} is not one of {', '.join(parts)} and page")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (last, measure) in parts.items():
        if name in (asked.parts or parts) and (asked.again or not (FOLDER / f"{last}.txt").is_file()):
            measure()
    write_page(FOLDER, ROOT / "docs", run=FOLDER / "runs" / RUN, long=LONG)


if __name__ == "__main__":
    main()
