"""The prepared data of a run: one corpus, or the sources of a blend, as rows and their order. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.config.data_options import BlendSource, Data, Source, read_place
from shoal.config.option import option_fields
from shoal.data.corpus.sources import check_marks, open_corpus
from shoal.data.order.blend import Blend, Stage, shares_of
from shoal.data.packing.pack import PlacedRows, RowArrays, check_ids, read_placed
from shoal.data.prepare import (
    Prepared,
    Progress,
    Ticks,
    downloads_of,
    no_progress,
    open_checked,
    open_prepared,
    prepare,
    prepared_rows,
)
from shoal.data.split import choose_split, training_sample
from shoal.data.stored.files import locked_folder, write_atomically
from shoal.data.stored.manifest import TOKENIZER, SplitName, SplitRecord, find_aside
from shoal.data.token_folder import find_by_id, token_options
from shoal.data.tokens import tokenize
from shoal.errors import DataError, TooSmallError
from shoal.run.console import Console


class BlendRows:
    """The rows of several sources end to end: a row's number counts the rows of the sources before it."""

    def __init__(self, parts: Sequence[PlacedRows]) -> None:
        self.parts = list(parts)
        self.sizes = [len(part) for part in self.parts]
        self._firsts = np.cumsum([0, *self.sizes[:-1]])

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        ids = check_ids(row_ids, len(self))
        sources = np.searchsorted(self._firsts, ids, side="right") - 1
        owns = (ids - self._firsts[sources]).tolist()
        placed = [self.parts[source].place(own) for source, own in zip(sources.tolist(), owns, strict=True)]
        return read_placed(placed, self.seq_len, document_mask=self.parts[0].document_mask)


