"""
Writes the records of runs that never ran: loss curves with noise like that of real logs, spikes, restarts, slow ranks.

Every number is a function of the seed, so a test knows what it must find.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.resolve.resolve import resolve, to_yaml
from shoal.run.folder import RunFolder

BEGAN: Final = 1_760_000_000.0  # seconds since 1970
PHASES: Final = ("data", "forward", "backward", "reduce", "optimizer", "between")
TOKENS_PER_STEP: Final = 2048
STEP_SECONDS: Final = 0.25
SPIKE: Final = 5.0  # nats per token above the curve
SLOW: Final = 3.0  # how many times as long the slow phase of a slow rank takes


def losses(steps: int, *, seed: int, final: float = 3.0, noise: float = 0.02, correlation: float = 0.5) -> NDArray[Any]:
    """Return a loss for each step: a power law from 10 nats to about `final`, with AR(1) noise of this standard deviation."""
    random = np.random.default_rng(seed)
    drawn = random.normal(0.0, noise * np.sqrt(1 - correlation**2), steps)
    correlated, last = np.empty(steps), 0.0
    for step, each in enumerate(drawn):
        correlated[step] = last = correlation * last + each
    return final + (10.0 - final) * np.arange(1, steps + 1) ** -0.5 + correlated


def write_run(
    folder: Path,
    steps: int,
    *,
    seed: int,
    spikes: Iterable[int] = (),
    final: float = 3.0,
    noise: float = 0.02,
    every: int = 1,
    eval_every: int = 0,
    split_every: int = 100,
    step_seconds: float = STEP_SECONDS,
    sources: Sequence[str] = (),
    restarts: Sequence[int] = (),
    ranks: int = 0,
    slow: Mapping[int, str] | None = None,
    slow_from: int = 1,
    finished: bool = True,
    options: Mapping[str, str] | None = None,
) -> RunFolder:
    """
    Write the folder of a run of `steps` steps, and return it.

    spikes: steps whose loss is `SPIKE` higher. every: steps between two records. eval_every: steps between two evaluations;
    0: a tenth of the run. split_every: steps between two measured steps. sources: names of a blend's sources.
    restarts: steps after which the run was killed and resumed. ranks: ranks in `ranks.jsonl`; 0: no such file.
    slow: {rank: phase that takes `SLOW` times as long, from step `slow_from` on}. options: more options of the config.
    """
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"train.steps": str(steps), "train.seed": str(seed)} | dict(options or {})
    run.config_file.write_text(_config(folder.name, tuple(sorted(chosen.items()))))
    loss = losses(steps, seed=seed, final=final, noise=noise)
    loss[np.array(sorted(spikes), dtype=int) - 1] += SPIKE
    write_metrics(
        run.metrics_file, loss, seed=seed, every=every, eval_every=eval_every or max(1, steps // 10),
        split_every=split_every, step_seconds=step_seconds, sources=sources,
    )  # fmt: skip
    _write_events(run.events_file, steps, restarts, step_seconds, max(1, ranks), finished=finished)
    _write_time(run.time_file, steps, restarts, step_seconds)
    if ranks:
        write_ranks(run.ranks_file, steps, ranks, seed=seed, split_every=split_every, slow=slow, slow_from=slow_from)
    return run


@functools.cache
def _config(name: str, chosen: tuple[tuple[str, str], ...]) -> str:
    given = [("model.preset", "tiny"), ("data.corpus", "dummy"), ("launch.name", name), *chosen]
    return to_yaml(resolve(None, [(key, text, f"--{key}") for key, text in given]).config)


def write_metrics(
    path: Path,
    loss: NDArray[Any],
    *,
    seed: int,
    every: int = 1,
    eval_every: int = 1000,
    split_every: int = 100,
    step_seconds: float = STEP_SECONDS,
    sources: Sequence[str] = (),
) -> None:
    """Write `metrics.jsonl` with these losses, one a step."""
    path.write_text("".join(_metric_lines(loss, seed, every, eval_every, split_every, step_seconds, sources)))


def _metric_lines(
    loss: NDArray[Any],
    seed: int,
    every: int,
    eval_every: int,
    split_every: int,
    step_seconds: float,
    sources: Sequence[str],
) -> Iterable[str]:
    random = np.random.default_rng([seed, 1])
    steps = len(loss)
    took = step_seconds * random.lognormal(0.0, 0.05, steps)
    norms = random.lognormal(-0.5, 0.2, steps)
    scores = random.normal(0.0, 1.0, steps)
    apart = random.normal(0.0, 0.1, (steps, len(sources)))
    for step in [*range(1, steps, every), steps]:
        at, seconds = step - 1, float(took[step - 1])
        place = f'{{"step":{step},"tokens":{step * TOKENS_PER_STEP},"time":{BEGAN + step * step_seconds!r},'
        line = (
            f'"loss":{float(loss[at])!r},"lr":{3e-4 * (1 - 0.9 * at / steps)!r},"grad_norm":{float(norms[at])!r},'
            f'"tokens_per_second":{TOKENS_PER_STEP / seconds!r},"step_seconds":{seconds!r},"mfu":{0.1 / seconds!r},'
            f'"memory_bytes":{1_000_000_000 + step}'
        )
        if sources:
            own = {name: float(loss[at] + apart[at, i]) for i, name in enumerate(sources)}
            line += f',"source_loss":{json.dumps(own)}'
        line += f',"spike_score":{float(scores[at])!r}'
        if step == 2 or step % split_every == 0:
            split = dict(
                zip(("data", "forward", "backward", "reduce", "optimizer"), (0.01, 0.3, 0.6, 0.05, 0.04), strict=True)
            )
            line += f',"split_seconds":{json.dumps({"step": seconds} | {k: v * seconds for k, v in split.items()})}'
        yield f"{place}{line}}}\n"
        if step % eval_every == 0 or step == steps:
            held_out = float(loss[max(0, step - 20) : step].mean()) + 0.05
            yield f'{place}"val_loss":{held_out!r},"val_bits_per_byte":{held_out / 3!r}}}\n'


def _write_events(
    path: Path, steps: int, restarts: Sequence[int], step_seconds: float, processes: int, *, finished: bool
) -> None:
    events: list[dict[str, Any]] = [
        _started(start, steps, processes) | {"time": BEGAN + start * step_seconds} for start in (0, *restarts)
    ]
    events += [
        {"time": BEGAN + step * step_seconds, "event": "saved", "step": step, "seconds": 0.5}
        for step in range(steps // 4, steps, max(1, steps // 4))
    ]
    if finished:
        events.append({"time": BEGAN + steps * step_seconds, "event": "finished", "step": steps})
    events.sort(key=lambda each: float(each["time"]))
    path.write_text("".join(json.dumps(each) + "\n" for each in events))


def _started(step: int, steps: int, processes: int) -> dict[str, Any]:
    return {
        "event": "started",
        "step": step,
        "processes": processes,
        "device": "cpu",
        "machine": {"cpu": "a processor"},
        "layout": {"pp": 1, "dp_replicate": processes, "dp_shard": 1, "cp": 1, "tp": 1},
        "command": ["shoal", "train", "quickstart"],
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "branch": "main", "dirty": False},
        "versions": {"shoal": "0.1.0", "torch": "2.12.0", "python": "3.11.7"},
        "gpus": [],
        "host": "node1",
        "parameters": 1_000_000,
        "trainable_parameters": 1_000_000,
        "total_steps": steps,
        "device_name": "a processor",
        "flops_per_token": 6_000_000,
        "tokens_per_step": TOKENS_PER_STEP,
        "peak_flops": 1e12,
    }


def _write_time(path: Path, steps: int, restarts: Sequence[int], step_seconds: float) -> None:
    lines: list[dict[str, Any]] = []
    for start, stop in zip((0, *restarts), (*restarts, steps), strict=True):
        life = int((BEGAN + start * step_seconds) * 1e6) + len(lines) * 10_000_000
        lines.append({"life": life, "step": start, "reached": 0, "spent": {"start": 2_000_000}, "begin": True})
        spent = {"start": 2_000_000, "data": 10_000 * (stop - start), "checkpoint": 500_000}
        spent["step"] = int((stop - start) * step_seconds * 1e6)
        lines.append({"life": life, "step": stop, "reached": spent["step"], "spent": spent})
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def write_ranks(
    path: Path,
    steps: int,
    ranks: int,
    *,
    seed: int,
    split_every: int = 100,
    slow: Mapping[int, str] | None = None,
    slow_from: int = 1,
    step_seconds: float = STEP_SECONDS,
) -> None:
    """Write `ranks.jsonl`: a line for step 2 and every `split_every` steps."""
    random = np.random.default_rng([seed, 2])
    usual = dict(zip(PHASES, (0.02, 0.3, 0.55, 0.05, 0.06, 0.02), strict=True))
    with path.open("w", encoding="utf-8") as file:
        for step in [2, *range(split_every, steps + 1, split_every)]:
            busy = {phase: share * step_seconds * random.lognormal(0.0, 0.02, ranks) for phase, share in usual.items()}
            for rank, phase in (slow or {}).items():
                busy[phase][rank] *= SLOW if step >= slow_from else 1.0
            memory = (1_000_000_000 + 1000 * np.arange(ranks) + step).tolist()
            record = {"step": step, "time": BEGAN + step * step_seconds, "memory_bytes": memory}
            record["peak_memory_bytes"] = [2 * each for each in memory]
            record["busy_seconds"] = {phase: np.round(each, 6).tolist() for phase, each in busy.items()}
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
