"""Rejected options of a run's data: of one source, of a blend, of the tokenizer. Pure, no torch."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from shoal.config.data_formats import format_of, is_pattern
from shoal.config.data_options import (
    NAMED_TEMPLATES,
    BlendSource,
    Data,
    Source,
    is_built_in,
    known_vocabulary,
    read_place,
)
from shoal.config.keys import SOURCES
from shoal.config.option import option_fields, option_name
from shoal.config.options import Config
from shoal.errors import ModelError, Problem
from shoal.hub.catalog import fetched_by
from shoal.hub.find import find_model, find_path, near_path
from shoal.system.network import scheme_of

WITHOUT_PATHS: Final = ("stdlib", "dummy")

MakeProblem = Callable[..., Problem]


def data_problems(config: Config, problem: MakeProblem, *, needs_files: bool = True) -> Iterable[Problem]:
    """
    Yield the problems of the data's options.

    problem: makes a `Problem` of a sentence and the keys it is about. needs_files: whether the data's files must exist.
    """
    model, data = config.model, config.data
    if data.sources is None:
        yield from _source_problems(data, "data", data, problem, needs_files=needs_files)
        yield from _conversation_problems(data, "data", problem)
        if data.bad_records != Data.bad_records and data.corpus == "dummy":
            yield problem(
                "data.bad_records has no effect on a dummy corpus; remove it", "data.bad_records", "data.corpus"
            )
        if data.stages is not None:
            yield problem("data.stages needs a blend; set data.sources", "data.stages")
    else:
        for name, source in data.sources.items():
            yield from _source_problems(source, f"{SOURCES}{name}", data, problem, needs_files=needs_files)
            yield from _conversation_problems(source, f"{SOURCES}{name}", problem)
        yield from _blend_problems(data, data.sources, problem)
    yield from _fraction_problems(data, problem)
    why = _why_no_tokenizer(data) if needs_files else None
    if why is not None:
        yield problem(
            f"data.tokenizer {data.tokenizer} was not found: {why}; set it to bpe, "
            "bytes, tiktoken:NAME, a tokenizer.json or tokenizer.model, or a model's folder or name",
            "data.tokenizer",
        )
    needed = known_vocabulary(data)
    if model.vocab_size is not None and needed is not None and model.vocab_size < needed:
        yield problem(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {needed}",
            "model.vocab_size",
            "data.tokenizer_vocab_size",
        )


def _source_problems(
    source: Source, key: str, data: Data, problem: MakeProblem, *, needs_files: bool
) -> Iterable[Problem]:
    """Yield the problems of one source. key: the dotted key of its options without their names."""
    yield from _token_file_problems(source, key, data, problem)
    yield from _dataset_problems(source, key, problem)
    yield from _document_problems(source, key, problem)
    yield from _filter_problems(source, key, data, problem, needs_files=needs_files)
    if source.corpus not in (*WITHOUT_PATHS, "datasets") and not source.paths:
        yield problem(f"a {source.corpus} corpus needs files or folders; set {key}.paths", f"{key}.corpus")
    if source.corpus in WITHOUT_PATHS and source.paths:
        yield problem(
            f"a {source.corpus} corpus does not use {key}.paths; set {key}.corpus to files, or to the files' format",
            f"{key}.paths",
            f"{key}.corpus",
        )
    if source.corpus in (*WITHOUT_PATHS, "datasets") and source.val_paths:
        instead = f"set {key}.val_split" if source.corpus == "datasets" else "remove it"
        yield problem(
            f"{key}.val_paths has no effect on a {source.corpus} corpus; {instead}", f"{key}.val_paths", f"{key}.corpus"
        )
    for option in ("paths", "val_paths"):
        files = () if source.corpus in (*WITHOUT_PATHS, "datasets") else getattr(source, option)
        local = [path for path in files if not scheme_of(path)]
        missing = [path for path in local if not _is_there(path)]
        # if the tokens are prepared, their source files may be gone
        if needs_files and missing and not _has_tokens(source.corpus, data):
            named = ", ".join(f"{path}{_how_to_get(path)}" for path in missing[:3])
            yield problem(f"{key}.{option} does not exist: {named}", f"{key}.{option}")


def _dataset_problems(source: Source, key: str, problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of a dataset on a hub, and of its options with another corpus."""
    if source.corpus == "datasets":
        if len(source.paths) != 1:
            yield problem(
                f"a datasets corpus needs one dataset, not {len(source.paths)}; set {key}.paths to OWNER/NAME or a folder",
                f"{key}.paths",
                f"{key}.corpus",
            )
        if source.val_split == source.split:
            yield problem(
                f"{key}.val_split is {key}.split, so nothing would be left to train on; set it to another split, such as "
                "validation",
                f"{key}.val_split",
                f"{key}.split",
            )
        return
    for name in ("subset", "split", "val_split", "streaming"):
        if getattr(source, name) != getattr(Source, name):  # a run's own config names every option
            yield problem(
                f"{key}.{name} has no effect on a {source.corpus} corpus; remove it", f"{key}.{name}", f"{key}.corpus"
            )


