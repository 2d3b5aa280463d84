"""
`shoal verify`: check that a config in its parallel layout trains the same model as one process.

Rank 0 first takes a few steps alone, twice: normally, and with sums computed in another order (matrix products in quarters,
micro-batches added in another order). The difference between the two is the effect of rounding on this model and data; a
layout may differ from one process by a small multiple of it. Then all ranks take the steps together. Each step's loss and
gradient norm, and each parameter's gradient and update, are compared with those of rank 0 alone. Last, a run saves a checkpoint
between its steps; a new model that loads it must continue bitwise identically.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import __version__
from shoal.checkpoint.store import CheckpointStore, Keep
from shoal.config.options import Config, Parallel
from shoal.data.dataset import BlendRows, Dataset, open_data
from shoal.elastic.heartbeat import Heartbeat
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.mesh.place import Place, is_launched
from shoal.mesh.region import Shard
from shoal.metrics.machine import bits_depend_on, device_name
from shoal.models.attention import take_deterministic_kernels
from shoal.models.layers import products_by_quarters
from shoal.optim.schedule import learning_rate
from shoal.parallel.runnable import Runnable
from shoal.plan.length import count_steps
from shoal.resolve.resolve import to_dict
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.training.assemble import assemble, open_loader
from shoal.training.finish_config import finish_config
from shoal.training.loop import set_threads
from shoal.training.state import TrainState
from shoal.training.step import train_step

STEPS = 3
SAVED_AT = 2  # save after this step, and resume from it once
# A layout may differ from one process by this multiple of the difference between two orders of summation. In float32 a
# missing all-reduce or a wrong divisor causes a difference thousands of times larger.
ALLOWANCE = 8.0


@dataclass
class Trace:
    """A record of a few steps: each step's loss and gradient norm, the first step's gradients, each parameter's total update."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One comparison: the difference found and the difference allowed, both relative to the size of the one-process value."""

    what: str  # "loss", "gradient norm", "gradient", "update"
    name: str  # the parameter or step ("step 2") with the worst difference
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


@dataclass
class Certificate:
    """The contents of `certificate.json`."""

    layout: str
    processes: int
    dtype: str
    repro: str
    findings: dict[str, list[Finding]] = field(default_factory=dict)  # by dtype of the comparison
    resumed_same_bits: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.resumed_same_bits and all(f.holds for found in self.findings.values() for f in found)


def verify_here(config: Config, heartbeat: Heartbeat) -> None:
    """Verify `config` as one rank of its layout; rank 0 prints the result, and writes `certificate.json` to the run's folder."""
    set_threads(config)
    heartbeat.outside("meeting the other processes")
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        if mesh.device.type == "cuda":
            take_deterministic_kernels()  # without these, a correct resume may differ in bits
        console = Console(speaks=mesh.is_first)
        folder = RunFolder.of(config).path
        heartbeat.outside("opening the data")
        dataset = open_data(config.data, Console(speaks=mesh.is_first and not is_launched()))
        heartbeat.outside("measuring the device")
        config = finish_config(config, RunFolder(folder / "none"), dataset, mesh, console.warn)
        if mesh.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        certificate = certify(config, mesh, dataset, folder, console, heartbeat.outside)
        if mesh.is_first:
            (folder / "certificate.json").write_text(json.dumps(to_json(certificate, config), indent=1) + "\n")


