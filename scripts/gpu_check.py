"""
Everything about shoal that needs a CUDA device, on any machine that has one: correctness first, then speed.

    python scripts/gpu_check.py [--quick] [--out FILE]

Prints what it did and found as Markdown (keep it under docs/benchmarks/), and ends with 1 where a check failed.
It needs the stdlib corpus and no network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.bench.environment import describe
from shoal.config import Config, Data, Launch, Metrics, Model, Optim, Train
from shoal.launch.place import Place
from shoal.metrics.meter import no_phases
from shoal.metrics.trackers import read_json_lines
from shoal.parallel.mesh import Mesh
from shoal.train.loop import Run

ROOT = Path(__file__).resolve().parents[1]
Gradients = dict[str, torch.Tensor]


def small(folder: Path, name: str, **train: Any) -> Config:
    """A model of a million parameters on generated text, with document masks."""
    return Config(
        model=Model(dim=256, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256, qk_norm=True),
        data=Data(corpus="dummy", tokenizer="bytes", seq_len=128, document_mask=True, folder=str(folder / "data")),
        optim=Optim(lr=3e-3, warmup_steps=2),
        train=Train(steps=8, global_batch=16, micro_batch=4, **train),
        metrics=Metrics(peak_tflops=1.0),
        launch=Launch(runs=str(folder / "runs"), name=name),
    )


def first_step(folder: Path, name: str, device: str, **train: Any) -> tuple[float, Gradients]:
    """Mean loss and gradients of the first step on `device`."""
    from shoal.fault.signals import StopRequest

    mesh = Mesh(Place(), torch.device(device))
    run = Run.open(small(folder, name, **train), mesh, StopRequest())
    scale = run.state.scaler.scale if run.state.scaler else 1.0
    losses, _ = run.runnable.forward_backward(run.loader.next_step(), 1, no_phases, scale)
    run.close()
    gradients = {s.name: (s.tensor.grad / scale).cpu() for s in run.runnable.shards if s.tensor.grad is not None}
    return float(losses.sum()), gradients


def worst(mine: Gradients, theirs: Gradients) -> float:
    """The largest relative difference of a parameter's gradient."""
    return max(float((mine[n] - theirs[n]).norm() / mine[n].norm().clamp(min=1e-12)) for n in mine)


def compared(
    reference: tuple[float, Gradients],
    found: tuple[float, Gradients],
    name: str,
    loss_within: float,
    gradient_within: float,
) -> tuple[bool, str]:
    """Whether loss and gradients of a first step agree with those of the reference called `name`, and how well."""
    (loss, gradients), (their_loss, theirs) = reference, found
    error = worst(gradients, theirs)
    fine = abs(loss - their_loss) < loss_within and error < gradient_within
    return fine, f"loss {their_loss:.6f} against {name}'s {loss:.6f}, worst gradient {error:.1e}"


def check_float32(folder: Path) -> tuple[bool, str]:
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu = first_step(folder, "cpu", "cpu", dtype="float32")
    return compared(cpu, first_step(folder, "cuda", "cuda:0", dtype="float32"), "the CPU", 1e-4, 1e-4)


def check_bfloat16(folder: Path) -> tuple[bool, str]:
    float32 = first_step(folder, "f32", "cuda:0", dtype="float32")
    return compared(float32, first_step(folder, "bf16", "cuda:0", dtype="bfloat16"), "float32", 0.02, 0.1)


def check_float16(folder: Path) -> tuple[bool, str]:
    float32 = first_step(folder, "f32-2", "cuda:0", dtype="float32")
    return compared(float32, first_step(folder, "f16", "cuda:0", dtype="float16"), "float32", 0.02, 0.05)


def check_recompute(folder: Path) -> tuple[bool, str]:
    kept = first_step(folder, "kept", "cuda:0", dtype="bfloat16", repro="bitwise")
    same = []
    for mode in ("full", "selective"):
        loss, gradients = first_step(
            folder, mode, "cuda:0", dtype="bfloat16", repro="bitwise", activation_checkpointing=mode
        )
        same.append(loss == kept[0] and all(torch.equal(gradients[n], g) for n, g in kept[1].items()))
    return all(same), f"full and selective checkpointing, bitwise: {'the same bits' if all(same) else 'other bits'}"


def check_muon(folder: Path) -> tuple[bool, str]:
    recipe = folder / "muon.yaml"
    recipe.write_text(
        "model: {dim: 128, num_layers: 2, num_heads: 2, max_seq_len: 128}\ndata: {corpus: dummy, tokenizer: bytes, seq_len: 64}\n"
        "optim: {name: muon, warmup_steps: 2}\ntrain: {steps: 30, global_batch: 8, micro_batch: 4, device: cuda}\nlaunch: {processes: 1}\n"
    )
    shoal(folder, "train", recipe.name)
    losses = [r["loss"] for r in read_json_lines(folder / "runs" / "muon" / "metrics.jsonl") if "loss" in r]
    return losses[-1] < losses[0] - 1, f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in 30 steps"


def check_verify(folder: Path) -> tuple[bool, str]:
    text = shoal(folder, "verify", str(ROOT / "recipes" / "quickstart.yaml"), "--processes", "1")
    return "PASS" in text.splitlines(), "one process, its own dtype and float32, against other orders of sums; resumed"


