"""`shoal eval` and `shoal generate`: a model in use, on one process."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.data.open import open_data
from shoal.data.yardstick import Measuring, Yardstick
from shoal.errors import CheckpointError, DataError, GenerateError, ShoalError, spelled
from shoal.infer.chat import Chat, chat_in_terminal
from shoal.infer.generate import Sampling, check_options, check_text, generate
from shoal.infer.harness import Tasks, run_tasks
from shoal.infer.load import LoadedModel, LoadedRun, Wanted, load_run
from shoal.infer.score import choose_windows, perplexity, score
from shoal.infer.stream import TextStream, continuation
from shoal.launch.place import Place
from shoal.metrics.console import Console
from shoal.parallel.mesh import Mesh
from shoal.train.evaluate import evaluate, model_losses

PROMPT_TOKENS, CHAT_TOKENS = 100, 512  # new ones at most, where nothing is said
FLAGS = {"max_new_tokens": "--tokens", "temperature": "--temperature", "top_k": "--top-k", "top_p": "--top-p"}
LARGE = 1e6  # from there on a number is shown by its exponent: a perplexity may have hundreds of digits


@dataclass(frozen=True)
class TextOptions:
    """A file to score, and its windows (None: see `score.choose_windows`)."""

    file: Path
    context: int | None = None
    stride: int | None = None


def evaluate_model(wanted: Wanted, *, text: TextOptions | None, tasks: Tasks | None, as_json: bool) -> None:
    """Print how good a model is on a text, on tasks of the harness, or, for a run, on its own held-out text."""
    console = Console(speaks=not as_json)
    if text is None and tasks is None:
        if wanted.folder is not None:
            raise ShoalError(f"{wanted.folder} has no held-out text of its own: set --text FILE, or --tasks NAME,...")
        record = _held_out(wanted, console)
    else:
        record = _of_text(wanted, text, console) if text else {}
        if tasks is not None:
            results, table = run_tasks(wanted, tasks)
            record["tasks"] = results
            console.say(table)
    if as_json:
        print(json.dumps(_without_nan(record), allow_nan=False))


def _held_out(wanted: Wanted, console: Console) -> dict[str, Any]:
    """The loss on all held-out text, and what gzip and xz make of the same text."""
    assert wanted.target is not None
    run = load_run(wanted.runs, wanted.target, step=wanted.step, device=wanted.device, dtype=wanted.dtype)
    prepared = open_data(run.config.data, console)
    if prepared.data_id != run.data_id:
        raise CheckpointError(
            f"{run.name} was trained on other tokens than {prepared.folder} holds now; its held-out text is gone"
        )
    text_bytes = prepared.counts["val"].text_bytes
    with Measuring(prepared, idle=False) as measuring:
        result = evaluate(model_losses(run.model, run.device), Mesh(Place(), run.device), prepared, run.config, None)
        figures = {
            "nats_per_token": result["val_loss"],
            "perplexity": perplexity(result["val_loss"]),
            "bits_per_byte": result["val_bits_per_byte"],
        }
        console.say(f"{run.name} at step {run.step}, on {text_bytes:,} bytes of held-out text:")
        _say_figures(console, figures)
        found = measuring.wait(
            math.inf, waits=lambda: console.note("waiting for gzip and xz to read the text, once for this data")
        )
    if not isinstance(found, Yardstick):
        console.warn(f"no comparison with gzip and xz: {found}")
        return {"step": run.step, **figures}
    console.say(found.compared(figures["bits_per_byte"], text_bytes))
    theirs = {f"{n}_{k}_bits_per_byte": v for n, bits in found.bits_per_byte.items() for k, v in bits.items()}
    return {"step": run.step, **figures, **theirs}


def _of_text(wanted: Wanted, options: TextOptions, console: Console) -> dict[str, Any]:
    """The loss on the text of a file, in windows."""
    text, text_bytes = _read_text(options.file)
    model = _load(wanted)
    context, stride = choose_windows(model.model.shape.max_seq_len, options.context, options.stride)
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode_prompt(text)
    if tokenizer.bos_id is None:  # what stands between documents, so that the text's first token is foretold too
        ids = [tokenizer.eot_id, *ids]
    with Console(speaks=console.is_terminal).progress("scoring") as progress:
        result = score(
            model.model, ids, context=context, stride=stride,
            progress=lambda done, total: progress(f"{done:,} of {total:,} tokens", done, total),
        )  # fmt: skip
    figures = {
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte(text_bytes),
    }
    counts = {
        "tokens": result.tokens, "bytes": text_bytes, "windows": result.windows, "context": context, "stride": stride,
    }  # fmt: skip
    console.say(
        f"{_called(model)}, on {text_bytes:,} bytes ({result.tokens:,} tokens) of {options.file}, in "
        f"{result.windows:,} windows of {context:,} tokens, each {stride:,} on:"
    )
    _say_figures(console, figures)
    step = {"step": model.step} if isinstance(model, LoadedRun) else {}
    return {**step, **figures, **counts, "dtype": str(model.model.compute_dtype).removeprefix("torch.")}


def _load(wanted: Wanted) -> LoadedModel:
    """What there is to tell of it goes to standard error: what a model says, and JSON, stand alone on the other."""
    model = wanted.load()
    for note in model.notes:
        Console(on_stderr=True).warn(note)
    return model


def _called(model: LoadedModel) -> str:
    return f"{model.name} at step {model.step}" if isinstance(model, LoadedRun) else model.name


def _say_figures(console: Console, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        shown = f"{value:.4f}" if value < LARGE else f"{value:.4g}"
        console.say(f"  {name.replace('_', ' '):24} {shown}")


def _without_nan(value: Any) -> Any:
    """What JSON has no number for is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_text(file: Path) -> tuple[str, int]:
    """(the text, its bytes)"""
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; set --text to a file of text") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text: {error}; set --text to a file that is") from error
    if not text:
        raise DataError(f"{file} is empty; set --text to a file with something in it")
    return text, len(content)