def certify(
    config: Config,
    mesh: Mesh,
    dataset: Dataset,
    folder: Path,
    console: Console,
    at: Callable[[str], None] = lambda phase: None,
) -> Certificate:
    """
    Compare `config` in the layout of `mesh` with one process. Writes a temporary checkpoint to `folder`.

    A config in bfloat16 or float16 is also compared in float32, where rounding hides less. The exception is ring attention
    on CUDA, whose kernel does not support float32. `at(phase)` is called as each phase begins. A collective over the world.
    """
    rows = dataset.rows("train")
    train = config.train
    certificate = Certificate(str(mesh.layout), mesh.world_size, train.dtype, train.repro)
    count = f", {mesh.world_size} processes" if mesh.world_size > 1 else ""
    console.say(f"verifying {mesh.layout}{count}, {STEPS} steps on the config's own data", "bold")
    begun = time.perf_counter()
    ring = config.parallel.cp_method == "ring" and mesh.device.type == "cuda"  # its kernel does not support float32
    for dtype in dict.fromkeys((train.dtype if ring else "float32", train.dtype)):
        one = config.replace("train", dtype=dtype)
        at(f"{dtype}: one process alone")
        expected, noise = _references(one, mesh, rows)
        at(f"{dtype}: all processes")
        runnable, trace = _take_steps(one, mesh, rows, console if dtype == train.dtype else None)
        at(f"{dtype}: comparing")
        certificate.findings[dtype] = compare(trace, runnable, mesh, expected, noise, bitwise=_same_bits(one, mesh))
        for finding in certificate.findings[dtype]:
            _say(console, dtype, finding)
    at("saving and resuming")
    certificate.resumed_same_bits = _resumes(config, mesh, rows, folder)
    same = "bitwise identical" if certificate.resumed_same_bits else "DIFFERENT bits"
    console.say(f"resumed after step {SAVED_AT}: {same}", "" if certificate.resumed_same_bits else "bold red")
    certificate.facts = _facts(mesh, time.perf_counter() - begun)
    console.say("PASS" if certificate.passed else "FAIL", "bold green" if certificate.passed else "bold red")
    return certificate


def _references(config: Config, mesh: Mesh, rows: BlendRows) -> tuple[Trace | None, Trace | None]:
    """Return two traces of rank 0 alone, the second with sums in another order. Other ranks wait, and get None twice."""
    found: tuple[Trace | None, Trace | None] = (None, None)
    if mesh.is_first:
        alone = Mesh(Place(), mesh.device)
        plain = replace(config, parallel=Parallel())
        plain = plain.replace("train", compile=False, activation_checkpointing="none")
        other = plain.replace("train", repro="fast" if config.train.repro == "bitwise" else "bitwise")
        _, expected = _take_steps(plain, alone, rows)
        with products_by_quarters():
            _, noise = _take_steps(other, alone, rows)
        for trace in (expected, noise):  # free the device's memory for the layout
            trace.gradients = {name: tensor.cpu() for name, tensor in trace.gradients.items()}
            trace.updates = {name: tensor.cpu() for name, tensor in trace.updates.items()}
        found = expected, noise
        gc.collect()
    mesh.barrier()
    return found


def _take_steps(config: Config, mesh: Mesh, rows: BlendRows, console: Console | None = None) -> tuple[Runnable, Trace]:
    """Take the first steps of a run; return the model and the trace, with gradients and updates of this rank's shards."""
    say = console.note if console is not None else lambda _: None
    runnable, state = _assemble(config, mesh, say)
    loader, trace = open_loader(config, mesh, rows), Trace()
    before = {_key(s): s.tensor.detach().clone() for s in runnable.shards}
    total = max(count_steps(config.train, config.data.seq_len, len(rows)), STEPS)
    for step in range(1, STEPS + 1):
        # the scheduled rate, with a lower limit that keeps updates measurable
        lr = max(learning_rate(config.optim, step, total), config.optim.lr / 10)
        stats = train_step(runnable, state, loader.next_step(), step=step, lr=lr, clip_norm=config.optim.clip_norm)
        loss, tokens, norm, *_ = stats.read()
        trace.losses.append(loss / max(tokens, 1.0))
        trace.norms.append(norm)
        if step == 1:
            # undo clipping, which would hide a common factor of all gradients
            clipped = max(1.0, (norm + 1e-6) / config.optim.clip_norm) if config.optim.clip_norm > 0 else 1.0
            trace.gradients = {_key(s): s.tensor.grad * clipped for s in runnable.shards if s.tensor.grad is not None}
    trace.updates = {_key(s): s.tensor.detach() - before[_key(s)] for s in runnable.shards}
    loader.close()
    return runnable, trace


def _assemble(config: Config, mesh: Mesh, say: Callable[[str], None]) -> tuple[Runnable, TrainState]:
    """Assemble model and state as a run does, with a float16 loss scale at which the first step does not overflow."""
    runnable, state = assemble(config, mesh, say)
    if state.scaler is not None:
        state.scaler.scale.fill_(1024.0)
    return runnable, state