def _how_to_get(path: str) -> str:
    """Return a hint for a missing path: the command that fetches it, or a near one that exists."""
    command = fetched_by(path)
    return f" ({command} fetches it)" if command else near_path(path)


def _document_problems(source: Source, key: str, problem: MakeProblem) -> Iterable[Problem]:
    """Yield the problems of the options that say where a document begins and ends."""
    if source.separator and not source.separator.strip():
        yield problem(f"{key}.separator is blank; set it to a line's text, such as <|endoftext|>", f"{key}.separator")
    if source.separator and source.corpus not in ("text", "files"):
        yield problem(
            f"{key}.separator has no effect on a {source.corpus} corpus, whose documents are records; remove it",
            f"{key}.separator",
            f"{key}.corpus",
        )
    formats = {format_of(path) for path in (*source.paths, *source.val_paths)}
    if source.separator and source.corpus == "files" and formats and formats.isdisjoint({"text", None}):
        yield problem(
            f"{key}.separator has no effect on {' and '.join(sorted(map(str, formats)))} files, whose documents are records; remove "
            "it",
            f"{key}.separator",
            f"{key}.paths",
        )
    if source.separator and source.wikitext:
        yield problem(
            f"{key}.separator has no effect with {key}.wikitext; remove one", f"{key}.separator", f"{key}.wikitext"
        )
    if source.text_key != Source.text_key and source.corpus in ("text", "tokens", *WITHOUT_PATHS):
        yield problem(
            f"{key}.text_key has no effect on a {source.corpus} corpus, which has no records; remove it, or set {key}.corpus to "
            "files",
            f"{key}.text_key",
            f"{key}.corpus",
        )
    if source.wikitext and source.corpus in WITHOUT_PATHS:
        yield problem(
            f"{key}.wikitext has no effect on a {source.corpus} corpus; remove it", f"{key}.wikitext", f"{key}.corpus"
        )


def _filter_problems(
    source: Source, key: str, data: Data, problem: MakeProblem, *, needs_files: bool
) -> Iterable[Problem]:
    unset = Source()
    if source.near_threshold != unset.near_threshold and source.deduplicate != "near":
        yield problem(
            f"{key}.near_threshold {source.near_threshold:g} has no effect with {key}.deduplicate {source.deduplicate}; set "
            f"{key}.deduplicate to near",
            f"{key}.near_threshold",
            f"{key}.deduplicate",
        )
    if source.decontaminate_ngram != unset.decontaminate_ngram and not source.decontaminate:
        yield problem(
            f"{key}.decontaminate_ngram has no effect without evaluation sets; set {key}.decontaminate to their files",
            f"{key}.decontaminate_ngram",
        )
    if 0 < source.longest_document < source.shortest_document:
        yield problem(
            f"{key}.longest_document {source.longest_document} is below {key}.shortest_document {source.shortest_document}, so "
            "every document would be removed; raise the one or lower the other",
            f"{key}.longest_document",
            f"{key}.shortest_document",
        )
    missing = [p for p in source.decontaminate if not _is_there(p)]
    if needs_files and missing and not _has_tokens(source.corpus, data):
        named = ", ".join(f"{path}{near_path(path)}" for path in missing[:3])
        yield problem(f"{key}.decontaminate does not exist: {named}", f"{key}.decontaminate")


