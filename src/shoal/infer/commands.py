"""`shoal eval` and `shoal generate`, which use a model in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.data.dataset import Dataset, open_past
from shoal.data.order.held_out import HeldOutQuarantine, in_words
from shoal.data.tokens.tokenize import Tokenizer
from shoal.data.tokens.tokenizer_ends import special_tokens
from shoal.data.yardstick import Measuring, Yardstick
from shoal.errors import CheckpointError, spelled
from shoal.infer.asked import Tasks, Text, Wanted
from shoal.infer.chat import Chat
from shoal.infer.harness import run_tasks
from shoal.infer.load import LoadedModel, LoadedRun, load, load_run
from shoal.infer.score import choose_windows, perplexity, score
from shoal.infer.stream import TextStream, continuation
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.models.sampling import FLAGS, Sampling
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.output import on_one_line
from shoal.training.evaluate import evaluate, model_losses

LARGE = 1e6  # show larger numbers with an exponent: a perplexity may have hundreds of digits


def evaluate_model(
    wanted: Wanted, *, text: Text | None, tasks: Tasks | None, as_json: bool, narrator: Narrator
) -> None:
    """
    Print a model's scores on a text, on harness tasks, or, for a run, on its own held-out text.

    Progress goes to standard error. as_json: print one JSON object to standard output, and nothing else.
    """
    console, aside = Console(speaks=not as_json), Console(on_stderr=True)
    if text is None and tasks is None:
        record = _held_out(wanted, console, aside, narrator)
    else:
        record = _of_text(wanted, text, console, aside, narrator) if text else {}
        if tasks is not None:
            narrator.begin(f"lm-evaluation-harness: {', '.join(tasks.names)}")
            results, table = run_tasks(wanted, tasks)
            narrator.begin(None)
            record["tasks"] = results
            console.say(table)
    if as_json:
        print(json.dumps(_without_nan(record), allow_nan=False))


def _held_out(wanted: Wanted, console: Console, aside: Console, narrator: Narrator) -> dict[str, Any]:
    """Return the loss on all held-out text, and gzip's and xz's bits per byte on the same text, or on a sample of a large one."""
    assert wanted.target is not None
    narrator.begin("loading the model")
    run = load_run(wanted.runs, wanted.target, step=wanted.step, device=wanted.device, dtype=wanted.dtype)
    narrator.begin("opening the data")
    dataset = open_past(run.config.data, aside, run.data_id)
    narrator.begin(None)
    if dataset.data_id != run.data_id:
        raise CheckpointError(
            f"{run.config.data.folder} has other tokens than {run.name} was trained on; its held-out text is gone"
        )
    counts = dataset.counts["val"]
    most = run.config.data.max_quarantined
    quarantine = HeldOutQuarantine({}, most, tell=lambda rows: aside.warn(in_words(rows))) if most else None
    text_bytes = counts.learned_bytes  # less than all only for conversations
    with Measuring(dataset.single, idle=False) as measuring:
        with aside.progress("evaluating", steady=True) as progress:
            result = evaluate(
                model_losses(run.model, run.device), Mesh(Place(), run.device), dataset, run.config, None,
                progress=lambda done, total: progress(f"{done:,} of {total:,} rows", done, total), quarantine=quarantine,
            )  # fmt: skip
        assert result is not None  # all tokens were asked for
        figures = {
            "nats_per_token": result.val_loss,
            "perplexity": perplexity(result.val_loss),
            "bits_per_byte": result.val_bits_per_byte,
        }
        console.say(f"{run.name} at step {run.step}, on {text_bytes:,} bytes of held-out text:")
        _say_figures(console, figures)
        if result.val_source_loss is not None:
            return {
                "step": run.step, **figures, "sources": _compare_sources(dataset, result.val_source_loss, console, aside),
            }  # fmt: skip
        if text_bytes < counts.text_bytes:  # gzip and xz would compress all of it
            return {"step": run.step, **figures}
        found = _wait(measuring, aside, "the text")
    if not isinstance(found, Yardstick):
        console.warn(f"cannot compare with gzip and xz: {found}")
        return {"step": run.step, **figures}
    console.say(found.compared(figures["bits_per_byte"], text_bytes))
    return {"step": run.step, **figures, **_theirs(found)}


def _compare_sources(
    dataset: Dataset, losses: Mapping[str, float], console: Console, aside: Console
) -> dict[str, dict[str, float]]:
    """Print, for each source of a blend, the model's bits per byte and those of gzip and xz. losses: nats per token by source."""
    said = {}
    for name, loss in losses.items():
        counts = dataset.parts[name].counts["val"]
        ours = loss / math.log(2) * counts.learned_tokens / max(counts.learned_bytes, 1)
        said[name] = {"nats_per_token": loss, "bits_per_byte": ours}
        if counts.learned_bytes < counts.text_bytes:
            console.say(
                f"{name}: conversations ({counts.learned_bytes:,} bytes learned), bits per byte: this model {ours:.3f}"
            )
            continue
        with Measuring(dataset.parts[name], idle=False) as measuring:  # one after the other: xz needs much memory
            found = _wait(measuring, aside, f"the text of {name}")
        if isinstance(found, Yardstick):
            console.say(f"{name}: {found.compared(ours, counts.text_bytes)}")
            said[name] |= _theirs(found)
        else:
            console.say(f"{name}: bits per byte: this model {ours:.3f}")
            console.warn(f"cannot compare {name} with gzip and xz: {found}")
    return said