def _key(shard: Shard) -> str:
    return f"{shard.name} (twin)" if shard.twin else shard.name


def compare(
    trace: Trace, runnable: Runnable, mesh: Mesh, expected: Trace | None, noise: Trace | None, *, bitwise: bool
) -> list[Finding]:
    """
    Return a finding each for loss, gradient norm, gradient and update: the worst step or parameter, relative to what is allowed.

    Rank 0 has the traces of one process; their tensors are broadcast one at a time. A collective over the world.
    """
    losses = [t.losses for t in (expected, noise) if t is not None]
    norms = [t.norms for t in (expected, noise) if t is not None]
    gradients = [t.gradients for t in (expected, noise) if t is not None]
    updates = [t.updates for t in (expected, noise) if t is not None]
    return [
        _numbers("loss", trace.losses, losses, mesh, bitwise=bitwise),
        _numbers("gradient norm", trace.norms, norms, mesh, bitwise=bitwise),
        _tensors("gradient", trace.gradients, gradients, runnable, mesh, power=2, bitwise=bitwise),
        _tensors("update", trace.updates, updates, runnable, mesh, power=1, bitwise=bitwise),
    ]


def _numbers(what: str, mine: list[float], alone: list[list[float]], mesh: Mesh, *, bitwise: bool) -> Finding:
    """Compare one number per step. alone: on rank 0, one process's numbers in both orders of summation; empty on other ranks."""
    first, second = _shared(torch.tensor(alone or [mine, mine], dtype=torch.float64), mesh)
    differences = ((torch.tensor(mine, dtype=torch.float64) - first) / first).abs().nan_to_num(nan=math.inf)
    # the spread (between the two orders) of one step may be small by chance: use the largest, and at least float32's resolution
    spread = max(float(((second - first) / first).abs().max()), 2.0**-22)
    step = int(differences.argmax())
    return Finding(what, f"step {step + 1}", float(differences[step]), 0.0 if bitwise else ALLOWANCE * spread)


def _tensors(
    what: str, mine: Mapping[str, Tensor], alone: list[dict[str, Tensor]], runnable: Runnable, mesh: Mesh, *,
    power: int, bitwise: bool,
) -> Finding:  # fmt: skip
    """
    Return the finding for the parameter whose difference is largest relative to its allowed difference.

    power: the order of the norm that measures differences and sizes, 1 or 2.

    An Adam update is almost the gradient's sign, which rounding may flip for an element near zero. One flip would dominate
    a sum of squares, so updates are compared by the sum of absolute values, with one flip allowed.
    """
    names = list(runnable.shapes)
    held: dict[str, list[Shard]] = {name: [] for name in names}
    for shard in runnable.shards:
        held[shard.name].append(shard)
    # columns: difference, spread, size, and elements held over all replicas
    sums = torch.zeros(len(names), 4, dtype=torch.float64)
    for index, name in enumerate(names):
        both = torch.stack([t[name] for t in alone]) if alone else torch.empty(2, *runnable.shapes[name])
        first, second = _shared(both, mesh).double()
        if mesh.is_first:
            sums[index, 1], sums[index, 2] = (second - first).abs().pow(power).sum(), first.abs().pow(power).sum()
        for shard in held[name]:
            # a missing gradient counts as an infinite difference
            here = mine[_key(shard)].cpu().double() if _key(shard) in mine else torch.full(shard.region.sizes, math.inf)
            sums[index, 0] += (here - first[shard.region.slices]).abs().pow(power).sum().nan_to_num(nan=math.inf)
            sums[index, 3] += here.numel()
    sums = mesh.sum(sums.to(mesh.device)).cpu()
    numel = torch.tensor([float(runnable.shapes[name].numel()) for name in names])
    sums[:, 0] *= numel / sums[:, 3]  # the mean over replicas, each of which was compared
    difference, spread, size = sums[:, :3].pow(1 / power).unbind(1)
    # A gradient that is pure rounding error (such as a key bias's) has no meaningful size: its floor includes a small part of
    # the average gradient size over all parameters.
    usual = (spread / size.clamp(min=1e-30)).median()
    floor = usual * size + 1e-7 * size.pow(power).sum().pow(1 / power) / len(names) ** (1 / power)
    allowed = ALLOWANCE * torch.maximum(spread, floor)
    if power == 1:
        allowed += 2 * size / numel
    if bitwise:
        allowed.zero_()
    worst = int((difference / allowed.clamp(min=1e-30)).argmax())
    unit = max(float(size[worst]), 1e-30)
    return Finding(what, names[worst], float(difference[worst]) / unit, float(allowed[worst]) / unit)


