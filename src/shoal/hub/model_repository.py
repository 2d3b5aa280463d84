"""The files of a model that `shoal fetch model` downloads: weights in safetensors files, and what is beside them. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from shoal.errors import ModelError, ShoalError
from shoal.hub.find import by_hand, close_names, no_name
from shoal.hub.folder import CONFIG, INDEX, PICKLES, SINGLE, WHY_NO_PICKLES, ModelFolder, shard_names
from shoal.hub.header import parse_object
from shoal.hub.listing import Remote, RemoteFile
from shoal.hub.record import RECORD, fetch_command

# Files beside the weights: config, tokenizer, chat template, license. No code.
WANTED: Final = (
    "*.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.jinja",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class ModelRepository:
    """A model on a hub."""

    name: str
    kind: Literal["model", "dataset"] = "model"
    patterns: tuple[str, ...] = ()
    record: str = RECORD
    error: type[ShoalError] = ModelError

    def command(self, folder: Path) -> str:
        return fetch_command(self.name, folder)

    def by_hand(self, folder: Path) -> str:
        return by_hand(self.name, folder)

    def no_name(self) -> str:
        return no_name(self.name)

    def close_names(self) -> list[str]:
        return close_names(self.name)

    def with_patterns(self, patterns: tuple[str, ...]) -> ModelRepository:
        return self

    def choose(self, remote: Remote, bring: Callable[[RemoteFile], Path]) -> list[RemoteFile]:
        beside, weights = _choose(remote)
        if weights.name == INDEX:  # the small file that lists the others
            return [*beside, weights, *_shards(remote, bring(weights))]
        return [*beside, weights]

    def remark(self, remote: Remote) -> str:
        return ""

    def check_fetched(self, remote: Remote, folder: Path) -> None:
        try:
            ModelFolder.open(folder)
        except ModelError as error:
            raise ModelError(f"{remote.name} is broken on the hub: {error}") from None

    def check_by_hand(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{folder} holds something else: it has no {CONFIG}; set --to to another folder")
        ModelFolder.open(folder)


def _choose(remote: Remote) -> tuple[list[RemoteFile], RemoteFile]:
    """
    Return the files beside the weights, and the weights: one file, or the index.

    Raises `ModelError` if the hub's model lacks config.json or weights in safetensors files.
    """
    top = {name: file for name, file in remote.files.items() if "/" not in name and name != RECORD}
    beside = [
        f for n, f in top.items() if any(fnmatch.fnmatchcase(n, w) for w in WANTED) and not n.endswith(".index.json")
    ]
    found = [name for name in top if name.endswith(".safetensors")]
    if SINGLE in found:
        weights = SINGLE
    elif INDEX in top:
        weights = INDEX
    elif len(found) == 1:
        weights = found[0]
    else:
        raise ModelError(_no_weights(remote.name, found, top))
    if CONFIG not in top:
        raise ModelError(f"{remote.name} has no {CONFIG}, which describes its weights; look for a model that has one")
    return beside, top[weights]


def _no_weights(name: str, found: list[str], files: Iterable[str]) -> str:
    if found:
        return f"{name} has {len(found)} *.safetensors and no {INDEX} that lists their tensors"
    pickles = sorted(f for f in files if any(fnmatch.fnmatchcase(f, pattern) for pattern in PICKLES))
    if not pickles:
        return f"{name} has no *.safetensors; look for a model that has them"
    return (
        f"{name} has only pickled weights ({pickles[0]}): {WHY_NO_PICKLES}; look for a copy with *.safetensors, or for "
        "a pull request on its page that adds them, fetched with --revision refs/pr/N"
    )


def _shards(remote: Remote, index: Path) -> list[RemoteFile]:
    """Return the files that an index names. Raises `ModelError` if the hub lacks one."""
    try:
        names = sorted(set(shard_names(parse_object(index.read_bytes()), index).values()))
    except ValueError as error:
        raise ModelError(f"the {INDEX} of {remote.name} {error}") from None
    absent = [name for name in names if name not in remote.files]
    if absent:
        raise ModelError(f"{remote.name} lacks {absent[0]}, which its {INDEX} names; it is incomplete on the hub")
    return [remote.files[name] for name in names]
