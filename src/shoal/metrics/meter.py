"""Timers and rates."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from shoal.config import Config
from shoal.metrics.moment import Moment
from shoal.parallel.mesh import Mesh, has_bfloat16
from shoal.plan.estimate import flops_per_token, parameter_count, why_no_flops
from shoal.plan.hardware import peak_flops

PHASES = ("data", "forward", "backward", "reduce", "optimizer")


class Phases(Protocol):
    """`with phases("forward"): ...` counts the time inside to that phase, or does nothing."""

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]: ...


@contextlib.contextmanager
def no_phases(name: str) -> Iterator[None]:
    """On steps whose split nobody measures."""
    yield


class PhaseTimer:
    """Seconds of one step by phase: from events on CUDA, read when the step is long over, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._cuda and name != "data":  # data is the host's time
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        """The split; on CUDA it waits for the step's last event, which is over by the time it is asked."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return dict(self._seconds)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The rate of a large square matrix product here, FLOP/s: the stand-in for a peak nobody published."""
    n = 2048
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    best, turns, end = 0.0, 0, time.perf_counter() + seconds
    a @ b
    while turns < 3 or time.perf_counter() < end:
        turns += 1
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - begun))
    return best


def settle_dtype(wanted: str, mesh: Mesh) -> str:
    """
    What "auto" means here: the same answer on every rank. A collective over the world.

    Some CPUs multiply bfloat16 twice as fast as float32, others half as fast or a hundred times slower.
    """
    if wanted != "auto":
        return wanted
    if mesh.device.type == "cuda":
        return "bfloat16" if has_bfloat16(mesh.device) else "float32"
    mesh.barrier()
    # in turn and the best of each, so that a neighbour who is busy for a moment does not decide it
    turns = [[measured_matmul_flops(mesh.device, t, 0.05) for t in (torch.bfloat16, torch.float32)] for _ in range(3)]
    best = torch.tensor(turns, dtype=torch.float64).amax(0)
    bfloat16, float32 = mesh.sum(best).tolist()
    return "bfloat16" if bfloat16 > float32 else "float32"


def memory_bytes(device: torch.device) -> int:
    """The most this process has held: on the device, or of the machine's memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class Meter:
    """Turns steps into the records of `metrics.jsonl`. Reads no device value: it gets floats."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._splits: dict[int, PhaseTimer] = {}  # by step, until they are read
        self._last = Moment(mesh.device)
        self._steps_since = 0
        self._smooth_seconds = 0.0
        self.device_name = device_name(mesh.device)
        self._why_no_mfu = why_no_flops(config.model, config.data.seq_len)
        self._flops_per_token = (
            0 if self._why_no_mfu else flops_per_token(config.model, config.data.seq_len, config.metrics.mfu_attention)
        )
        self._peak_flops, self._peak_source = self._find_peak()

    def start(self) -> None:
        """Time runs from here: after preparation, evaluation and saving, which are no steps."""
        self._last, self._steps_since = Moment(self._mesh.device), 0

    def phases(self, step: int) -> Phases:
        """The timer of `step`: a real one on the steps whose split is measured."""
        if step % self._config.metrics.split_every and step != 2:
            return no_phases
        timer = PhaseTimer(self._mesh.device)
        self._splits[step] = timer
        return timer

    def pass_over(self) -> None:
        """A step that has no record of its own."""
        self._steps_since += 1

    def record(
        self,
        step: int,
        over: Moment,
        tokens: int,
        step_tokens: int,
        loss: float,
        lr: float,
        norm: float | None,
        *,
        last: bool = False,
    ) -> dict[str, Any] | None:
        """
        The record of `step`, or None where none is due; of the run's last one it is.

        over: when it was, which may be long before this call; tokens: the run's total; step_tokens: this step's; no `norm`:
        an overflow.
        """
        self._steps_since += 1
        if step % self._config.metrics.every and step != 1 and not last:
            return None
        seconds = over.seconds_since(self._last) / self._steps_since
        self._last, self._steps_since = over, 0
        self._smooth_seconds = seconds if self._smooth_seconds == 0.0 else 0.8 * self._smooth_seconds + 0.2 * seconds
        rate = step_tokens / seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": self.mfu(rate),
            "memory_bytes": memory_bytes(self._mesh.device),
        }
        if timed := [each for each in self._splits if each <= step]:
            record["split_seconds"] = {"step": timed[-1], **self._splits[timed[-1]].seconds()}
            for each in timed:
                del self._splits[each]
        return record

    def mfu(self, tokens_per_second: float) -> float | None:
        """The share of the peak that the model's own arithmetic took, by the convention of `describe_mfu`."""
        if not self._peak_flops or not self._flops_per_token:
            return None
        return tokens_per_second * self._flops_per_token / self._peak_flops

    def left_seconds(self, steps: int) -> float:
        """A guess at the time that `steps` more will take."""
        return steps * self._smooth_seconds

    def describe_model(self) -> str:
        model = self._config.model
        return f"{model.preset or model.family}, {parameter_count(model):,} parameters"

    def describe_mfu(self) -> str:
        """The convention and the peak that MFU is measured against."""
        if self._why_no_mfu is not None:
            return f"MFU is not given: {self._why_no_mfu}"
        if self._peak_flops is None:
            return "MFU is not given: this device's peak is not in the table; set metrics.peak_tflops"
        peak = self._peak_flops / 1e12
        return f"MFU counts {self._config.metrics.mfu_attention} attention against {peak:.3g} TFLOP/s ({self._peak_source})"

    def _find_peak(self) -> tuple[float | None, str]:
        """FLOP/s of all processes together, and where the figure is from."""
        config, mesh = self._config, self._mesh
        if config.metrics.peak_tflops:
            return config.metrics.peak_tflops * 1e12 * mesh.world_size, "metrics.peak_tflops"
        name: Literal["bfloat16", "float32"] = (
            "float32" if config.train.dtype == "float32" else "bfloat16"
        )  # float16's too
        if mesh.device.type == "cuda" and (known := peak_flops(self.device_name, name)):
            return known * mesh.world_size, "data sheet, dense"
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.train.dtype, torch.float32)
        mesh.barrier()  # all at once, as they will train
        rate = torch.tensor(measured_matmul_flops(mesh.device, dtype), device=mesh.device, dtype=torch.float64)
        return float(mesh.sum(rate)), "a 2048^3 matrix product, measured here"


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)} a process"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({threads})"
    return f"{platform.processor() or 'CPU'} ({threads})"
