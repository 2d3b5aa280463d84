"""The last lines of a run: how good it is, what it took, what to do next; for a finished one again, from its record. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.checkpoint.saved import damage, listed, read_state
from shoal.config.options import Config
from shoal.config.run_options import Launch
from shoal.data.prepare import Prepared
from shoal.plan.length import count_steps, length_of
from shoal.run.console import Console, duration
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import account
from shoal.system.output import on_one_line


def finished(config: Config, folder: RunFolder, prepared: Prepared) -> dict[str, Any] | None:
    """What `events.jsonl` says of the end of a run whose steps are all taken; None where there are more to take."""
    rows = prepared.split("train", seq_len=config.data.seq_len, document_mask=config.data.document_mask)
    total_steps = count_steps(config.train, config.data.seq_len, len(rows))
    saved = listed(folder.checkpoints)[-1:]
    ended = [each for each in read_json_lines(folder.events_file) if each["event"] == "finished"][-1:]
    if not (saved and ended) or not ended[0].get("step") == saved[0].step >= total_steps:
        return None
    # what is damaged, or of other tokens, is for the run itself to tell of
    if damage(saved[0].folder) or read_state(saved[0].folder)["data_id"] != prepared.data_id:
        return None
    return ended[0]


def say_result_again(config: Config, folder: RunFolder, result: Mapping[str, Any], console: Console) -> None:
    """Of a run that is `finished`; nothing is written."""
    console.say(f"{on_one_line(folder.path)} is finished: {already_taken(config, result['step'])}", "bold")
    say_held_out(result, console)
    sample = folder.samples / "end.txt"
    if config.train.sample_prompt and sample.is_file():
        say_sample(sample.read_text(encoding="utf-8", errors="replace"), console)
    if result.get("compared"):
        console.say()
        console.say(result["compared"], "bold")
    say_what_next(config, folder, result, console)


def already_taken(config: Config, steps: int) -> str:
    """Of a run that has come to its end."""
    length = length_of(config.train)[0]
    return f"all {steps} steps are taken; a larger train.{length} goes on with it, another --name starts anew"


def say_held_out(val: Mapping[str, Any], console: Console) -> None:
    """The loss on held-out text."""
    console.say(
        f"step {val['step']}: held-out loss {val['val_loss']:.4f} nats/token, {val['val_bits_per_byte']:.4f} bits/byte",
        "bold",
    )


def say_sample(text: str, console: Console) -> None:
    """What the model writes."""
    console.say()
    console.say("a sample:", "bold")
    console.say(text)


def say_what_next(config: Config, folder: RunFolder, result: Mapping[str, Any], console: Console) -> None:
    """The run's folder, what it took, and the commands that use it."""
    shoal, run = _command(), shlex.quote(_called(config))
    prompt = shlex.quote(config.train.sample_prompt or "The ")
    console.say()
    console.say(f"{on_one_line(folder.path)}: {what_it_took(folder, result['step'], result['tokens'])}", "bold")
    console.say("next:")
    console.say(f"  {shoal} generate {run} --prompt {prompt}")
    console.say(f"  {shoal} eval {run}")


def what_it_took(folder: RunFolder, steps: int, tokens: int) -> str:
    """ "600 steps, 1,228,800 tokens in 3m20s (9,800 tokens/s in steps)": of all lives, without the time between them."""
    text = f"{steps:,} step{'s' * (steps != 1)}, {tokens:,} tokens"
    try:
        spent = account(folder.time_file).spent
    except OSError:  # its disk is full, or an older shoal trained it
        return text
    in_steps = (spent["step"] + spent["compile"] + spent["data"]) / 1e6
    rate = f" ({tokens / in_steps:,.0f} tokens/s in steps)" if in_steps else ""
    return f"{text} in {duration((sum(spent.values()) - spent['idle']) / 1e6)}{rate}"


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