def _conversation_problems(source: Source, key: str, problem: MakeProblem) -> Iterable[Problem]:
    if source.format == "text":
        for name in ("template", "broken_conversations", "learn"):
            if getattr(source, name) != getattr(Source, name):  # a run's own config names every option
                yield problem(
                    f"{key}.{name} has no effect on {key}.format text; set {key}.format to alpaca, messages or sharegpt, or "
                    f"remove {key}.{name}",
                    f"{key}.{name}",
                    f"{key}.format",
                )
        return
    if source.corpus in ("stdlib", "text", "dummy", "tokens"):
        yield problem(
            f"a {source.corpus} corpus has no records, which {key}.format {source.format} needs; set {key}.corpus to jsonl",
            f"{key}.format",
            f"{key}.corpus",
        )
    if source.format == "alpaca" and source.text_key != Source.text_key:
        yield problem(
            f"{key}.text_key has no effect on {key}.format alpaca, whose fields are instruction, input and output; remove it",
            f"{key}.text_key",
            f"{key}.format",
        )
    if source.template != "auto" and source.template not in NAMED_TEMPLATES and not _is_template_file(source.template):
        yield problem(
            f"{key}.template {source.template} was not found: there is no such file; set it to auto, "
            f"{', '.join(NAMED_TEMPLATES)} or the path of a .jinja file",
            f"{key}.template",
        )


def _is_template_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


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
        for name in ("token_format", "token_type"):
            if getattr(source, name) != "auto":
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
    if data.sources is None and data.shard_tokens != Data.shard_tokens:
        yield problem(
            "data.shard_tokens has no effect: token files are read in place; remove it",
            "data.shard_tokens",
            "data.corpus",
        )


def _fraction_problems(data: Data, problem: MakeProblem) -> Iterable[Problem]:
    """Yield a problem if each source has held-out files, and a fraction of its documents is to be held out too."""
    sources: dict[str, Source] = {"data": data}
    if data.sources is not None:
        sources = {f"{SOURCES}{name}": source for name, source in data.sources.items()}
    named = {
        key: "val_paths" if source.val_paths else "val_split"
        for key, source in sources.items()
        if source.val_paths or source.val_split
    }
    if len(named) == len(sources) and data.val_fraction != Data.val_fraction:
        keys = [f"{key}.{option}" for key, option in named.items()]
        yield problem(
            f"data.val_fraction has no effect: {keys[0]} says what is held out; remove one", "data.val_fraction", *keys
        )


def _has_tokens(corpus: str, data: Data) -> bool:
    """Return whether there are prepared tokens of any corpus of this kind; preparation checks whether they are this corpus's."""
    try:
        return any(Path(data.folder).expanduser().glob(f"{corpus}-*/manifest.json"))
    except (OSError, RuntimeError, ValueError):
        return False


def _is_there(path: str) -> bool:
    """Return whether a path exists; a pattern, whether it matches anything."""
    try:
        if find_path(path) is not None:
            return True
        return is_pattern(path) and any(glob.iglob(str(Path(path).expanduser()), recursive=True))
    except ModelError:
        return False


def _why_no_tokenizer(data: Data) -> str | None:
    """Return the reason why the tokenizer was not found; None if its file or folder exists. Its content is not checked."""
    name = data.tokenizer
    if is_built_in(name):
        return None
    try:
        if find_path(name) is not None:
            return None
        if data.kept is None and Path(name).suffix in (".json", ".model", ".tiktoken"):
            return f"there is no such file{near_path(name)}"
        find_model(name, data.kept)
    except ModelError as error:
        return f"there is no such file, and as a model: {error}"
    return None
