"""
`shoal bench speed`: times the real training step of shoal and, with `--peers`, of transformers.Trainer.

Each timed run has new processes. With `--peers`, runs of the two contenders alternate.

A figure is the median over repeats of each run's median step. A ratio is the median of the ratios of neighboring runs, which
cancels drift of the machine's speed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.config.options import Config
from shoal.errors import LaunchError, ShoalError
from shoal.launch.torchrun import count_gpus, plan_processes, worker_environment
from shoal.resolve.resolve import resolve, to_yaml
from shoal.run.console import Console
from shoal.run.narrator import Narrator

DEFAULT = """
model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, max_seq_len: 256}
data: {corpus: dummy, tokenizer: bytes, seq_len: 256}
train: {steps: 12, global_batch: 12, micro_batch: 12}
"""
WARMUP_STEPS = 3
OF_ONE_RUN = ("tokens_per_second", "step_seconds", "seconds", "losses")


def bench_speed(
    recipe: Path | None,
    overrides: Sequence[tuple[str, str, str]],
    *,
    peers: bool,
    repeats: int,
    as_json: bool,
    narrator: Narrator,
) -> None:
    """
    Print tokens/s, time by phase, MFU, and model FLOP/s relative to a matrix product; MFU and FLOP/s only where known.

    recipe: the recipe to time; None uses a 10M-parameter model. peers: whether to time transformers.Trainer too. repeats:
    number of runs of each contender.
    """
    if peers and not (importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")):
        raise ShoalError("--peers needs transformers and accelerate: pip install 'shoal[peers]'")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        config = _timed_config(recipe, overrides, folder)
        contenders = ["shoal"] + (["transformers.Trainer"] if peers else [])
        if peers and (config.launch.processes or 1) > 1:
            raise ShoalError("--peers compares one process with one process; set launch.processes to 1")
        results: dict[str, list[dict[str, Any]]] = {c: [] for c in contenders}
        for repeat in range(repeats):
            for contender in contenders:
                with narrator.phase(f"run {repeat + 1} of {repeats}: {contender}"):
                    results[contender].append(_run_once(contender, config, folder))
    report = {c: _summary(runs) for c, runs in results.items()}
    if peers:
        pairs = zip(results["shoal"], results["transformers.Trainer"], strict=True)
        report["shoal"]["times_trainer"] = statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs
        )
    print(json.dumps(report) if as_json else _table(config, report))


def _timed_config(recipe: Path | None, overrides: Sequence[tuple[str, str, str]], folder: Path) -> Config:
    """Return the config to time: with a temporary run folder, prepared data, no evaluation and no checkpoints."""
    if recipe is None:
        recipe = folder / "default.yaml"
        recipe.write_text(DEFAULT, encoding="utf-8")
        overrides = [("launch.processes", "1", "benchmark default"), *overrides]
    resolved = resolve(recipe, overrides)
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    config = resolved.config
    steps = max(config.train.steps or 12, WARMUP_STEPS + 3)
    if steps > 40:
        steps = 12  # a recipe's own length is for training
    config = config.replace("train", steps=steps, tokens=None, epochs=None, eval_every=0, sample_prompt="")
    config = (
        config.replace("optim", warmup_steps=0)
        .replace("checkpoint", every=0)
        .replace("metrics", every=1, split_every=1)
    )
    config = config.replace("launch", runs=str(folder / "runs"), name="bench")
    if config.data.corpus == "dummy":
        config = config.replace("data", folder=str(folder / "data"))
    config = plan_processes(config, count_gpus(), say=Console(on_stderr=True).warn)
    from shoal.data.dataset import open_data

    open_data(config.data, Console(on_stderr=True))
    return config


def _run_once(contender: str, config: Config, folder: Path) -> dict[str, Any]:
    """Time one run in new processes; return its measurements."""
    recipe, answer = folder / "timed.yaml", folder / "answer.json"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    answer.unlink(missing_ok=True)
    module = "shoal.bench.step_worker" if contender == "shoal" else "shoal.bench.trainer_worker"
    command = [sys.executable, "-m", module, str(recipe), str(answer)]
    processes, threads = config.launch.processes or 1, config.launch.threads or 1
    if processes > 1:
        command[2:3] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module]
    ours = worker_environment(threads) if contender == "shoal" else {}  # what `shoal train` sets
    environment = ours | os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        raise LaunchError(f"{contender} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return measured


def summarize_steps(seconds: Sequence[float], tokens_per_step: int) -> dict[str, float]:
    """Return the median step time after warmup, and tokens/s."""
    median = statistics.median(seconds[WARMUP_STEPS:])
    return {"step_seconds": median, "tokens_per_second": tokens_per_step / median}


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["tokens_per_second"] for run in runs]
    first = {k: v for k, v in runs[0].items() if k not in OF_ONE_RUN}
    return first | {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "step_seconds": statistics.median(run["step_seconds"] for run in runs),
        **({"mfu": statistics.median(run["mfu"] for run in runs)} if runs[0].get("mfu") else {}),
        **(_of_a_product(runs) if runs[0].get("model_flops") else {}),
    }


def _of_a_product(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the model's median FLOP/s, the best FLOP/s of any run or of its matrix product, and their ratio."""
    rates = [run["model_flops"] for run in runs]
    best = max(*rates, *(run["product_flops"] for run in runs))
    return {
        "model_flops": statistics.median(rates),
        "product_flops": best,
        "of_product": statistics.median(rates) / best,
    }


def _table(config: Config, report: dict[str, dict[str, Any]]) -> str:
    ours = report["shoal"]
    lines = [
        f"{ours['model']}, {config.train.dtype}, {config.train.global_batch} x {config.data.seq_len} tokens a step, "
        f"processes: {config.launch.processes}, {ours['device']}",
        *filter(None, [ours["mfu_convention"]]),
        f"{'':22}{'tokens/s':>12}{'lowest':>12}{'highest':>12}{'ms/step':>10}{'MFU':>8}",
    ]
    for name, r in report.items():
        mfu = f"{100 * r['mfu']:.1f}%" if r.get("mfu") else ""
        lines.append(
            f"{name:22}{r['tokens_per_second']:12,.0f}{r['lowest']:12,.0f}{r['highest']:12,.0f}{1000 * r['step_seconds']:10,.0f}{mfu:>8}"
        )
    shares = ours["split"] | {"rest": max(0.0, 1 - sum(ours["split"].values()))}
    split = "  ".join(f"{k} {100 * v:.1f}%" for k, v in shares.items())
    lines.append(f"{'phases of the step':22}{split}")
    if "of_product" in ours:
        lines.append(
            f"{'matrix product':22}{ours['model_flops'] / 1e9:,.0f} GFLOP/s of model FLOPs, "
            f"{100 * ours['of_product']:.0f}% of the best rate of a matrix product ({ours['product_flops'] / 1e9:,.0f})"
        )
    if "times_trainer" in ours:
        lines.append(f"shoal is {ours['times_trainer']:.2f} x transformers.Trainer (median of neighboring pairs)")
    return "\n".join(lines)