def _shared(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Return rank 0's tensor, on the CPU of every rank. A collective over the world."""
    if mesh.world_size > 1:
        tensor = tensor.to(mesh.device).contiguous()
        dist.broadcast(tensor, 0)
    return tensor.cpu()


def _same_bits(config: Config, mesh: Mesh) -> bool:
    """Return whether this layout promises bitwise identity with one process (and computes with the same kernels)."""
    train, layout = config.train, mesh.layout
    return train.repro == "bitwise" and not train.compile and layout.tp == layout.cp == 1


def _resumes(config: Config, mesh: Mesh, rows: BlendRows, folder: Path) -> bool:
    """Return whether a run resumed from a checkpoint is bitwise identical to one that continued. Collectives over the world."""
    aside = folder / "checkpoints"
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed verification
    store = CheckpointStore(aside, mesh, keep=Keep(1, best=False))  # contains a barrier
    runnable, state = _assemble(config, mesh, lambda _: None)
    loader = open_loader(config, mesh, rows)
    for step in range(1, STEPS + 1):
        loss = _one_step(config, runnable, state, loader.next_step(), step)
        state.step, state.position = step, loader.position
        if step == SAVED_AT:
            outcome = store.save(state.tensors(), {**state.scalars(), "data_id": "", "val_loss": None})
    loader.close()
    again, resumed = _assemble(config, mesh, lambda _: None)
    with torch.no_grad():
        for shard in again.shards:
            shard.tensor.fill_(float("nan"))  # so that a tensor that is not loaded causes a difference
    saved, problems = store.newest()
    if saved is None:
        raise CheckpointError(outcome.problem or "; ".join(problems))
    resumed.load_scalars(store.load(saved, resumed.tensors()))
    loader = open_loader(config, mesh, rows, resumed.position)
    for step in range(SAVED_AT + 1, STEPS + 1):
        loss_again = _one_step(config, again, resumed, loader.next_step(), step)
    loader.close()
    same = loss == loss_again and all(
        torch.equal(a.tensor, b.tensor) for a, b in zip(runnable.shards, again.shards, strict=True)
    )
    differing = mesh.sum(torch.tensor(float(not same), device=mesh.device))
    if mesh.is_first:
        shutil.rmtree(aside)
    return differing.item() == 0


def _one_step(config: Config, runnable: Runnable, state: TrainState, batches: Any, step: int) -> float:
    optim = config.optim
    stats = train_step(runnable, state, batches, step=step, lr=optim.lr, clip_norm=optim.clip_norm)
    return stats.read().loss_sum


def _say(console: Console, dtype: str, finding: Finding) -> None:
    allowed = "bitwise identical" if finding.allowed == 0 else f"{finding.allowed:.1e} allowed"
    where = finding.name if finding.name.startswith("step") else f"worst in {finding.name}"
    where = where if finding.difference else ""
    verdict = "" if finding.holds else "  FAIL"
    text = f"  {dtype:9} {finding.what:14} {finding.difference:8.1e} apart, {allowed:17}  {where}{verdict}"
    console.say(text.rstrip(), "" if finding.holds else "bold red")


def _facts(mesh: Mesh, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "device": device_name(mesh.device),
        "shoal": __version__,
        "machine": bits_depend_on(mesh.device),
        "platform": platform.platform(),
    }


def to_json(certificate: Certificate, config: Config) -> dict[str, Any]:
    """Return the certificate, whether it passed, and its config, as a JSON object."""
    return {"passed": certificate.passed, **asdict(certificate), "config": to_dict(config)}
