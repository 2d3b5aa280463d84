"""The end of a run: its last checkpoint and, where it came to its end, a sample, a yardstick, and what to do next."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from shoal.checkpoint.load import load_model
from shoal.checkpoint.saved import Saved, listed
from shoal.checkpoint.store import Outcome
from shoal.config import Config, Launch
from shoal.data.prepare import Prepared
from shoal.data.yardstick import Yardstick
from shoal.errors import CheckpointError
from shoal.infer.generate import generate
from shoal.models.build import build_model
from shoal.models.family import LanguageModel

YARDSTICK_SECONDS = 120.0

if TYPE_CHECKING:
    from shoal.train.loop import Run


def finish(run: Run, stopped: bool) -> None:
    """Save; say how to go on, or how well it went."""
    clock = run.records.clock
    if stopped:
        saved = _save(run)
        run.records.event("stopped", step=run.state.step)
        where = f"saved at step {run.state.step}" if saved.ok else "NOT saved"
        run.console.say(f"stopped: {where} of {run.total_steps}. The same command again goes on from there.", "bold")
        return
    with clock.spend("evaluation"):
        run.evaluate(None)
    saved = _save(run)
    run.heartbeat.outside("end")
    run.records.event("finished", **run.val)
    if run.mesh.is_first:
        _say_how_it_went(run, _whole_model(run))
        run.console.note(run.records.goodput())
    run.mesh.barrier()
    if not saved.ok:
        raise CheckpointError(
            f"all {run.total_steps} steps are taken, and the last checkpoint could not be written: "
            f"{run.saving.folder} has {_newest(run)}. Make room there; the same command goes on from it"
        )


def _save(run: Run) -> Outcome:
    run.heartbeat.outside("save")
    with run.records.clock.spend("checkpoint"):
        return run.saving.finish(run.state, run.val_loss())


def _newest(run: Run) -> str:
    saved = listed(run.saving.folder)
    return f"one of step {saved[-1].step}" if saved else "none"


def _whole_model(run: Run) -> LanguageModel | None:
    """The model on one device, or None where no process has it and it would be large."""
    if not run.mesh.layout.sharded and run.mesh.layout.cp == 1:
        return run.runnable.parts[0]
    return _read_whole(run.config, listed(run.saving.folder)[-1:], run.runnable.shapes)


def _say_how_it_went(run: Run, model: LanguageModel | None) -> None:
    """Print (and keep under `samples/`) what the model writes; compare its bits per byte with gzip and xz."""
    config, folder, prepared, console = run.config, run.folder, run.prepared, run.console
    if config.train.sample_prompt and model is None:
        console.note("no sample: the model is cut over processes and large; shoal generate writes one")
    elif config.train.sample_prompt and model is not None:
        text = _sample(config, prepared, model)
        with contextlib.suppress(OSError):  # it is printed too
            folder.samples.mkdir(exist_ok=True)
            (folder.samples / "end.txt").write_text(text, encoding="utf-8")
        console.say()
        console.say("a sample:", "bold")
        console.say(text)
    console.say()
    console.say(_yardstick(run), "bold")
    console.say()
    console.say("next:")
    shoal, name = _command(), shlex.quote(_called(config))
    prompt = shlex.quote(config.train.sample_prompt or "The ")
    console.say(f"  {shoal} generate {name} --prompt {prompt} --temperature 0.8")
    console.say(f"  {shoal} eval {name}")
    console.say(f"  {shoal} bench speed")


def _called(config: Config) -> str:
    """What the other verbs know this run by: its name, or its folder where runs are kept elsewhere."""
    name = config.launch.name or "run"
    return name if config.launch.runs == Launch().runs else str(Path(config.launch.runs) / name)


def _command() -> str:
    """How a person here can start shoal: by its name, or by its path where the environment is not activated."""
    script = Path(sys.executable).with_name("shoal")
    if shutil.which("shoal") or not script.exists():
        return "shoal"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def _sample(config: Config, prepared: Prepared, model: LanguageModel) -> str:
    tokenizer = prepared.tokenizer
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


def _yardstick(run: Run) -> str:
    """How the model's bits per byte on held-out text compare with those of gzip and xz, which have read the training text too."""
    assert run.measuring is not None  # of the first rank

    def go_on() -> bool:
        run.heartbeat.outside("end")
        return not run.stop

    seconds = min(YARDSTICK_SECONDS, run.config.launch.timeout_seconds / 4)  # the others wait in a barrier
    found = run.measuring.wait(
        seconds,
        go_on,
        lambda: run.console.note(
            f"waiting for gzip and xz to read the text, once for this data (at most {seconds:.0f} s)"
        ),
    )
    ours, text_bytes = run.val["val_bits_per_byte"], run.prepared.counts["val"].text_bytes
    if isinstance(found, Yardstick):
        return found.compared(ours, text_bytes)
    return (
        f"held-out text ({text_bytes:,} bytes), bits per byte: this model {ours:.3f}; no comparison with gzip and xz ({found}): "
        "shoal eval makes it"
    )


def _read_whole(config: Config, saved: list[Saved], shapes: Mapping[str, torch.Size]) -> LanguageModel | None:
    """A sharded run's model, read from its last checkpoint to the CPU, if it takes no more than a tenth of the memory."""
    if not saved or 4 * sum(s.numel() for s in shapes.values()) > psutil.virtual_memory().available / 10:
        return None
    model = build_model(config.model, compute_dtype=torch.float32)
    load_model(saved[-1], model, torch.device("cpu"))
    return model