@dataclass(frozen=True)
class Dataset:
    """The prepared sources of a run, by name; a corpus that is not a blend has the name ""."""

    data: Data
    parts: Mapping[str, Prepared]

    @property
    def tokenizer(self) -> tokenize.Tokenizer:
        """The tokenizer of all sources."""
        return next(iter(self.parts.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def data_id(self) -> str:
        """A hash of the tokens' content: runs with equal ids read equal tokens."""
        if self.single is not None:
            return self.single.data_id
        content = "\n".join(f"{name} {part.data_id}" for name, part in self.parts.items())
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def single(self) -> Prepared | None:
        """The prepared corpus, if there is no blend."""
        return self.parts.get("")

    @property
    def notes(self) -> list[str]:
        """Warnings for the user."""
        return [f"{name}: {note}" if name else note for name, part in self.parts.items() for note in part.notes]

    @property
    def counts(self) -> dict[SplitName, SplitRecord]:
        """Documents, tokens and bytes of text in each split, of all sources together."""
        if self.single is not None:
            return dict(self.single.counts)
        return {name: _sum([part.counts[name] for part in self.parts.values()]) for name in ("train", "val")}

    def conversations(self) -> Data | None:
        """Return the options of the first source of conversations; None if there is none."""
        sources: list[Source] = [*self.data.sources.values()] if self.data.sources else [self.data]
        chats = [source for source in sources if source.format != "text"]
        return source_data(self.data, chats[0], self.data.tokenizer) if chats else None

    def rows(self, split: SplitName) -> BlendRows:
        """Cut a split into rows of `data.seq_len`. Raises DataError if a source does not fill one row."""
        return BlendRows([self.part_rows(name, split) for name in self.parts])

    def held_out_rows(self) -> dict[str, PlacedRows]:
        """Cut the held-out split of each source into rows, without sources too small for one. Raises TooSmallError if all are."""
        found, problem = {}, None
        for name in self.parts:
            try:
                found[name] = self.part_rows(name, "val")
            except TooSmallError as error:
                problem = error
        if problem is not None and not found:
            raise problem
        return found

    def part_rows(self, name: str, split: SplitName, *, keep: bool = True) -> PlacedRows:
        """
        Cut a split of one source into rows. Raises DataError, which names the source; TooSmallError if it fills no row.

        keep: whether a new index of rows is saved with the tokens.
        """
        data = self.data
        try:
            return self.parts[name].split(
                split, seq_len=data.seq_len, document_mask=data.document_mask, packing=data.packing, keep=keep
            )
        except DataError as error:
            raise type(error)(f"data.sources.{name}: {error}" if name else str(error)) from error


def _sum(records: Sequence[SplitRecord]) -> SplitRecord:
    totals = {
        name: sum(getattr(record, name) for record in records)
        for name in ("documents", "tokens", "text_bytes", "learned_tokens", "learned_bytes")
    }
    return SplitRecord(**totals, shards=(), estimated=any(record.estimated for record in records))


# --- stages --------------------------------------------------------------------------------------------------


def planned_stages(data: Data, global_batch: int, step: int = 0, position: int = 0) -> list[Stage]:
    """
    Return the stages that the options ask for from `position` on, the sample at which the step after `step` begins.

    The first is the one that holds at `position`. None if there is no blend or its sources have no weights.
    """
    sources = data.sources or {}
    if not sources or any(source.weight is None for source in sources.values()):
        return []
    weights = {0: {name: source.weight or 0.0 for name, source in sources.items()}}
    for place, given in (data.stages or {}).items():
        weights[_step_of(place, data.seq_len, global_batch, step, position)] = dict(given)
    now = max(at for at in weights if at <= step)
    return [
        Stage(position + (max(at, step) - step) * global_batch, shares_of([given.get(name, 0.0) for name in sources]))
        for at, given in sorted(weights.items())
        if at >= now
    ]


def _step_of(place: str, seq_len: int, global_batch: int, step: int, position: int) -> int:
    """Return the steps taken before a place such as "1000 steps" or "2e9 tokens", counted from `step` on for tokens."""
    found = read_place(place)
    assert found is not None  # the config was checked
    amount, unit = found
    if unit == "steps":
        return math.ceil(amount)
    return max(0, step + math.ceil((amount - position * seq_len) / (seq_len * global_batch)))


def continued_stages(before: Sequence[Stage], planned: Sequence[Stage], position: int) -> list[Stage]:
    """
    Return the stages of a resumed run: those `before` up to `position`, and those now `planned` from there on.

    The samples before `position` were drawn by the stages then, so they stay.
    """
    kept = [stage for stage in before if stage.first < position]
    if kept and planned and planned[0].shares == kept[-1].shares:
        return [*kept, *planned[1:]]
    return [*kept, *planned]


def order_of(data: Data, sizes: Sequence[int], seed: int, stages: Sequence[Stage]) -> Blend:
    """Return the order of rows. sizes: the rows of each source. stages: from `planned_stages` or `continued_stages`."""
    sources = (data.sources or {}).values()
    epochs = [math.inf if source.max_epochs is None else source.max_epochs for source in sources]
    return Blend(seed, sizes, stages, epochs if stages else ())


def new_order(data: Data, sizes: Sequence[int], seed: int, global_batch: int) -> Blend:
    """Return the order of rows of a new run. sizes: the rows of each source."""
    return order_of(data, sizes, seed, planned_stages(data, global_batch))


# --- opening -------------------------------------------------------------------------------------------------


def open_data(data: Data, console: Console, *, rows: int | None = None, past: str = "") -> Dataset:
    """
    Open the tokens of `data`, preparing them if needed, with progress and warnings on the console.

    rows: the number of rows of the model's embedding, None if unknown. past: the id of the tokens that a run was trained on,
    see `open_past`; not used with `data.rebuild`. Raises DataError as `prepare` does.
    """
    if past and not data.rebuild:
        return open_past(data, console, past)
    with console.progress("preparing") as progress:
        dataset = prepare_dataset(data, progress, rows=rows)
    for note in dataset.notes:
        console.warn(note)
    return dataset


def open_past(data: Data, console: Console, data_id: str) -> Dataset:
    """
    Open the tokens that a run was trained on, also if their corpus has changed or is gone, which is a note. Never rebuilds them.

    data_id: of the run's tokens; "" if unknown. Raises DataError as `prepare` does, if the tokens are gone or damaged.
    """
    data = dataclasses.replace(data, rebuild=False)
    folder = None if data.sources else find_by_id(data, data_id)
    with console.progress("preparing") as progress:
        if folder is None:
            dataset = _before_rebuilds(prepare_dataset(data, progress, past=True), data_id)
        else:
            dataset = Dataset(data, {"": open_checked(folder, data, past=True)})
    for note in dataset.notes:
        console.warn(note)
    return dataset


def _before_rebuilds(dataset: Dataset, data_id: str) -> Dataset:
    """Return the sources with the tokens of `data_id`, some of which may have been rebuilt since; `dataset` if there are none."""
    if data_id in ("", dataset.data_id):
        return dataset
    choices = [[part, *map(open_prepared, find_aside(part.folder))] for part in dataset.parts.values()]
    for parts in itertools.product(*choices):
        before = dataclasses.replace(dataset, parts=dict(zip(dataset.parts, parts, strict=True)))
        if before.data_id == data_id:
            return before
    return dataset


def prepare_dataset(
    data: Data, progress: Progress = no_progress, *, rows: int | None = None, past: bool = False
) -> Dataset:
    """Prepare each source of `data` with the same tokenizer, or open it if that was done before. See `prepare`."""
    if not data.sources:
        return Dataset(data, {"": prepare(data, progress, rows=rows, past=past)})
    trains = data.tokenizer == "bpe"
    shared = str(data.kept or _shared_tokenizer(data, data.sources, progress)) if trains else data.tokenizer
    parts = {}
    for name, source in data.sources.items():
        try:
            own = source_data(data, source, shared)
            parts[name] = prepare(own, _named(progress, name), rows=rows, past=past)
        except DataError as error:
            raise DataError(f"data.sources.{name}: {error}") from error
    return Dataset(data, parts)


def is_prepared(data: Data) -> bool:
    """
    Return whether `prepare_dataset` would find all tokens and all indices of rows there. Does not read the corpus.

    Raises DataError if a manifest or a tokenizer cannot be read.
    """
    if not data.sources:
        return prepared_rows(data)[1] is not None
    tokenizer = data.tokenizer
    if tokenizer == "bpe":
        file = data.kept or _shared_tokenizer_file(data, data.sources)
        if not file.is_file():
            return False
        tokenizer = str(file)
    parts = (source_data(data, source, tokenizer) for source in data.sources.values())
    return all(prepared_rows(part)[1] is not None for part in parts)


def source_data(data: Data, source: Source, tokenizer: str) -> Data:
    """Return the options of one source as if it were the only corpus."""
    own = {f.name: getattr(source, f.name) for f in option_fields(Source)}
    return dataclasses.replace(data, sources=None, stages=None, tokenizer=tokenizer, **own)


def _named(progress: Progress, name: str) -> Progress:
    return lambda phase, done, total: progress(f"{name}: {phase}", done, total)


def _shared_tokenizer(data: Data, sources: Mapping[str, BlendSource], progress: Progress) -> Path:
    """Train a tokenizer on text of all sources, each by its weight, or find the one trained before; return its file."""
    path = _shared_tokenizer_file(data, sources)
    if path.is_file():
        return path
    with locked_folder(path.parent, lambda: progress("waiting for another process", 0, 0)):
        if not path.is_file():
            shares = {name: _weight(source) for name, source in sources.items()}
            texts = (
                text
                for name, share in shares.items()
                if share
                for text in _sample(
                    source_data(data, sources[name], "bpe"), share / sum(shares.values()), _named(progress, name)
                )
            )
            tokenizer = tokenize.train_bpe(texts, data.tokenizer_vocab_size, lambda: progress("tokenizer", 0, 0))
            write_atomically(path, [tokenizer.to_json().encode()])
    return path


def _shared_tokenizer_file(data: Data, sources: Mapping[str, BlendSource]) -> Path:
    """Return where the tokenizer trained on these sources is, or will be."""
    key = [[token_options(source_data(data, source, "bpe"), None), _weight(source)] for source in sources.values()]
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
    return Path(data.folder).expanduser() / f"bpe{data.tokenizer_vocab_size}-{digest}" / TOKENIZER


def _weight(source: BlendSource) -> float:
    return 1.0 if source.weight is None else source.weight


def _sample(data: Data, share: float, progress: Progress) -> Sequence[str]:
    """Return this source's share of the text that a tokenizer is trained on."""
    corpus = open_corpus(data, downloads_of(data, progress))
    check_marks(data, downloads_of(data, progress))
    ticks = Ticks(corpus.listing(), progress, corpus.held_out_files)
    split = choose_split(corpus, data.val_fraction, data.bad_records, ticks.of("reading"))
    size = int(data.tokenizer_sample_bytes * share)
    return list(training_sample(corpus, split, size, ticks.training_bytes, ticks.of("sample")))
