"""
Train one run through twelve faults and one without; compare their weights and draw both losses in one picture.

    python scripts/twelve_faults.py --picture docs/pictures/twelve-faults.svg

Needs shoal[plots]. Prints the events as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.digests import weights

from shoal.checkpoint.saved import listed
from shoal.data.order.audit import audit
from shoal.errors import EXIT_REQUEUE
from shoal.fault.inject import PLAN
from shoal.run.events import read_json_lines
from shoal.run.records import read_metrics

STEPS = 300
RECIPE = f"""
model: {{dim: 96, num_layers: 3, num_heads: 3, max_seq_len: 128, qk_norm: true, init_std: 0.1}}
data: {{corpus: stdlib, tokenizer: bpe, tokenizer_vocab_size: 1024, seq_len: 128}}
optim: {{lr: 1e-2, warmup_steps: 20, schedule: linear}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 1, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}}
checkpoint: {{every: 10, keep: 3}}
fault: {{check_replicas_every: 5}}
metrics: {{peak_tflops: 1}}
launch: {{hang_seconds: 5, timeout_seconds: 60, threads: 1}}
"""


@dataclass(frozen=True)
class Blow:
    """A fault, its time and its description. After a fault that `ends` the workers, they restart: the run's next life."""

    words: str
    step: int
    phase: str
    rank: int
    fault: str
    ends: bool = True
    more: dict[str, float] = field(default_factory=dict)


# Two processes until SIGTERM; then three.
FIRST = (
    Blow("SIGKILL in backward", 25, "backward", 1, "kill"),
    Blow("exception in forward", 50, "forward", 0, "exception"),
    Blow("SIGSTOP in the all-reduce of gradients", 72, "reduce", 1, "stop"),
    Blow("disk full while saving", 90, "write", 0, "full", ends=False),
    Blow("all connections closed", 112, "data", 0, "cut"),
    Blow("the loader hangs", 130, "read", 1, "hang"),
    Blow("power cut: newest checkpoint torn", 150, "retention", 0, "tear"),
    Blow("SIGTERM: stops; resumes with three processes", 175, "forward", 1, "term"),
)
SECOND = (
    Blow("a bit of a weight flips", 200, "optimizer", 1, "flip", ends=False),
    Blow("a rank is slow for 12 steps", 220, "forward", 2, "slow", ends=False, more={"seconds": 0.6, "steps": 12}),
    Blow("SIGKILL in the middle of a save", 250, "rename", 0, "kill"),
    Blow("SIGKILL during the restart", 0, "load", 1, "kill"),
)


def plan_of(blows: tuple[Blow, ...]) -> str:
    plan, life = [], 0
    for blow in blows:
        plan.append(
            {"step": blow.step, "phase": blow.phase, "rank": blow.rank, "fault": blow.fault, "life": life} | blow.more
        )
        life += blow.ends
    return json.dumps(plan)


class Watcher:
    """Records a run's progress twice a second: (seconds since the start, step)."""

    def __init__(self, metrics: Path) -> None:
        self.seen: list[tuple[float, int]] = []
        self._metrics, self._began, self._over = metrics, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self.seen.append((time.monotonic() - self._began, read_metrics(self._metrics).last_step))

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def train(folder: Path, name: str, processes: int, blows: tuple[Blow, ...] = ()) -> int:
    """Train a run with faults; return the exit code."""
    command = [sys.executable, "-m", "shoal", "train", "recipe.yaml", "--name", name, "--processes", str(processes)]
    done = subprocess.run(command, cwd=folder, env=os.environ | {PLAN: plan_of(blows)}, check=False)
    return done.returncode


def draw(folder: Path, watched: dict[str, Watcher], picture: Path) -> None:
    """Draw both losses over steps, with a mark for each fault; below, steps over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 7.4), layout="constrained")
    above, below, text = figure.subplots(3, 1, height_ratios=[3.2, 2.4, 1.4])
    styles: dict[str, dict[str, Any]] = {
        "clean": {"color": "#9ecae1", "linewidth": 5.0, "label": "without faults"},
        "faults": {"color": "#a50f15", "linewidth": 1.1, "label": "through these faults"},
    }
    for name, style in styles.items():
        records = read_metrics(folder / "runs" / name / "metrics.jsonl").steps
        above.plot([r.step for r in records], [r.loss for r in records], **style)
        below.plot(*zip(*watched[name].seen, strict=True), **style | {"linewidth": style["linewidth"] * 0.6 + 0.6})
    top = above.get_ylim()[1]
    for number, blow in enumerate([*FIRST, *SECOND], 1):
        step = blow.step or SECOND[2].step + 8  # step 0: the fault happens during the restart
        above.axvline(step, color="#636363", linewidth=0.6, linestyle=":")
        above.annotate(str(number), (step, top), ha="center", va="bottom", fontsize=9)
    above.set_xlabel("step")
    above.set_ylabel("training loss (nats per token)")
    below.set_xlabel("time (seconds)")
    below.set_ylabel("step")
    above.legend(framealpha=1.0, edgecolor="none")
    below.legend(frameon=False, loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    text.axis("off")
    words = [f"{number:2}  {blow.words}" for number, blow in enumerate([*FIRST, *SECOND], 1)]
    for column, part in enumerate((words[:6], words[6:])):
        text.text(0.02 + 0.48 * column, 0.95, "\n".join(part), va="top", fontsize=9.5, linespacing=1.6)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/twelve-faults"), help="folder for the runs")
    parser.add_argument("--picture", type=Path, default=Path("build/twelve-faults.svg"))
    options = parser.parse_args()
    shutil.rmtree(options.folder / "runs", ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    runs = options.folder / "runs"
    watched = {}
    for name in ("clean", "faults"):
        watched[name] = Watcher(runs / name / "metrics.jsonl")
        try:
            if name == "clean":
                codes = [train(options.folder, name, 2)]
            else:
                codes = [train(options.folder, name, 2, FIRST), train(options.folder, name, 3, SECOND)]
        finally:
            watched[name].close()
        if codes != ([0] if name == "clean" else [EXIT_REQUEUE, 0]):
            print(f"{name} ended with {codes}")
            return 1
    draw(options.folder, watched, options.picture)
    print("\n| event | step | details |\n| --- | --- | --- |")
    for event in read_json_lines(runs / "faults" / "events.jsonl"):
        if event["event"] not in ("saved", "started"):
            if event["event"] == "fault":
                said = f"{event['fault']} in {event['phase']} on rank {event['rank']}"
            else:
                said = next((event[key] for key in ("why", "how", "reason", "phase") if event.get(key)), "")
            print(f"| {event['event']} | {event.get('step', '')} | {said} |")
    last = {name: listed(runs / name / "checkpoints")[-1] for name in ("clean", "faults")}
    same = weights(last["clean"].folder) == weights(last["faults"].folder)
    passed = audit(runs / "faults" / "ledger.jsonl").passed
    print(f"\nstep {last['faults'].step}: weights and moments are {'bitwise identical' if same else 'DIFFERENT'}; "
          f"ledger: {'PASS' if passed else 'FAIL'}")  # fmt: skip
    return 0 if same and passed else 1


if __name__ == "__main__":
    sys.exit(main())