def generate_text(wanted: Wanted, *, prompts: Sequence[str], max_new_tokens: int | None, sampling: Sampling) -> None:
    """Print each prompt and what the model makes of it; a single one as it comes."""
    if any(not prompt for prompt in prompts):
        raise GenerateError("an empty --prompt: give the text to go on from")
    for prompt in prompts:
        check_text(prompt, "--prompt")
    limit = PROMPT_TOKENS if max_new_tokens is None else max_new_tokens
    with spelled(FLAGS):
        check_options(sampling, limit)
    model = _load(wanted)
    tokenizer = model.need_tokenizer()
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    alone = TextStream(tokenizer, ids[0]) if len(prompts) == 1 else None
    shown = False

    def show(_row: int, token: int) -> None:
        nonlocal shown
        assert alone is not None
        print(alone.push(token) if shown else prompts[0] + alone.push(token), end="", flush=True)
        shown = True

    with spelled(FLAGS):
        outputs = generate(
            model.model, ids, max_new_tokens=limit,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=sampling.seed,
            eot_id=model.end_ids, known_ids=tokenizer.vocab_size, on_token=show if alone else None,
        )  # fmt: skip
    if alone is not None:
        print(alone.close() if shown else prompts[0])
        return
    for number, (prompt, prompt_ids, output) in enumerate(zip(prompts, ids, outputs, strict=True)):
        if number:
            print("-" * 40)
        print(prompt + continuation(tokenizer, prompt_ids, output))


def talk(wanted: Wanted, *, system: str | None, max_new_tokens: int | None, sampling: Sampling) -> None:
    """A conversation: lines of standard input, and what the model says to each."""
    limit = CHAT_TOKENS if max_new_tokens is None else max_new_tokens
    with spelled(FLAGS):
        check_options(sampling, limit)  # at once, and not at each line
    check_text(system or "", "--system")
    model = _load(wanted)
    chat = Chat.of(model, system=system, max_new_tokens=limit, sampling=sampling)
    chat_in_terminal(chat, sys.stdin, sys.stdout)
