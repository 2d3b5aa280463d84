"""docs/RESULTS.md: what the parts have measured, as tables and pictures, each below its command."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shoal.run.events import read_json_lines
from shoal.run.records import StepRecord, read_metrics

MIB: Final = 2**20
WARM: Final = 120  # steps after a start, whose memory still grows: buffers of the first step and of the first save
HEAD: Final = """# Results

What shoal does on one small machine, measured, and on larger ones, predicted. `python scripts/make_results.py` measures all
of it and writes this page; `python scripts/make_results.py PART` measures a part. Predictions are those of
[`shoal plan`](PLANNING.md), each with its 90% interval; nothing of them was measured on the devices that they name.
"""


def write_page(folder: Path, docs: Path, *, run: Path, long: Sequence[str]) -> None:
    """Write the page from the parts in `folder`; one that was not measured has no section. run: the long run's folder."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}
    parts = [
        HEAD, _long(texts, run, docs / "pictures", long), _scaling(texts, folder, docs / "pictures"),
        _memory(texts, folder), _plans(texts),
    ]  # fmt: skip
    (docs / "RESULTS.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


def _long(texts: Mapping[str, str], run: Path, pictures: Path, command: Sequence[str]) -> str:
    title = "\n## 5,000 steps, and a kill every few minutes\n"
    if "ledger" not in texts:
        return ""
    for what, options in {"loss": ("--x", "step"), "details": ()}.items():
        out = ["--out", str(pictures / f"results-{what}.svg")]
        subprocess.run([sys.executable, "-m", "shoal", "plot", what, str(run), *options, *out], check=True)
    started = next(event for event in read_json_lines(run / "events.jsonl") if event["event"] == "started")
    machine, git = started["machine"], started["git"]
    kills = [str(line["killed"]) for line in read_json_lines(run / "kills.jsonl")]
    metrics = read_metrics(run / "metrics.jsonl")
    speeds = [record.tokens_per_second for record in metrics.steps]
    quarters = [statistics.median(speeds[i * len(speeds) // 4 : (i + 1) * len(speeds) // 4]) for i in range(4)]
    lived = lives(metrics.steps, run)
    grown = [(life[-1] - life[0]) / MIB for life in lived]
    val = metrics.evaluations
    return "\n".join(
        [
            title,
            "The 13M Llama of `recipes/scale/13m.yaml`, 1,024 tokens a step, on the documentation of Debian packages (the Linux",
            "kernel, Python, PostgreSQL, Debian itself: 54 MB of text, `scripts/results/corpus.py`), on two processes. While it trains,",
            f"a script kills a process with SIGKILL every few minutes, {len(kills)} times: {kills.count('worker')} workers, which the",
            f"launcher replaces, and {kills.count('launcher')} times the launcher itself, after which the same command is started again.",
            f"{machine['processor']} ({machine['instructions']}), torch {machine['torch']}, commit {git['commit'][:7]}.",
            "",
            _block("shoal train " + shlex.join(command)),
            "![Training and held-out loss by step](pictures/results-loss.svg)",
            "",
            "![Throughput, memory and goodput over time](pictures/results-details.svg)",
            "",
            "| | |",
            "| --- | --- |",
            f"| held-out loss, bits per byte, after {val[0].step:,} and {val[-1].step:,} steps | {val[0].val_bits_per_byte:.3f}, "
            f"{val[-1].val_bits_per_byte:.3f} |",
            f"| throughput, tokens/s, median of each quarter of the steps | {', '.join(f'{q:,.0f}' for q in quarters)} |",
            f"| memory of process 0 at the end of each life, MiB | {min(life[-1] for life in lived) / MIB:,.0f} to "
            f"{max(life[-1] for life in lived) / MIB:,.0f} |",
            f"| growth of its peak from step {WARM} of a life, after the first save, to the life's end, MiB | median "
            f"{statistics.median(grown):.0f}, at most {max(grown):.0f} |",
            "",
            "Where the time went, and the proof that every sample was trained on exactly once:",
            "",
            _block(texts["goodput"]),
            _block(texts["ledger"]),
        ]
    )  # fmt: skip


def lives(steps: Sequence[StepRecord], run: Path) -> list[list[int]]:
    """Return the memory in the records of each life of at least two after its first `WARM` steps. A kill ends a life."""
    ends = [float(line["time"]) for line in read_json_lines(run / "kills.jsonl")]
    found: list[list[StepRecord]] = [[] for _ in range(len(ends) + 1)]
    for record in steps:
        assert record.time is not None  # of a record of this version
        found[sum(end < record.time for end in ends)].append(record)
    warm = ([r.memory_bytes for r in life if r.step >= life[0].step + WARM] for life in found if life)
    return [life for life in warm if len(life) > 1]


def _scaling(texts: Mapping[str, str], folder: Path, pictures: Path) -> str:
    title = "\n## From one process to eight\n"
    if "scaling" not in texts:
        return ""
    [drawn] = (folder / "pictures").glob("*scaling*.svg")
    (pictures / "results-scaling.svg").write_bytes(drawn.read_bytes())
    return "\n".join(
        [
            title, f"{_machine(folder / 'scaling.json')} More processes than cores share them: rows with a star show what sharing",
            "costs, not scaling.", "", _block(texts["scaling"]),
            "![Speedup by processes, beside the ideal one](pictures/results-scaling.svg)", "",
        ]
    )  # fmt: skip


def _memory(texts: Mapping[str, str], folder: Path) -> str:
    title = "\n## The memory of 355M parameters, by DDP and by FSDP\n"
    if "memory" not in texts:
        return ""
    return "\n".join([title, _machine(folder / "memory.json"), "", _block(texts["memory"])])


def _machine(file: Path) -> str:
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    hardware = result["hardware"]
    return (
        f"Measured on {hardware['cpu']}, {hardware['cores']} cores ({result['instructions']}), torch {result['versions']['torch']}, "
        f"commit {result['commit'] or 'unknown'}."
    )


def _plans(texts: Mapping[str, str]) -> str:
    parts = [
        "\n## Devices that are not here: memory, time and cost\n",
        "Predictions, with 90% intervals. Those of CPUs are for a slow core, whose rates are a guess; those of GPUs rest on data "
        "sheets, and no run of shoal on a GPU has corrected them yet.",
        "",
    ]
    return "\n".join([*parts, *(_block(text) for name, text in texts.items() if name.startswith("plan"))])
