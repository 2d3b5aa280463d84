"""The time of a run's step as `shoal plan` predicts it: said before the first step, compared and kept after the last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch

from shoal.metrics.memory import peak_bytes
from shoal.plan.machine import machine_of
from shoal.plan.speed.measured import Prediction, keep, predict
from shoal.run.console import duration
from shoal.training.run import Run


def say_prediction(run: Run) -> None:
    """Say how long a step will take, if this machine was calibrated or earlier runs were measured on it. For the first rank."""
    with _harmless(run):
        found = _predicted(run)
        if found is not None and _is_informed(found):
            left = run.total_steps - run.state.step
            all_of_it = duration(left * found.seconds.middle)
            run.console.note(
                f"predicted: {_seconds(found)}; {all_of_it} for {left:,} steps, without evaluations and saves"
            )


def keep_speed(run: Run) -> None:
    """Compare the run's usual step with its prediction, and keep both for `shoal plan`. For the first rank."""
    seconds = run.watch.meter.usual_seconds()
    if seconds is None or run.watch.faults.planned:
        return
    with _harmless(run):
        found = _predicted(run)
        if found is None:
            return
        if _is_informed(found):
            run.console.note(f"a step took {seconds:.3g} s (median); predicted: {_seconds(found)}")
        # of a CPU's process, the bytes of tensors are not known apart from those of Python and torch
        keep(found, seconds, peak_bytes(run.mesh.device) if found.machine.cuda else None)


def _predicted(run: Run) -> Prediction | None:
    place, cuda = run.mesh.place, run.mesh.device.type == "cuda"
    machine = machine_of(
        torch.cuda.get_device_name() if cuda else "", place.local_world_size, place.world_size // place.local_world_size,
        psutil.virtual_memory().total // place.local_world_size, cuda=cuda,
    )  # fmt: skip
    return None if machine is None else predict(run.config, run.mesh.layout, machine)


def _is_informed(found: Prediction) -> bool:
    """Return whether anything was ever measured on such devices."""
    return found.calibrated or found.seen > 0


def _seconds(found: Prediction) -> str:
    return f"{found.seconds.middle:.3g} s a step ({found.seconds.low:.3g} to {found.seconds.high:.3g} with 90% probability)"


@contextlib.contextmanager
def _harmless(run: Run) -> Iterator[None]:
    """Let no failure of a prediction end a run; unreadable folders do not count as one."""
    try:
        yield
    except OSError:
        pass
    except Exception as error:
        run.console.warn(f"this run's speed cannot be compared with shoal plan: {type(error).__name__}: {error}")