def _wait(measuring: Measuring, aside: Console, text: str) -> Yardstick | str:
    return measuring.wait(
        math.inf, waits=lambda: aside.note(f"waiting for gzip and xz to compress {text}, once for this data")
    )


def _theirs(found: Yardstick) -> dict[str, float]:
    return {f"{n}_{k}_bits_per_byte": v for n, bits in found.bits_per_byte.items() for k, v in bits.items()}


def _of_text(wanted: Wanted, text: Text, console: Console, aside: Console, narrator: Narrator) -> dict[str, Any]:
    """Return the loss on the text of a file, in windows."""
    model = _load(wanted, narrator)
    context, stride = choose_windows(model.model.shape.max_seq_len, text.context, text.stride)
    tokenizer = model.need_tokenizer()
    first = first_token(tokenizer, model.files)
    with narrator.phase("reading the text"):
        ids = [first, *tokenizer.encode(text.content)]
    with aside.progress("scoring", steady=True) as progress:
        result = score(
            model.model, ids, context=context, stride=stride,
            progress=lambda done, total: progress(f"{done:,} of {total:,} tokens", done, total),
        )  # fmt: skip
    figures = {
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte(text.bytes),
    }
    after = tokenizer.decode([first])
    counts = {
        "tokens": result.tokens, "bytes": text.bytes, "windows": result.windows, "context": context, "stride": stride,
        "first_token_after": after,
    }  # fmt: skip
    console.say(
        f"{_called(model)}, on {text.bytes:,} bytes ({result.tokens:,} tokens) of {on_one_line(text.file)}, in "
        f"{result.windows:,} windows of {context:,} tokens, {stride:,} apart; the first token is predicted after {after}:"
    )
    _say_figures(console, figures)
    step = {"step": model.step} if isinstance(model, LoadedRun) else {}
    return {**step, **figures, **counts, "dtype": str(model.model.compute_dtype).removeprefix("torch.")}


def first_token(tokenizer: Tokenizer, files: Path | None) -> int:
    """
    Return the token that a text's first token is predicted from.

    Like lm-evaluation-harness: the tokenizer's bos_token, even if the tokenizer does not add it to texts, or else its
    eos_token. files: the folder whose config names them.
    """
    named = special_tokens(files).get("bos_token") if files is not None else None
    found = None if named is None else tokenizer.id_of(named)
    return next(index for index in (found, tokenizer.bos_id, tokenizer.eot_id) if index is not None)


def _load(wanted: Wanted, narrator: Narrator) -> LoadedModel:
    """Load the model. Notes go to standard error: standard output is for generated text and JSON."""
    with narrator.phase("loading the model"):
        model = load(wanted)
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
    """Replace NaN and Inf, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def generate_text(
    wanted: Wanted, *, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, narrator: Narrator
) -> None:
    """Print each prompt and its continuation; if there is only one prompt, print token by token."""
    model = _load(wanted, narrator)
    tokenizer = model.need_tokenizer()
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    alone = TextStream(tokenizer, ids[0]) if len(prompts) == 1 else None
    shown = False

    def show(_row: int, token: int) -> None:
        nonlocal shown
        assert alone is not None
        narrator.begin(None)
        print(alone.push(token) if shown else prompts[0] + alone.push(token), end="", flush=True)
        shown = True

    narrator.begin("reading the prompt" if alone else f"generating {len(prompts)} texts")
    with spelled(FLAGS):
        outputs = model.continue_tokens(
            ids, max_new_tokens=max_new_tokens, sampling=sampling, on_token=show if alone else None
        )
    narrator.begin(None)
    if alone is not None:
        print(alone.close() if shown else prompts[0])
        return
    for number, (prompt, prompt_ids, output) in enumerate(zip(prompts, ids, outputs, strict=True)):
        if number:
            print("-" * 40)
        print(prompt + continuation(tokenizer, prompt_ids, output))


def open_chat(
    wanted: Wanted, *, system: str | None, max_new_tokens: int, sampling: Sampling, narrator: Narrator
) -> Chat:
    """Load the model and open a conversation."""
    return Chat.of(_load(wanted, narrator), system=system, max_new_tokens=max_new_tokens, sampling=sampling)
