"""What cannot hold together: options that are each valid and contradict each other. Pure, no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from shoal.config.options import Config, Data
from shoal.config.presets import shape_problems
from shoal.errors import ModelError, Problem
from shoal.hub.find import find_model, find_path, near_path
from shoal.resolve.layout_checks import refusals_of_machines
from shoal.system.network import read_address

DEFAULT, DERIVED = "default", "derived"
LONGEST_NAME: Final = 200  # bytes: file systems take 255, and some names here grow by a word

MakeProblem = Callable[..., Problem]


def contradictions(config: Config, sources: Mapping[str, str]) -> Iterable[Problem]:
    """What each option alone allows and all together do not."""

    def problem(what: str, *keys: str) -> Problem:
        given = dict.fromkeys(sources[k] for k in keys if sources[k] not in (DEFAULT, DERIVED))
        return Problem(" and ".join(given), what)

    model, data, train = config.model, config.data, config.train
    for key, message in shape_problems(model):
        yield problem(message, f"model.{key}")
    lengths = [k for k in ("steps", "tokens", "epochs") if getattr(train, k) is not None]
    if len(lengths) != 1:
        keys = tuple(f"train.{k}" for k in lengths)
        said = " and ".join(keys) + " are both given" if lengths else "the length of the run is not given"
        yield problem(f"{said}; set one of train.steps, train.tokens, train.epochs", *keys)
    if train.global_batch % train.micro_batch:
        yield problem(
            f"train.global_batch {train.global_batch} is no multiple of train.micro_batch {train.micro_batch}; "
            f"try {_round_up(train.global_batch, train.micro_batch)}",
            "train.global_batch",
            "train.micro_batch",
        )
    elif not any(shape_problems(model)):
        for sentence in refusals_of_machines(config, config.launch.processes):
            cause, _, _ = sentence.partition("; ")
            yield problem(sentence, *(key for key in sources if re.search(rf"\b{re.escape(key)}\b", cause)))
    if data.seq_len > model.max_seq_len:
        yield problem(
            f"data.seq_len {data.seq_len} is longer than model.max_seq_len {model.max_seq_len}",
            "data.seq_len",
            "model.max_seq_len",
        )
    yield from _of_machines(config, problem)
    if config.launch.name is not None and (why := why_no_name(config.launch.name)):
        yield problem(f"launch.name {why}", "launch.name")
    yield from _corpus_problems(config, problem)


def remarks(config: Config) -> Iterable[str]:
    """What holds together and is perhaps not what was meant."""
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if steps is not None and warmup > steps:
        yield (
            f"optim.warmup_steps {warmup} is more than train.steps {steps}: the learning rate rises until the end, to "
            f"{config.optim.lr * steps / warmup:.3g} of optim.lr {config.optim.lr:g}"
        )


def why_no_name(name: str) -> str | None:
    """Why a run cannot be called `name`, which is a folder's and a word of command lines; None where it can."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"{name[:20]!r}... has {len(name)} characters; {LONGEST_NAME} bytes is the most"
    if not name.strip(" .") or "/" in name or name[0] in ".-" or not name.isprintable():
        return (
            f"{name!r} is no name of a folder below launch.runs: leave out slashes and control characters, and begin it with "
            "neither a dot nor a dash"
        )
    return None


def _corpus_problems(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    model, data = config.model, config.data
    if data.corpus in ("text", "jsonl") and not data.paths:
        yield problem(f"a {data.corpus} corpus needs data.paths: its files or folders", "data.corpus")
    if data.corpus in ("stdlib", "dummy") and data.paths:
        yield problem(
            f"a {data.corpus} corpus takes no data.paths; set data.corpus to text or jsonl", "data.paths", "data.corpus"
        )
    missing = [p for p in data.paths if not _is_there(p)]
    if missing and not _has_tokens(data):  # else they may be what is left of it
        named = ", ".join(f"{path}{near_path(path)}" for path in missing[:3])
        yield problem(f"data.paths: there is no {named}", "data.paths")
    why = _why_no_tokenizer(data)
    if why is not None:
        yield problem(
            "data.tokenizer is bpe, bytes, tiktoken:NAME, a tokenizer.json or tokenizer.model, or a model's folder or "
            f"name; there is no file {data.tokenizer}, and as a model: {why}",
            "data.tokenizer",
        )
    needed = {"bytes": 257, "bpe": data.tokenizer_vocab_size}.get(data.tokenizer)
    if model.vocab_size is not None and needed is not None and model.vocab_size < needed:
        yield problem(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {needed}",
            "model.vocab_size",
            "data.tokenizer_vocab_size",
        )


def _has_tokens(data: Data) -> bool:
    """Whether there are prepared tokens of some corpus of this kind; preparing looks of which."""
    try:
        return any(Path(data.folder).expanduser().glob(f"{data.corpus}-*/manifest.json"))
    except (OSError, RuntimeError, ValueError):
        return False


def _is_there(path: str) -> bool:
    try:
        return find_path(path) is not None
    except ModelError:
        return False


def _why_no_tokenizer(data: Data) -> str | None:
    """None where there is something to open; what it is worth is seen when it is opened."""
    name = data.tokenizer
    if name in ("bpe", "bytes") or name.startswith("tiktoken:"):
        return None
    try:
        if find_path(name) is None:
            find_model(name, data.kept)
    except ModelError as error:
        return str(error)
    return None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _of_machines(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    launch = config.launch
    if launch.min_nodes is not None and launch.min_nodes > launch.nodes:
        yield problem(
            f"launch.min_nodes {launch.min_nodes} is more than launch.nodes {launch.nodes}, the most that take part",
            "launch.min_nodes",
            "launch.nodes",
        )
    for key in ("min_nodes", "rendezvous"):
        if launch.nodes == 1 and getattr(launch, key) is not None:
            yield problem(
                f"launch.{key} is for several machines, and launch.nodes is 1; set launch.nodes to the most that there will be",
                f"launch.{key}",
            )
    if launch.rendezvous is None and launch.nodes > 1:
        yield problem(
            f"launch.nodes {launch.nodes} needs launch.rendezvous HOST:PORT, where the machines meet", "launch.nodes"
        )
    elif launch.rendezvous is not None and read_address(launch.rendezvous) is None:
        yield problem(
            f"launch.rendezvous {launch.rendezvous!r} is no HOST:PORT, such as node0:29400", "launch.rendezvous"
        )
