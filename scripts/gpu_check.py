"""
Check everything in shoal that needs a CUDA device: correctness first, then speed.

    python scripts/gpu_check.py [--quick] [--out FILE]
    python scripts/gpu_check.py --device cpu --quick       # rehearsal: the checks that run without a GPU, at tiny sizes

Reports progress on standard error. Prints one JSON object: device, versions, commit, checks, speed; with --out also writes it
to FILE after each check (keep it under docs/benchmarks/). Exits with 1 if a check or the quickstart failed. Needs the stdlib
corpus and no network.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for bitwise runs; shoal's launcher would set it

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from shoal.bench.environment import describe
from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Train
from shoal.config.run_options import Launch, Metrics
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.metrics.machine import device_name
from shoal.models.attention import KERNELS, attend, document_mask, take_deterministic_kernels
from shoal.models.generate import generate
from shoal.run.phases import NO_PHASES
from shoal.run.records import read_metrics
from shoal.system.signals import StopRequest
from shoal.training import loop
from shoal.training.run import Run
from shoal.training.step import Stats, train_step

ROOT = Path(__file__).resolve().parents[1]
Gradients = dict[str, torch.Tensor]
Found = tuple[bool, str]  # whether the check passed, and its findings


@dataclass(frozen=True)
class Target:
    """The device of the checks, and a temporary folder for them."""

    device: torch.device
    folder: Path
    quick: bool

    @property
    def rehearses(self) -> bool:
        return self.device.type == "cpu"

    def recipe(self, name: str, text: str) -> str:
        """Write a recipe for one process on the device; return its file name."""
        path = self.folder / f"{name}.yaml"
        threads = ", threads: 1" * self.rehearses  # a rehearsal shares its machine with other programs
        path.write_text(f"{text.format(device=self.device.type)}\nlaunch: {{processes: 1{threads}}}\n")
        return path.name


def small(target: Target, name: str, **train: Any) -> Config:
    """Return a config: a model of 1M parameters (fewer in a rehearsal), generated text, document masks, grouped-query attention."""
    dim, seq_len, batch = (64, 32, 4) if target.rehearses else (256, 128, 16)
    return Config(
        model=Model(dim=dim, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256, qk_norm=True),
        data=Data(
            corpus="dummy", tokenizer="bytes", seq_len=seq_len, document_mask=True, folder=str(target.folder / "data")
        ),
        optim=Optim(lr=3e-3, warmup_steps=2),
        train=Train(**{"steps": 8, "global_batch": batch, "micro_batch": batch // 4, "eval_every": 0, **train}),
        metrics=Metrics(peak_tflops=1.0),
        launch=Launch(runs=str(target.folder / "runs"), name=name),
    )


def opened(target: Target, name: str, device: torch.device | None = None, **train: Any) -> Run:
    torch.use_deterministic_algorithms(False)  # an earlier bitwise run leaves them on
    return Run.open(small(target, name, **train), Mesh(Place(), device or target.device), StopRequest())


def first_step(target: Target, name: str, device: torch.device | None = None, **train: Any) -> tuple[float, Gradients]:
    """Return the mean loss and the gradients of the first step."""
    run = opened(target, name, device, **train)
    scale = run.state.scaler.scale if run.state.scaler else 1.0
    losses, _ = run.runnable.forward_backward(run.loader.next_step(), 1, NO_PHASES, scale)
    run.close()
    gradients = {s.name: (s.tensor.grad / scale).cpu() for s in run.runnable.shards if s.tensor.grad is not None}
    return float(losses.sum()), gradients


def worst(mine: Gradients, theirs: Gradients) -> float:
    """Return the largest relative difference of a parameter's gradient."""
    return max(apart(theirs[n], mine[n]) for n in mine)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference of two tensors."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def compared(
    reference: tuple[float, Gradients],
    found: tuple[float, Gradients],
    name: str,
    loss_within: float,
    gradient_within: float,
) -> Found:
    """Return whether the first step's loss and gradients agree with the reference called `name`, and how well."""
    (loss, gradients), (their_loss, theirs) = reference, found
    error = worst(gradients, theirs)
    fine = abs(loss - their_loss) < loss_within and error < gradient_within
    return fine, f"loss {their_loss:.6f}, {name}: {loss:.6f}; worst gradient {error:.1e}"


