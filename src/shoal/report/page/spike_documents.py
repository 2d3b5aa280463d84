"""
The documents of the steps at which the loss spiked, read from the run's prepared data. No torch.

A report may read the data. The dashboard may not, because it serves nothing outside the folder of runs: it shows what a report
has left in the run's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shoal.errors import ShoalError
from shoal.run.folder import RunFolder
from shoal.system.disk import write_whole
from shoal.system.output import visible

DOCUMENTS: Final = 8  # of a step
TOKENS: Final = 48  # read of each document
CHARACTERS: Final = 100  # shown of each document
Spike = tuple[int, float]  # step and spike score: a step that is taken again after a rollback has another score


def spike_documents(folder: RunFolder, spikes: Sequence[Spike], *, reads_data: bool) -> Mapping[Spike, list[str]]:
    """
    Return the first documents of each spike's step, each as its number and its beginning.

    reads_data: read those that the cache lacks from the run's data, and keep them there. Omits a spike if its data is gone, was
    made again from other text, or would first have to be prepared.
    """
    cache = folder.path / "cache" / "documents.json"
    kept = _kept(cache)
    lacking = [spike for spike in spikes if spike not in kept]
    if lacking and reads_data:
        try:
            kept |= _read(folder, lacking)
            cache.parent.mkdir(exist_ok=True)
            write_whole(cache, [json.dumps([[*spike, texts] for spike, texts in kept.items()]).encode()])
        except (OSError, ValueError, IndexError, ShoalError):
            pass  # the page then has the command that names the documents, and says what is wrong
    return kept


def _kept(cache: Path) -> dict[Spike, list[str]]:
    try:
        return {(step, score): texts for step, score, texts in json.loads(cache.read_bytes())}
    except (OSError, ValueError, TypeError):
        return {}


def _read(folder: RunFolder, spikes: Sequence[Spike]) -> dict[Spike, list[str]]:
    """Read the documents of these steps. Raises `DataError`, OSError, ValueError or IndexError if that cannot be done."""
    from shoal.data.dataset import is_prepared, open_past
    from shoal.data.document_index import has_documents
    from shoal.data.where import Finder, Timeline
    from shoal.run.console import Console

    config = folder.load_config()
    if not is_prepared(config.data):
        return {}  # a report must not begin hours of work
    timeline, header = Timeline.of_ledger(folder.ledger_file, config.train.micro_batch)
    dataset = open_past(config.data, Console(speaks=False), header.data_id)
    # nor the minutes in which documents are found in a large token file
    if dataset.data_id != header.data_id or not all(has_documents(part, "train") for part in dataset.parts.values()):
        return {}
    finder = Finder.of(dataset, header.order, timeline)
    found: dict[Spike, list[str]] = {}
    for step, score in spikes:
        wanted = dict.fromkeys((seen.source, number) for seen in finder.at(step) for number in seen.documents)
        texts = found[step, score] = []
        for source, number in list(wanted)[:DOCUMENTS]:
            first, stop = finder.documents[source].document_span(number)
            part = dataset.parts[source]
            tokens = part.streams["train"].read(first, min(stop, first + TOKENS)).tolist()
            beginning = " ".join(visible(part.tokenizer.decode(tokens)).split())
            cut = len(beginning) > CHARACTERS or stop - first > TOKENS
            texts.append(f"{f'{source}:' if source else ''}{number}: {beginning[:CHARACTERS]}{'…' if cut else ''}")
        if len(wanted) > DOCUMENTS:
            texts.append(f"and {len(wanted) - DOCUMENTS:,} more")
    return found