def check_compile(folder: Path) -> tuple[bool, str]:
    eager = first_step(folder, "eager", "cuda:0", dtype="bfloat16")
    begun = time.perf_counter()
    compiled = first_step(folder, "compiled", "cuda:0", dtype="bfloat16", compile=True)
    seconds = time.perf_counter() - begun
    fine, text = compared(eager, compiled, "eager", 0.02, 0.1)
    return fine, f"{text}, {seconds:.0f} s with compiling"


def check_flash(folder: Path) -> tuple[bool, str]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 8, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = float((found - expected).norm() / expected.norm())
    return error < 0.01, f"the flash kernel runs; {error:.1e} from float64"


def check_resume(folder: Path) -> tuple[bool, str]:
    recipe = folder / "resume.yaml"
    recipe.write_text(
        "model: {dim: 128, num_layers: 2, num_heads: 2, max_seq_len: 128}\ndata: {corpus: dummy, tokenizer: bytes, seq_len: 64}\n"
        "optim: {schedule: constant}\ntrain: {steps: 20, global_batch: 8, micro_batch: 4, device: cuda}\nlaunch: {processes: 1}\n"
    )
    shoal(folder, "train", recipe.name, "--name", "whole")
    shoal(folder, "train", recipe.name, "--name", "parts", "--train.steps", "9")
    shoal(folder, "train", recipe.name, "--name", "parts")
    whole, parts = (
        [(r["step"], r["loss"]) for r in read_json_lines(folder / "runs" / n / "metrics.jsonl") if "loss" in r]
        for n in ("whole", "parts")
    )
    return whole == parts, f"{len(parts)} steps, stopped after 9: {'the same bits' if whole == parts else 'other bits'}"


def check_generate(folder: Path) -> tuple[bool, str]:
    text = shoal(folder, "generate", "whole", "--prompt", "ab", "--tokens", "16", "--temperature", "0")
    return text.startswith("ab"), repr(text[:40])


def quickstart(folder: Path) -> str:
    begun = time.perf_counter()
    text = shoal(folder, "train", str(ROOT / "recipes" / "quickstart.yaml"))
    seconds = time.perf_counter() - begun
    records = [r for r in read_json_lines(folder / "runs" / "quickstart" / "metrics.jsonl") if "loss" in r]
    ranked = next(line for line in text.splitlines() if "bits per byte" in line)
    return f"{seconds:.0f} s from start to end, {records[-1]['tokens_per_second']:,.0f} tokens/s; {ranked}"


def speed(folder: Path, quick: bool, *options: str) -> str:
    arguments = ["bench", "speed", "--json", "--repeats", "1" if quick else "3", *options]
    report = json.loads(shoal(folder, *arguments).splitlines()[-1])["shoal"]
    share = "" if report["mfu"] is None else f"{100 * report['mfu']:.1f}%"  # of a device in the table
    return f"| {report['model']} | {' '.join(options[1:])} | {report['tokens_per_second']:,.0f} | {share} | {report['memory_bytes'] / 2**30:.1f} |"


def bench_recipe(folder: Path, preset: str, micro_batch: int, seq_len: int) -> str:
    path = folder / f"{preset}.yaml"
    path.write_text(
        f"model: {{preset: {preset}}}\ndata: {{corpus: dummy, tokenizer: bytes, seq_len: {seq_len}}}\n"
        f"train: {{steps: 20, global_batch: {micro_batch}, micro_batch: {micro_batch}, dtype: bfloat16}}\nlaunch: {{processes: 1}}\n"
    )
    return str(path)


def shoal(folder: Path, *arguments: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"shoal {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of each benchmark")
    parser.add_argument("--out", type=Path, help="also write what is printed to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(
        f"# {torch.cuda.get_device_name(0)}\n\n```\n{describe()}\n```\n\nCommand: `python {' '.join(sys.argv)}`\n\n## Correctness\n"
    )
    failed = False
    checks: list[Callable[[Path], tuple[bool, str]]] = [
        check_float32,
        check_bfloat16,
        check_float16,
        check_recompute,
        check_muon,
        check_verify,
        check_compile,
        check_flash,
        check_resume,
        check_generate,
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for check in checks:
            try:
                fine, text = check(folder)
            except Exception as error:  # told, and the next is checked all the same
                fine, text = False, f"{type(error).__name__}: {error}"
            failed |= not fine
            say(f"- {'pass' if fine else 'FAIL'}: {check.__name__.removeprefix('check_')}: {text}")
        say(
            f"\n## Speed\n\nQuickstart: {quickstart(folder)}\n\n| model | options | tokens/s | MFU (causal) | GiB |\n| --- | --- | --- | --- | --- |"
        )
        for preset, micro_batch, seq_len in [("gpt2", 32, 1024), ("gpt2-medium", 16, 1024), ("llama-3.2-1b", 4, 2048)]:
            recipe = bench_recipe(folder, preset, micro_batch, seq_len)
            for compiled in ("false", "true"):
                try:
                    say(speed(folder, arguments.quick, recipe, "--train.compile", compiled))
                except RuntimeError as error:
                    say(f"| {preset} | compile {compiled} | failed: {str(error).splitlines()[-1]} | | |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
