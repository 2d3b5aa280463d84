"""Rejected combinations of options that are each valid alone. Pure, no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.config.presets import shape_problems
from shoal.errors import ModelError, Problem
from shoal.hub.catalog import fetched_by
from shoal.hub.find import find_model, find_path, near_path
from shoal.resolve.layout_checks import refusals_of_machines
from shoal.system.network import read_address, scheme_of

DEFAULT, DERIVED = "default", "derived"
LONGEST_NAME: Final = 200  # bytes; file systems allow 255, and some file names append a word to a run's name

MakeProblem = Callable[..., Problem]


def contradictions(config: Config, sources: Mapping[str, str]) -> Iterable[Problem]:
    """Yield a `Problem` for each incompatible combination; `sources`: where each option was set."""

    def problem(what: str, *keys: str) -> Problem:
        given = dict.fromkeys(sources[k] for k in keys if sources[k] not in (DEFAULT, DERIVED))
        return Problem(" and ".join(given), what)

    model, data, train = config.model, config.data, config.train
    for key, message in shape_problems(model):
        yield problem(message, f"model.{key}")
    lengths = [k for k in ("steps", "tokens", "epochs") if getattr(train, k) is not None]
    if len(lengths) != 1:
        keys = tuple(f"train.{k}" for k in lengths)
        said = " and ".join(keys) + " are both set" if lengths else "the length of the run is not set"
        yield problem(f"{said}; set one of train.steps, train.tokens, train.epochs", *keys)
    if train.global_batch % train.micro_batch:
        yield problem(
            f"train.micro_batch {train.micro_batch} does not divide train.global_batch {train.global_batch}; "
            f"set train.global_batch to {_round_up(train.global_batch, train.micro_batch)}",
            "train.global_batch",
            "train.micro_batch",
        )
    elif not any(shape_problems(model)):
        for sentence in refusals_of_machines(config, config.launch.processes):
            cause, _, _ = sentence.partition("; ")
            yield problem(sentence, *(key for key in sources if re.search(rf"\b{re.escape(key)}\b", cause)))
    if data.seq_len > model.max_seq_len:
        yield problem(
            f"data.seq_len {data.seq_len} exceeds model.max_seq_len {model.max_seq_len}; reduce the one or raise the other",
            "data.seq_len",
            "model.max_seq_len",
        )
    yield from _node_problems(config, problem)
    if config.launch.name is not None and (why := why_no_name(config.launch.name)):
        yield problem(f"launch.name {why}", "launch.name")
    yield from _corpus_problems(config, problem)


def remarks(config: Config) -> Iterable[str]:
    """Yield warnings about valid options that are perhaps not what was meant."""
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if steps is not None and warmup > steps:
        yield (
            f"optim.warmup_steps {warmup} exceeds train.steps {steps}: the learning rate rises until the end, only to "
            f"{config.optim.lr * steps / warmup:.3g} of optim.lr {config.optim.lr:g}"
        )


def why_no_name(name: str) -> str | None:
    """Return the reason why `name` cannot name a run (a folder, and an argument of commands); None if it can."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"{name[:20]!r}... has {len(name)} characters; use at most {LONGEST_NAME} bytes"
    if not name.strip(" .") or "/" in name or name[0] in ".-" or not name.isprintable():
        return (
            f"{name!r} cannot name a folder below launch.runs: remove slashes and control characters, and do not begin "
            "it with a dot or a dash"
        )
    return None


def _dataset_problems(data: Data, problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of a dataset on a hub, and of its options with another corpus."""
    if data.corpus == "datasets":
        if len(data.paths) != 1:
            yield problem(
                f"a datasets corpus needs one dataset, not {len(data.paths)}; set data.paths to OWNER/NAME or a folder",
                "data.paths",
                "data.corpus",
            )
        return
    for key in ("subset", "split", "streaming"):
        if getattr(data, key) != getattr(Data, key):  # a run's own config names every option
            yield problem(
                f"data.{key} has no effect on a {data.corpus} corpus; remove it", f"data.{key}", "data.corpus"
            )


def _corpus_problems(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    model, data = config.model, config.data
    if data.corpus in ("text", "jsonl") and not data.paths:
        yield problem(f"a {data.corpus} corpus needs files or folders; set data.paths", "data.corpus")
    if data.corpus in ("stdlib", "dummy") and data.paths:
        yield problem(
            f"a {data.corpus} corpus does not use data.paths; set data.corpus to text or jsonl",
            "data.paths",
            "data.corpus",
        )
    yield from _dataset_problems(data, problem)
    missing = [p for p in data.paths if data.corpus != "datasets" and not scheme_of(p) and not _is_there(p)]
    if missing and not _has_tokens(data):  # if the tokens are prepared, their source files may be gone
        named = ", ".join(f"{path}{_how_to_get(path)}" for path in missing[:3])
        yield problem(f"data.paths does not exist: {named}", "data.paths")
    why = _why_no_tokenizer(data)
    if why is not None:
        yield problem(
            f"data.tokenizer {data.tokenizer} was not found: there is no such file, and as a model: {why}; set it to bpe, "
            "bytes, tiktoken:NAME, a tokenizer.json or tokenizer.model, or a model's folder or name",
            "data.tokenizer",
        )
    needed = {"bytes": 257, "bpe": data.tokenizer_vocab_size}.get(data.tokenizer)
    if model.vocab_size is not None and needed is not None and model.vocab_size < needed:
        yield problem(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {needed}",
            "model.vocab_size",
            "data.tokenizer_vocab_size",
        )


def _how_to_get(path: str) -> str:
    """Return a hint for a missing path: the command that fetches it, or a near one that exists."""
    command = fetched_by(path)
    return f" ({command} fetches it)" if command else near_path(path)


def _has_tokens(data: Data) -> bool:
    """Return whether there are prepared tokens of any corpus of this kind; preparation checks whether they are this corpus's."""
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
    """Return the reason why the tokenizer was not found; None if its file or folder exists. Its content is not checked."""
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


def _node_problems(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    launch = config.launch
    if launch.min_nodes is not None and launch.min_nodes > launch.nodes:
        yield problem(
            f"launch.min_nodes {launch.min_nodes} exceeds launch.nodes {launch.nodes}, the maximum; raise launch.nodes",
            "launch.min_nodes",
            "launch.nodes",
        )
    for key in ("min_nodes", "rendezvous"):
        if launch.nodes == 1 and getattr(launch, key) is not None:
            yield problem(
                f"launch.{key} needs several nodes, but launch.nodes is 1; set launch.nodes to their maximum number",
                f"launch.{key}",
            )
    if launch.rendezvous is None and launch.nodes > 1:
        yield problem(
            f"launch.nodes {launch.nodes} needs an address where the nodes meet; set launch.rendezvous to HOST:PORT",
            "launch.nodes",
        )
    elif launch.rendezvous is not None and read_address(launch.rendezvous) is None:
        yield problem(
            f"launch.rendezvous {launch.rendezvous!r} is not HOST:PORT; an example is node0:29400", "launch.rendezvous"
        )