def check_float32(target: Target) -> Found:
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu = first_step(target, "cpu", torch.device("cpu"), dtype="float32")
    return compared(cpu, first_step(target, "there", dtype="float32"), "CPU", 1e-4, 1e-4)


def check_bfloat16(target: Target) -> Found:
    float32 = first_step(target, "f32", dtype="float32")
    return compared(float32, first_step(target, "bf16", dtype="bfloat16"), "float32", 0.02, 0.1)


def check_float16(target: Target) -> Found:
    float32 = first_step(target, "f32-2", dtype="float32")
    return compared(float32, first_step(target, "f16", dtype="float16"), "float32", 0.02, 0.05)


def check_recompute(target: Target) -> Found:
    kept = first_step(target, "kept", dtype="bfloat16", repro="bitwise")
    same = []
    for mode in ("full", "selective"):
        loss, gradients = first_step(target, mode, dtype="bfloat16", repro="bitwise", activation_checkpointing=mode)
        same.append(loss == kept[0] and all(torch.equal(gradients[n], g) for n, g in kept[1].items()))
    return all(same), f"full and selective checkpointing: {'bitwise identical' if all(same) else 'different bits'}"


def attention_inputs(
    target: Target,
    *,
    heads: int = 8,
    keys: int = 8,
    places: int = 0,
    seen: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, ...]:
    """
    Return queries at the last `places` of `seen` positions, and keys and values at all of them.

    places: 0 means all positions. seen: 0 means 2048 positions, or 256 in a rehearsal.
    """
    seen = seen or (256 if target.rehearses else 2048)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, places or seen, heads, 64), (2, seen, keys, 64), (2, seen, keys, 64))
    return tuple(
        torch.randn(shape, generator=generator).to(target.device, dtype).requires_grad_() for shape in shapes
    )  # fmt: skip


