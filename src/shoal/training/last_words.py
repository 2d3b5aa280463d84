"""The last lines of a run: its validation loss, its time and tokens, the next commands. Repeated for a finished run. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from shoal.checkpoint.saved import damage, listed, read_state
from shoal.config.data_options import Source
from shoal.config.options import Config
from shoal.config.run_options import Launch
from shoal.data.dataset import Dataset
from shoal.plan.length import count_steps, length_of
from shoal.run.console import Console, duration
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import account
from shoal.run.records import Evaluation
from shoal.system.output import on_one_line


@dataclass(frozen=True)
class Finished:
    """The result of a run that has taken all its steps."""

    evaluation: Evaluation
    compared: str  # the comparison with gzip and xz, in a line


def finished(config: Config, folder: RunFolder, dataset: Dataset) -> Finished | None:
    """Return the result of a run whose steps are all taken, from `events.jsonl`; None if steps are left."""
    rows = dataset.rows("train")
    total_steps = count_steps(config.train, config.data.seq_len, len(rows))
    saved = listed(folder.checkpoints)[-1:]
    ended = [each for each in read_json_lines(folder.events_file) if each["event"] == "finished"][-1:]
    if not (saved and ended) or not ended[0].get("step") == saved[0].step >= total_steps:
        return None
    # The run itself reports a damaged checkpoint, or one that was trained on other tokens.
    if damage(saved[0].folder) or read_state(saved[0].folder)["data_id"] != dataset.data_id:
        return None
    return Finished(Evaluation.of_line(ended[0]), ended[0].get("compared") or "")


def say_result_again(config: Config, folder: RunFolder, result: Finished, console: Console) -> None:
    """Print the result of a finished run. Write nothing."""
    console.say(f"{on_one_line(folder.path)} is finished: {already_taken(config, result.evaluation.step)}", "bold")
    say_held_out(result.evaluation, console)
    sample = folder.samples / "end.txt"
    if config.train.sample_prompt and sample.is_file():
        say_sample(sample.read_text(encoding="utf-8", errors="replace"), console)
    if result.compared:
        console.say()
        console.say(result.compared, "bold")
    say_what_next(config, folder, result.evaluation, console)


def already_taken(config: Config, steps: int) -> str:
    """Say that all steps are taken, and how to train on."""
    length = length_of(config.train)[0]
    return f"all {steps} steps are taken; a larger train.{length} continues the run, another --name starts a new one"


def say_held_out(val: Evaluation, console: Console) -> None:
    """Print the validation loss."""
    skipped = f" ({_rows(val.val_skipped_rows)} cannot be read)" if val.val_skipped_rows else ""
    console.say(
        f"step {val.step}: held-out loss {val.val_loss:.4f} nats/token, {val.val_bits_per_byte:.4f} bits/byte{skipped}",
        "bold",
    )


def _rows(count: int) -> str:
    return f"{count:,} held-out row{'s' * (count != 1)}"


def say_sample(text: str, console: Console) -> None:
    """Print the model's text."""
    console.say()
    console.say("a sample:", "bold")
    console.say(text)


def say_what_next(config: Config, folder: RunFolder, val: Evaluation, console: Console) -> None:
    """Print the run's folder, its time and tokens, and commands that use it."""
    shoal, run = _command(), shlex.quote(_called(config))
    prompt = shlex.quote(config.train.sample_prompt or "The ")
    console.say()
    console.say(f"{on_one_line(folder.path)}: {what_it_took(folder, val.step, val.tokens)}", "bold")
    console.say("next:")
    sources: list[Source] = [config.data, *(config.data.sources or {}).values()]
    how = "--chat" if any(source.format != "text" for source in sources) else f"--prompt {prompt}"
    console.say(f"  {shoal} generate {run} {how}")
    console.say(f"  {shoal} eval {run}")


def what_it_took(folder: RunFolder, steps: int, tokens: int) -> str:
    """Return "600 steps, 1,228,800 tokens in 3m20s (9,800 tokens/s in steps)", without the time between restarts."""
    text = f"{steps:,} step{'s' * (steps != 1)}, {tokens:,} tokens"
    try:
        spent = account(folder.time_file).spent
    except OSError:  # the disk is full, or an older shoal trained it
        return text
    in_steps = (spent["step"] + spent["compile"] + spent["data"]) / 1e6
    rate = f" ({tokens / in_steps:,.0f} tokens/s in steps)" if in_steps else ""
    return f"{text} in {duration((sum(spent.values()) - spent['idle']) / 1e6)}{rate}"


def _called(config: Config) -> str:
    """Return how other commands refer to this run: by name, or by folder if `launch.runs` is set."""
    name = config.launch.name or "run"
    return name if config.launch.runs == Launch().runs else str(Path(config.launch.runs) / name)


def _command() -> str:
    """Return the command that starts shoal here: its name, or its path if the environment is not activated."""
    script = Path(sys.executable).with_name("shoal")
    if shutil.which("shoal") or not script.exists():
        return "shoal"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
