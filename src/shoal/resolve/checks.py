"""Rejected combinations of options that are each valid alone. Pure, no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from glob import has_magic
from pathlib import Path
from typing import Final

from shoal.config.data_options import BlendSource, Data, Source, read_place
from shoal.config.option import option_fields, option_name
from shoal.config.options import SOURCES, Config
from shoal.config.presets import shape_problems
from shoal.errors import ModelError, Problem
from shoal.hub.find import find_model, find_path, near_path
from shoal.resolve.layout_checks import refusals_of_machines
from shoal.system.network import read_address

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


def _corpus_problems(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    model, data = config.model, config.data
    if data.sources is None:
        yield from _source_problems(data, "data", data, problem)
        if data.stages is not None:
            yield problem("data.stages needs a blend; set data.sources", "data.stages")
    else:
        for name, source in data.sources.items():
            yield from _source_problems(source, f"{SOURCES}{name}", data, problem)
        yield from _blend_problems(data, data.sources, problem)
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


def _source_problems(source: Source, key: str, data: Data, problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of one source. key: the dotted key of its options without their names."""
    yield from _token_file_problems(source, key, data, problem)
    if source.corpus in ("text", "jsonl", "tokens") and not source.paths:
        yield problem(f"a {source.corpus} corpus needs files or folders; set {key}.paths", f"{key}.corpus")
    if source.corpus in ("stdlib", "dummy") and source.paths:
        yield problem(
            f"a {source.corpus} corpus does not use {key}.paths; set {key}.corpus to text or jsonl",
            f"{key}.paths",
            f"{key}.corpus",
        )
    for option in ("paths", "val_paths"):
        given = getattr(source, option)
        missing = [p for p in given if not (_is_there(p) or (source.corpus == "tokens" and has_magic(p)))]
        if missing and not _has_tokens(
            source.corpus, data
        ):  # if the tokens are prepared, their source files may be gone
            named = ", ".join(f"{path}{near_path(path)}" for path in missing[:3])
            yield problem(f"{key}.{option} does not exist: {named}", f"{key}.{option}")


def _blend_problems(data: Data, sources: Mapping[str, BlendSource], problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of a blend's weights and stages."""
    for f in option_fields(Source):
        if getattr(data, f.name) != f.default:
            key = f"data.{option_name(f)}"
            yield problem(f"{key} has no effect beside data.sources; set it below each source", key)
    weights = {name: source.weight for name, source in sources.items()}
    without = [name for name, weight in weights.items() if weight is None]
    if without and len(without) < len(weights):
        yield problem(
            f"data.sources.{without[0]} has no weight, but others have one; set the weight of all sources or of none",
            *(f"{SOURCES}{name}.weight" for name in weights),
        )
    elif not without and not sum(weight or 0.0 for weight in weights.values()):
        yield problem("the weights of all sources are 0; set one above 0", *(f"{SOURCES}{n}.weight" for n in weights))
    if without and data.stages is not None:
        yield problem("data.stages changes weights, and the sources have none; set their weights", "data.stages")
    if without and any(source.max_epochs is not None for source in sources.values()):
        yield problem(
            "max_epochs needs weights: without them each row is read once per epoch, and train.epochs limits epochs",
            *(f"{SOURCES}{name}.max_epochs" for name in weights),
        )
    for place, given in (data.stages or {}).items():
        if (why := _why_no_stage(place, given, sources)) is not None:
            yield problem(f"data.stages {place!r}: {why}", "data.stages")


def _why_no_stage(place: str, given: Mapping[str, float], sources: Mapping[str, BlendSource]) -> str | None:
    """Return the reason why a stage is invalid; None if it is valid."""
    if read_place(place) is None:
        return "it is not a place of the run, such as 1000 steps or 2e9 tokens"
    unknown = [name for name in given if name not in sources]
    if unknown:
        return f"there is no source {unknown[0]}; the sources are {', '.join(sources)}"
    if any(not 0 <= weight < math.inf for weight in given.values()) or not sum(given.values()):
        return "weights must not be negative, and at least one must be above 0"
    return None


def _token_file_problems(source: Source, key: str, data: Data, problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of options that only token files have, or do not have."""
    if source.corpus != "tokens":
        for name in ("token_format", "token_type", "val_paths"):
            if getattr(source, name) not in ("auto", ()):
                yield problem(
                    f"{key}.{name} is of token files; set {key}.corpus to tokens, or remove it",
                    f"{key}.{name}",
                    f"{key}.corpus",
                )
        return
    if data.tokenizer == "bpe":
        yield problem(
            "a tokens corpus needs the tokenizer that made its tokens; set data.tokenizer to it",
            "data.tokenizer",
            f"{key}.corpus",
        )
    if source.token_type != "auto" and source.token_format in ("llm.c", "megatron"):
        yield problem(
            f"{key}.token_type has no effect: files of {source.token_format} name their type themselves; remove it",
            f"{key}.token_type",
            f"{key}.token_format",
        )
    if data.sources is not None:
        return
    changed = {"shard_tokens": "token files are read in place"}
    if source.val_paths:
        changed["val_fraction"] = "data.val_paths names the held-out tokens"
    for name, why in changed.items():
        if getattr(data, name) != getattr(Data(), name):
            yield problem(f"data.{name} has no effect: {why}; remove it", f"data.{name}", "data.corpus")


def _has_tokens(corpus: str, data: Data) -> bool:
    """Return whether there are prepared tokens of any corpus of this kind; preparation checks whether they are this corpus's."""
    try:
        return any(Path(data.folder).expanduser().glob(f"{corpus}-*/manifest.json"))
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
