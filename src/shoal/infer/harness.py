"""
Runs tasks of lm-evaluation-harness (`lm_eval`) on a Hugging Face folder.

The harness and transformers do all the computation. A run is exported first, to a temporary folder.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final

import torch

from shoal.errors import DataError, ShoalError
from shoal.hub.find import find_model
from shoal.infer.asked import Tasks, Wanted
from shoal.infer.export import export_run
from shoal.infer.load import find_device, folder_dtype, run_dtype
from shoal.infer.target import find_checkpoint

BATCH: Final = {"cpu": 8, "cuda": 32}  # fixed: the harness's own batch-size search would affect results


def run_tasks(wanted: Wanted, tasks: Tasks) -> tuple[dict[str, dict[str, float]], str]:
    """
    Return (task -> metric -> value, the harness's own table).

    Raises `ShoalError` if the harness is not installed, `DataError` for an unknown task or unavailable task data.
    """
    lm_eval = _import()
    manager = _task_manager(lm_eval, tasks)
    device = find_device(wanted.device)
    with _folder(wanted) as folder, _quietly():
        try:
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": _dtype(wanted, folder, device)},
                tasks=list(tasks.names), task_manager=manager, num_fewshot=tasks.num_fewshot, limit=tasks.limit,
                batch_size=BATCH[device.type], device=str(device), bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
        except Exception as error:
            if _is_about_data(error):
                raise DataError(_no_data(tasks, error)) from error
            raise
    return _figures(results), str(lm_eval.utils.make_table(results))


def _import() -> Any:
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    try:
        import lm_eval
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise ShoalError(
            f'--tasks needs lm-evaluation-harness, which is not installed ({error}): pip install "shoal[eval]"'
        ) from error
    return lm_eval


def _task_manager(lm_eval: Any, tasks: Tasks) -> Any:
    """Return a manager of the harness's tasks and the user's own. Raises `DataError` for an unknown name."""
    manager = lm_eval.tasks.TaskManager(include_path=None if tasks.include_path is None else str(tasks.include_path))
    known = list(manager.all_tasks)
    for name in tasks.names:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            meant = f"; did you mean {' or '.join(close)}?" if close else "."
            raise DataError(
                f"the harness has no task {name}{meant} For your own tasks, set --include-path to their folder"
            )
    return manager


@contextmanager
def _folder(wanted: Wanted) -> Iterator[Path]:
    """Yield the model's folder, or a temporary export of the run."""
    if wanted.folder is not None:
        yield find_model(wanted.folder)
        return
    assert wanted.target is not None
    with tempfile.TemporaryDirectory(prefix="shoal-eval-") as parent:
        # the run's float32 weights; `_dtype` chooses the compute dtype
        yield export_run(wanted.runs, wanted.target, step=wanted.step, out=Path(parent) / "model", dtype="float32")


def _dtype(wanted: Wanted, folder: Path, device: torch.device) -> str:
    """Return the compute dtype; for a run, the dtype that `load_run` chooses, because its export is float32."""
    chosen = wanted.dtype
    if wanted.target is not None and chosen == "auto":
        run, _ = find_checkpoint(wanted.runs, wanted.target, wanted.step)
        chosen = run_dtype(run.load_config().train.dtype, chosen, device)
    return folder_dtype(str(folder), chosen, device)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the harness's progress bars unless stderr is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def _is_about_data(error: Exception) -> bool:
    """Return whether a data set could not be read; `datasets` and the hub's client raise their own errors."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, ConnectionError)) or module in (
        "datasets",
        "huggingface_hub",
        "requests",
        "httpx",
    )


def _no_data(tasks: Tasks, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"cannot read the data of {', '.join(tasks.names)}: {lines[0] if lines else type(error).__name__}; download it on a "
        "machine with network access and copy Hugging Face's cache (HF_HOME) here, or set --include-path to tasks with "
        "local files"
    )


def _figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return each task's metrics by short name: "acc,none" becomes "acc"."""
    plain = json.loads(json.dumps(results["results"], default=str))
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for task, metrics in plain.items()
    }
