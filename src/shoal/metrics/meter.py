"""Timers, throughput and MFU."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Final, Literal

import torch

from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.metrics.machine import device_name
from shoal.metrics.memory import peak_bytes
from shoal.metrics.moment import Moment
from shoal.plan.estimate import flops_per_token, parameter_count, why_no_flops
from shoal.plan.hardware import peak_flops
from shoal.run.phases import PHASES
from shoal.run.records import StepRecord

WARMUP: Final = 3  # records of a start that do not count for `Meter.usual_seconds`
FEWEST: Final = 5  # records from which it is known
RECENT: Final = 200  # newest records of which it is the median


class PhaseTimer:
    """Seconds of one step by phase. On CUDA, events measure them and are read long after the step, so the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: dict[str, float] = {}
        self._started: dict[str, torch.cuda.Event] = {}

    def enter(self, phase: str) -> None:
        """Start timing `phase`."""
        if self._cuda and phase != "data":  # loading data is work of the host
            self._started[phase] = _recorded()
        else:
            self._begun[phase] = time.perf_counter()

    def leave(self, phase: str) -> None:
        """Add the time since `enter`."""
        if phase in self._started:
            self._events.append((phase, self._started.pop(phase), _recorded()))
        else:
            self._seconds[phase] += time.perf_counter() - self._begun[phase]

    def seconds(self) -> dict[str, float]:
        """Return seconds by phase. On CUDA, wait for the step's last event, which has passed by the time a record is due."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return dict(self._seconds)


def _recorded() -> torch.cuda.Event:
    """Return a CUDA event recorded behind all work queued so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Meter:
    """Turns steps into records of `metrics.jsonl`. Losses and norms are passed as floats: it reads no tensor."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._splits: dict[int, PhaseTimer] = {}  # by step, until read
        self._timer: PhaseTimer | None = None  # of the current step, if its split is measured
        self._last = Moment(mesh.device)
        self._steps_since = 0
        self._smooth_seconds = 0.0
        self._recorded_steps = 0
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds of a step, of the newest records
        self.device_name = device_name(mesh.device)
        self._why_no_mfu = why_no_flops(config.model, config.data.seq_len)
        self.flops_per_token = (
            0 if self._why_no_mfu else flops_per_token(config.model, config.data.seq_len, config.metrics.mfu_attention)
        )
        self.peak_flops, self._peak_source = self._find_peak()

    def start(self) -> None:
        """Restart the clock of steps, after preparation, evaluation or saving."""
        self._last, self._steps_since = Moment(self._mesh.device), 0

    def splits(self, step: int) -> bool:
        """Return whether the time split of `step` is measured."""
        return step % self._config.metrics.split_every == 0 or step == 2

    def begin(self, step: int) -> None:
        """Begin `step`; time its phases if a time split is due."""
        self._timer = None
        if self.splits(step):
            self._timer = self._splits[step] = PhaseTimer(self._mesh.device)

    def enter(self, phase: str) -> None:
        """Start timing `phase`, if this step's time split is measured."""
        if self._timer is not None:
            self._timer.enter(phase)

    def leave(self, phase: str) -> None:
        """Stop timing `phase`, if this step's time split is measured."""
        if self._timer is not None:
            self._timer.leave(phase)

    def pass_over(self) -> None:
        """Count a step that gets no record, so that the next record averages over it."""
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
        source_loss: Mapping[str, float] | None = None,
        spike_score: float | None = None,
        last: bool = False,
    ) -> StepRecord | None:
        """
        Return the record of `step`, or None if none is due; the run's first and last steps always have one.

        over: the end of the step, perhaps long before this call. tokens: number of tokens trained on so far. step_tokens:
        number of tokens in this step. norm: the gradient norm; None after an overflow. source_loss: loss by source of a
        blend. spike_score: None if unknown. last: whether `step` is the last.
        """
        self._steps_since += 1
        if step % self._config.metrics.every and step != 1 and not last:
            return None
        seconds = over.seconds_since(self._last) / self._steps_since
        self._last, self._steps_since = over, 0
        self._smooth_seconds = seconds if self._smooth_seconds == 0.0 else 0.8 * self._smooth_seconds + 0.2 * seconds
        self._recorded_steps += 1
        if self._recorded_steps > WARMUP:
            self._recent.append(seconds)
        rate = step_tokens / seconds
        return StepRecord(
            step=step,
            tokens=tokens,
            time=round(time.time(), 3),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens_per_second=rate,
            step_seconds=seconds,
            mfu=self.mfu(rate),
            memory_bytes=peak_bytes(self._mesh.device),
            source_loss=source_loss,
            spike_score=spike_score,
            split_seconds=self._take_split(step),
        )

    def _take_split(self, step: int) -> dict[str, float] | None:
        """Return the newest time split up to `step`, and drop it and all older ones."""
        timed = [each for each in self._splits if each <= step]
        splits = {each: self._splits.pop(each) for each in timed}
        return {"step": timed[-1], **splits[timed[-1]].seconds()} if timed else None

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model's FLOP/s as a share of the peak; None if either is unknown. Convention: `describe_mfu`."""
        if not self.peak_flops or not self.flops_per_token:
            return None
        return self.model_flops(tokens_per_second) / self.peak_flops

    def model_flops(self, tokens_per_second: float) -> float:
        """Return FLOP/s of the model's own arithmetic, by the convention of MFU; 0 if unknown."""
        return tokens_per_second * self.flops_per_token

    def usual_seconds(self) -> float | None:
        """Return the median time of a step, of the newest records; None if there are too few after the first ones."""
        return statistics.median(self._recent) if len(self._recent) >= FEWEST else None

    def left_seconds(self, steps: int) -> float:
        """Estimate the seconds that `steps` more steps take."""
        return steps * self._smooth_seconds

    def describe_model(self) -> str:
        """Return the preset or family and the number of parameters."""
        model = self._config.model
        return f"{model.preset or model.family}, {parameter_count(model):,} parameters"

    def describe_mfu(self) -> str:
        """Return a line with MFU's convention and peak, or why MFU is unknown; empty on a CPU without `metrics.peak_tflops`."""
        if self.peak_flops is None and self._mesh.device.type != "cuda":
            return ""
        if self._why_no_mfu is not None:
            return f"MFU is not reported: {self._why_no_mfu}"
        if self.peak_flops is None:
            return f"MFU is not reported: the peak of {self.device_name} is unknown; set metrics.peak_tflops"
        peak = self.peak_flops / 1e12
        return f"MFU counts {self._config.metrics.mfu_attention} attention against {peak:.3g} TFLOP/s ({self._peak_source})"

    def _find_peak(self) -> tuple[float | None, str]:
        """
        Return peak FLOP/s of all processes together, and the source of the figure.

        None for a CPU and for an unknown GPU: a rate measured here would be below the true peak, and MFU could exceed 1.
        """
        config, mesh = self._config, self._mesh
        if config.metrics.peak_tflops:
            return config.metrics.peak_tflops * 1e12 * mesh.world_size, "metrics.peak_tflops"
        if mesh.device.type != "cuda":
            return None, ""
        # Float16 has bfloat16's peak
        dtype: Literal["bfloat16", "float32"] = "float32" if config.train.dtype == "float32" else "bfloat16"
        known = peak_flops(self.device_name, dtype)
        return known and known * mesh.world_size, "data sheet, dense"
