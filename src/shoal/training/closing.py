"""The end of a run: its last checkpoint and, after the last step, a sample, a comparison with gzip and xz, the next commands."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import psutil
import torch

from shoal.checkpoint.restore import load_model
from shoal.checkpoint.saved import Saved, listed
from shoal.checkpoint.store import Outcome
from shoal.config.options import Config
from shoal.data.dataset import Dataset
from shoal.data.yardstick import Yardstick
from shoal.errors import CheckpointError
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.models.generate import generate
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.records import Evaluation
from shoal.training.last_words import say_sample, say_what_next, what_it_took
from shoal.training.prediction import keep_speed
from shoal.training.run import Run

YARDSTICK_SECONDS = 120.0  # longest wait for gzip and xz


def finish(run: Run, stopped: bool) -> None:
    """Save; then say how to resume a run that was stopped, or how good the model is."""
    if stopped:
        _finish_early(run)
    else:
        _finish_whole(run)
    if run.mesh.is_first:
        keep_speed(run)


def _finish_early(run: Run) -> None:
    """Save, and say from where the same command resumes."""
    saved = _save(run)
    run.files.event("stopped", step=run.state.step)
    if run.mesh.is_first:
        run.console.note(run.files.goodput())
        took = what_it_took(run.folder, run.state.step, run.state.tokens)
        run.console.say(f"{run.folder.path}: {took}")
    step = run.state.step if saved.ok else _newest(run)
    where = f"{'' if saved.ok else 'NOT '}saved at step {run.state.step} of {run.total_steps}"
    again = f"resumes from {'there' if saved.ok else f'step {step}'}" if step else "starts from the beginning"
    run.console.say(f"stopped: {where}. The same command again {again}.", "bold")


def _finish_whole(run: Run) -> None:
    """Evaluate, save, sample, compare with gzip and xz. Raises `CheckpointError` if the last checkpoint was not written."""
    with run.files.clock.spend("evaluation"):
        run.evaluate(None)
    saved = _save(run)
    run.watch.heartbeat.outside("writing a sample")
    if run.mesh.is_first:
        _say_results(run, saved)
    run.watch.heartbeat.outside("end")
    run.mesh.barrier()
    if not saved.ok:
        newest = _newest(run)
        has = f"has one of step {newest}" if newest else "has none"
        again = f"resumes from step {newest}" if newest else "starts from the beginning"
        raise CheckpointError(
            f"all {run.total_steps} steps are taken, but the last checkpoint could not be written: "
            f"{run.saving.folder} {has}. Free some space there; the same command {again}"
        )


def _say_results(run: Run, saved: Outcome) -> None:
    """Print a sample, the comparison with gzip and xz, where the time went, and the next commands. For the first rank."""
    assert run.evaluation is not None
    _say_sample(run.config, run.folder, run.dataset, _whole_model(run), run.console)
    compared = _yardstick(run, run.evaluation)
    run.watch.heartbeat.outside("end")
    run.console.say()
    run.console.say(compared, "bold")
    measured = {
        name: value for name, value in run.evaluation.as_line().items() if name != "time"
    }  # the event has its own
    run.files.event("finished", **measured, compared=compared)
    run.console.note(run.files.goodput())
    if saved.ok:
        say_what_next(run.config, run.folder, run.evaluation, run.console)


def _save(run: Run) -> Outcome:
    """Save to disk, and wait until the checkpoint is complete."""
    run.watch.heartbeat.outside("save")
    run.keep_losses()
    with run.files.clock.spend("checkpoint"):
        return run.saving.finish(run.state, run.val_loss())


def _newest(run: Run) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    saved = listed(run.saving.folder)
    return saved[-1].step if saved else 0


def _whole_model(run: Run) -> LanguageModel | None:
    """Return the whole model on one device; None if it is sharded, and too large to read back or not saved."""
    if not run.mesh.layout.sharded and run.mesh.layout.cp == 1:
        return run.runnable.parts[0]
    return _read_whole(run.config, listed(run.saving.folder)[-1:], run.runnable.shapes)


def _say_sample(
    config: Config, folder: RunFolder, dataset: Dataset, model: LanguageModel | None, console: Console
) -> None:
    """Print a sample of the model's text, and keep it under `samples/`."""
    if config.train.sample_prompt and model is None:
        console.note("no sample: the model is sharded and too large for one process; shoal generate writes one")
    elif config.train.sample_prompt and model is not None:
        text = _sample(config, dataset, model)
        with contextlib.suppress(OSError):  # it is printed anyway
            folder.samples.mkdir(exist_ok=True)
            (folder.samples / "end.txt").write_text(text, encoding="utf-8")
        say_sample(text, console)


def _sample(config: Config, dataset: Dataset, model: LanguageModel) -> str:
    """Return `train.sample_prompt` with the model's continuation."""
    tokenizer = dataset.tokenizer
    prompt = tokenizer.encode_prompt(config.train.sample_prompt)
    new = min(config.train.sample_tokens, config.model.max_seq_len - len(prompt))
    model.eval()
    [ids] = generate(
        model,
        [prompt],
        max_new_tokens=new,
        temperature=0.7,
        top_p=0.95,
        seed=config.train.seed,
        eot_id=tokenizer.eot_id,
        known_ids=tokenizer.vocab_size,
    )
    model.train()
    return config.train.sample_prompt + tokenizer.decode(ids)


def _yardstick(run: Run, evaluation: Evaluation) -> str:
    """Compare the model's bits per byte on held-out text with those of gzip and xz, primed with training text."""
    assert run.measuring is not None  # on the first rank

    def go_on() -> bool:
        run.watch.heartbeat.outside("comparing with gzip and xz")
        return not run.stopping.stop

    seconds = min(YARDSTICK_SECONDS, run.config.launch.timeout_seconds / 4)  # the other ranks wait in a barrier
    ours, counts = evaluation.val_bits_per_byte, run.dataset.counts["val"]
    text_bytes = counts.text_bytes
    if run.dataset.single is None:
        return (
            f"held-out text ({counts.learned_bytes:,} bytes learned, of all sources), bits per byte: this model {ours:.3f}; "
            "shoal eval compares each source with gzip and xz"
        )
    if counts.learned_bytes < text_bytes:
        return f"held-out conversations ({counts.learned_bytes:,} bytes learned), bits per byte: this model {ours:.3f}"
    found = run.measuring.wait(seconds, go_on)
    if isinstance(found, Yardstick):
        return found.compared(ours, text_bytes)
    return (
        f"held-out text ({text_bytes:,} bytes), bits per byte: this model {ours:.3f}; no comparison with gzip and xz ({found}); "
        "shoal eval computes it"
    )


def _read_whole(config: Config, saved: list[Saved], shapes: Mapping[str, torch.Size]) -> LanguageModel | None:
    """Read a sharded model from its last checkpoint to the CPU, if that takes at most a tenth of the available memory."""
    if not saved or 4 * sum(s.numel() for s in shapes.values()) > psutil.virtual_memory().available / 10:
        return None
    model = build_model(config.model, compute_dtype=torch.float32)
    load_model(saved[-1], model, torch.device("cpu"))
    return model