def documents(target: Target, places: int) -> torch.Tensor:
    return document_mask(torch.arange(places, device=target.device).expand(2, -1) // (places // 3))


def check_attention(target: Target) -> Found:
    """
    Compare each attention variant with float64, and check that forward and backward do not store all scores.

    At 2 rows, 8 heads and 2048 positions the scores in bfloat16 take 128 MiB, and unfused math keeps them for backward. A
    fused kernel needs about 30 MiB for tensors of the queries' size (4 MiB each) and 24 MiB for a mask in its format. The
    bound, 96 MiB, is between 54 and 128 MiB.
    """
    said, fine, bound = [], True, 96 * 2**20
    for keys, masked in ((8, False), (2, False), (8, True), (2, True)):
        q, k, v = attention_inputs(target, keys=keys)
        mask = documents(target, q.shape[1]) if masked else None
        expected = attend(q.double(), k.double(), v.double(), mask)
        ask: Any = torch._fused_sdp_choice
        choice = ask(
            *(x.transpose(1, 2) for x in (q, k, v)), mask, 0.0, mask is None, enable_gqa=keys != 8
        )  # fmt: skip
        found, taken = with_memory(target, functools.partial(forward_backward, q, k, v, mask))
        fine &= apart(found, expected) < 0.01 and taken < bound
        what = f"{keys} key heads{', documents' * masked}"
        said.append(f"{what}: torch would choose {KERNELS[choice].split(' (')[0]}; shoal took {taken / 2**20:.0f} MiB")
    return fine, "; ".join(said)


def forward_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = attend(q, k, v, mask)
    out.float().sum().backward()
    return out.detach()


def with_memory(target: Target, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the result of `work` and its peak memory in bytes, beyond that in use before; 0 on a CPU."""
    if target.rehearses:
        return work(), 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # the peak until here includes the float64 reference
    result = work()
    return result, torch.cuda.max_memory_allocated() - before


def check_deterministic(target: Target) -> Found:
    """Check that attention's backward is deterministic, repeatedly, with the settings of a bitwise run."""
    take_deterministic_kernels()
    counts = {}
    for dtype in (torch.bfloat16, torch.float32):
        for masked in (False, True):
            q, k, v = attention_inputs(target, keys=2, dtype=dtype)
            mask = documents(target, q.shape[1]) if masked else None
            seen = set()
            for _ in range(3 if target.rehearses else 12):
                grads = torch.autograd.grad(attend(q, k, v, mask).float().square().sum(), (q, k, v))
                seen.add(tuple(g.float().cpu().numpy().tobytes() for g in grads))
            counts[f"{str(dtype)[6:]}{', documents' * masked}"] = len(seen)
    torch.use_deterministic_algorithms(False)
    return set(counts.values()) == {1}, f"different results: {counts}"


def check_lower_right(target: Target) -> Found:
    """Check attention as context parallelism uses it: the last queries, causal, without a materialized mask."""
    from torch.nn.attention.bias import causal_lower_right

    errors = []
    for keys in (8, 2):
        for dtype, within in ((torch.bfloat16, 0.02), (torch.float32, 1e-3)):
            q, k, v = attention_inputs(target, keys=keys, places=128, seen=512, dtype=dtype)
            bias = causal_lower_right(128, 512)
            whole = torch.ones(128, 512, dtype=torch.bool, device=target.device).tril(384)
            # CPU kernels do not support the bias: `parallel/context.py` materializes the mask there
            found = attend(q, k, v, whole if target.rehearses else bias)
            expected = attend(q.double(), k.double(), v.double(), whole)
            grads, wanted = (torch.autograd.grad(x.double().sum(), (q, k, v)) for x in (found, expected))
            far = max(apart(a, b) for a, b in zip((found, *grads), (expected, *wanted), strict=True))
            errors.append((far < within, f"{keys} key heads, {str(dtype)[6:]}: {far:.1e}"))
    return all(fine for fine, _ in errors), "; ".join(text for _, text in errors)


def check_late_reading(target: Target) -> Found:
    """
    Check that a step's results are read while the next step runs, and equal those of a run that reads them at once.

    Each record must have its own step's device time, including the last record, which is read when nothing else is queued.
    """
    steps = 6 if target.rehearses else 60
    late, at_once = (take_steps(target, late=late, steps=steps) for late in (True, False))
    same = late.losses == at_once.losses and len(late.losses) == steps
    apart_in_time = (late.read_late, at_once.read_late) == (steps - 1, 0)
    # on a CPU a step is done when queued; on a GPU the host may wait in the first steps, which load kernels
    overlaps = target.rehearses or (late.overlapped > steps // 2 and at_once.overlapped == 0)
    median = sorted(late.seconds)[steps // 2]
    timed = target.rehearses or late.seconds[-1] > median / 2
    text = (
        f"{late.read_late} of {steps} steps read late and {late.overlapped} still running when the next was queued "
        f"(read at once: {at_once.read_late} and {at_once.overlapped}), {'identical' if same else 'different'} losses; "
        f"median step {1e3 * median:.2f} ms, last record {1e3 * late.seconds[-1]:.3f} ms"
    )
    return same and apart_in_time and overlaps and timed, text


@dataclass
class Taken:
    """
    Losses and seconds of a run's steps.

    read_late: number of steps whose results were read after the next step was queued. overlapped: number of steps that were
    still running on the device when the next one had been queued.
    """

    losses: list[float]
    seconds: list[float]
    read_late: int = 0
    overlapped: int = 0


def take_steps(target: Target, *, late: bool, steps: int) -> Taken:
    """Take the steps of a bitwise run that reads their results late or at once. On a GPU the loop itself chooses to read late."""
    run, taken = opened(target, f"late-{late}", dtype="bfloat16", repro="bitwise", steps=steps), Taken([], [])
    record = loop.record
    before: Stats | None = None  # the step queued last

    def step(*args: Any, **options: Any) -> Stats:
        nonlocal before
        if not target.rehearses:
            torch.cuda._sleep(50_000_000)  # about 30 ms, so that the device is slower than its host
        stats = train_step(*args, **options)
        taken.overlapped += before is not None and not before.over.has_come()
        before = stats
        return stats

    def counted(run: Run, stats: Stats) -> bool:
        taken.read_late += before is not None and stats.step < before.step
        return record(run, stats)

    with (
        mock.patch.object(loop, "train_step", step),
        mock.patch.object(loop, "record", counted),
        contextlib.ExitStack() as patches,
    ):
        if target.rehearses or not late:
            patches.enter_context(mock.patch.object(loop, "reads_late", return_value=late))
        loop.take_steps(run)
    run.close()
    torch.use_deterministic_algorithms(False)
    for record_of_step in read_metrics(run.folder.metrics_file).steps:
        taken.losses.append(record_of_step.loss)
        taken.seconds.append(record_of_step.step_seconds)
    return taken


def check_muon(target: Target) -> Found:
    config = small(target, "muon", dtype="float32", steps=30).replace("optim", name="muon")
    run = Run.open(config, Mesh(Place(), target.device), StopRequest())
    loop.take_steps(run)
    run.close()
    losses = [r.loss for r in read_metrics(run.folder.metrics_file).steps]
    return losses[-1] < losses[0] - 1, f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in 30 steps"


TINY = (
    "model: {{dim: 128, num_layers: 2, num_heads: 2, max_seq_len: 128}}\n"
    "data: {{corpus: dummy, tokenizer: bytes, seq_len: 64}}\noptim: {{schedule: constant}}\n"
    "train: {{steps: 20, global_batch: 8, micro_batch: 4, device: {device}}}"
)


def check_verify(target: Target) -> Found:
    quickstart = str(ROOT / "recipes" / "quickstart.yaml")
    recipe = target.recipe("verified", TINY) if target.rehearses else quickstart
    text = shoal(target, "verify", recipe, "--processes", "1")
    return (
        "PASS" in text.splitlines(),
        "one process, its own dtype and float32, compared with other orders of summation; resumed",
    )


def check_compile(target: Target) -> Found:
    eager = first_step(target, "eager", dtype="bfloat16")
    begun = time.perf_counter()
    compiled = first_step(target, "compiled", dtype="bfloat16", compile=True)
    seconds = time.perf_counter() - begun
    fine, text = compared(eager, compiled, "eager", 0.02, 0.1)
    return fine, f"{text}, {seconds:.0f} s including compilation"


def check_resume(target: Target) -> Found:
    recipe = target.recipe("resume", TINY)
    shoal(target, "train", recipe, "--name", "whole")
    shoal(target, "train", recipe, "--name", "parts", "--train.steps", "9")
    shoal(target, "train", recipe, "--name", "parts")
    whole, parts = (
        [(r.step, r.loss) for r in read_metrics(target.folder / "runs" / n / "metrics.jsonl").steps]
        for n in ("whole", "parts")
    )
    return (
        whole == parts,
        f"{len(parts)} steps, resumed after 9: {'bitwise identical' if whole == parts else 'different bits'}",
    )


def check_generate(target: Target) -> Found:
    """Generate from the run that `check_resume` left."""
    text = shoal(
        target, "generate", "whole", "--prompt", "ab", "--tokens", "16", "--temperature", "0", "--device", target.device.type
    )  # fmt: skip
    return text.startswith("ab"), repr(text[:40])


def check_decoding(target: Target) -> Found:
    """Decode the same lengths twice: a kernel that plans for each length is far slower the first time."""
    run = opened(target, "decoding", dtype="bfloat16")
    model, count = run.runnable.parts[0].eval(), 8 if target.rehearses else 128
    seconds = []
    for prompt in ([1], [1, 2, 3], [1, 2, 3]):  # the first prompt loads the kernels
        begun = time.perf_counter()
        generate(model, [prompt * 8], max_new_tokens=count)
        seconds.append((time.perf_counter() - begun) / count)
    run.close()
    text = f"{1e3 * seconds[1]:.2f} ms/token at new lengths, {1e3 * seconds[2]:.2f} ms/token at known ones"
    return target.rehearses or seconds[1] < 3 * seconds[2], text


def quickstart(target: Target) -> dict[str, float]:
    """Train the quickstart; in a rehearsal, read the run that `check_resume` left."""
    begun = time.perf_counter()
    if not target.rehearses:
        shoal(target, "train", str(ROOT / "recipes" / "quickstart.yaml"))
    seconds = time.perf_counter() - begun
    run = "whole" if target.rehearses else "quickstart"
    metrics = read_metrics(target.folder / "runs" / run / "metrics.jsonl")
    return {
        "seconds": seconds,
        "tokens_per_second": metrics.steps[-1].tokens_per_second,
        "bits_per_byte": metrics.evaluations[-1].val_bits_per_byte,
    }


def speeds(target: Target) -> list[dict[str, Any]]:
    """Time each shape, eager and compiled; report a failure and continue with the next."""
    shapes = [("gpt2", 32, 1024), ("gpt2-medium", 16, 1024), ("llama-3.2-1b", 4, 2048)]
    found = []
    for preset, micro_batch, seq_len in [("tiny", 2, 32)] if target.rehearses else shapes:
        recipe = target.recipe(
            preset,
            f"model: {{{{preset: {preset}}}}}\ndata: {{{{corpus: dummy, tokenizer: bytes, seq_len: {seq_len}}}}}\n"
            f"train: {{{{steps: 20, global_batch: {micro_batch}, micro_batch: {micro_batch}, dtype: bfloat16, device: {{device}}}}}}",
        )
        for compiled in ("false",) if target.rehearses else ("false", "true"):
            timed: dict[str, Any] = {
                "preset": preset,
                "micro_batch": micro_batch,
                "seq_len": seq_len,
                "compile": compiled,
            }
            repeats = "1" if target.quick else "3"
            try:
                text = shoal(
                    target, "bench", "speed", recipe, "--json", "--repeats", repeats, "--train.compile", compiled
                )
                [row] = json.loads(text)["rows"]
                timed |= row["facts"] | {name: statistics.median(values) for name, values in row["figures"].items()}
            except RuntimeError as error:
                timed["failed"] = str(error).splitlines()[-1]
            tell(f"{preset}, compile {compiled}: {timed.get('failed') or timed['tokens_per_second']}")
            found.append(timed)
    return found


def shoal(target: Target, *arguments: str) -> str:
    """Return the output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], cwd=target.folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"shoal {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    return done.stdout


CHECKS: list[Callable[[Target], Found]] = [
    check_float32,
    check_bfloat16,
    check_float16,
    check_attention,
    check_deterministic,
    check_lower_right,
    check_recompute,
    check_late_reading,
    check_decoding,
    check_compile,
    check_muon,
    check_verify,
    check_resume,
    check_generate,
]
CUDA_ALONE = {check_float16}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_check(check: Callable[[Target], Found], target: Target) -> dict[str, Any]:
    name, begun = check.__name__.removeprefix("check_"), time.perf_counter()
    if target.rehearses and check in CUDA_ALONE:
        return {"name": name, "passed": None, "found": "needs CUDA", "seconds": 0.0}
    try:
        passed, text = check(target)
    except Exception as error:  # report it and continue with the next check
        passed, text = False, f"{type(error).__name__}: {error}"
    tell(f"{'pass' if passed else 'FAIL'}: {name}: {text}")
    return {"name": name, "passed": bool(passed), "found": text, "seconds": time.perf_counter() - begun}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of each benchmark")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, after each check")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="device to check; cpu: a rehearsal at tiny sizes"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        tell("gpu_check: torch finds no CUDA device; nothing was checked")
        return 2
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    report: dict[str, Any] = {
        "device": device_name(device),
        "versions": {
            name: value.strip() for name, _, value in (line.partition("  ") for line in describe().splitlines())
        },
        "commit": commit(),
        "command": sys.argv,
        "checks": [],
        "speed": [],
    }

    def keep() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    # output of runs in this process goes to stderr: stdout is for the report
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        target = Target(device, Path(name), arguments.quick)
        for check in CHECKS:
            report["checks"].append(run_check(check, target))
            keep()
        try:
            report["quickstart"] = quickstart(target)
        except Exception as error:  # report it and continue with the speeds
            report["quickstart"] = {"failed": f"{type(error).__name__}: {error}"}
            tell(f"FAIL: quickstart: {report['quickstart']['failed']}")
        keep()
        report["speed"] = speeds(target)
    keep()
    print(json.dumps(report, indent=1))
    return int("failed" in report["quickstart"] or any(check["passed"] is False for check in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
