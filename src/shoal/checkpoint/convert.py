"""
Weights in Hugging Face's files <-> our parameters, a region at a time.

A process reads the rows and columns that it holds and no more: the files are mapped, and a slice of a tensor is a
slice of a file. Weights are float32 here, whatever they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from shoal.errors import ModelError
from shoal.hub.folder import Entry, ModelFolder
from shoal.hub.header import DTYPE_NAMES
from shoal.hub.names import Place, is_computed, place, spellings

ROWS_AT_A_TIME: Final = 4096
STORED_DTYPES: Final[dict[str, torch.dtype]] = {kind: getattr(torch, name) for kind, name in DTYPE_NAMES.items()}


class FolderWeights:
    """
    The weights of a folder as the parameters of a model of ours, called to fill a region of one.

    Raises `ModelError` at once, before a byte of weights is read, where the folder lacks a parameter, has one of
    another shape or dtype, or holds weights that the model has no place for.
    """

    def __init__(
        self,
        folder: ModelFolder,
        family: str,
        shapes: Mapping[str, tuple[int, ...]],
        other_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """other_names: names that files may have, and the parameter that each is."""
        self._family, self._other_names = family, other_names
        if folder.is_kept:
            raise ModelError(
                f"the weights that this run is to start from are gone, and it has no checkpoint yet; set model.from to where they "
                f"are now ({folder.path} keeps all but the weights)"
            )
        # Opened now: a folder that is replaced meanwhile leaves the old files to those who have them open.
        self._files = {file: safe_open(str(file), framework="pt") for file in folder.files}
        self._entries = {name: self._find(folder, name, shape) for name, shape in shapes.items()}
        used = {entry_name for entry_name, _ in self._entries.values()}
        twins = dict(other_names) if "head.weight" in shapes or family == "hf" else {"lm_head.weight": "embed.weight"}
        for name in set(folder.tensors) - used & twins.keys():
            self._check_twin(folder.tensors[name], name, twins[name])
        strange = [n for n in folder.tensors if n not in used and n not in twins and not is_computed(n)]
        if strange:
            through = "" if family == "hf" else " Set model.family to hf to have transformers compute it"
            raise ModelError(
                f"{folder.path} has weights that this model has no place for: {_some(strange)}; is its config.json of "
                f"another model?{through}"
            )

    def _find(self, folder: ModelFolder, name: str, shape: tuple[int, ...]) -> tuple[str, Entry]:
        there = place(self._family, name)
        others = [theirs for theirs, ours in self._other_names.items() if ours == name]
        found = next((s for s in (*spellings(there.name), *others) if s in folder.tensors), None)
        if found is None:
            raise ModelError(
                f"{folder.path} has no weight {there.name}, which its config.json asks for; it is of another model, or "
                "a file of it is missing"
            )
        entry = folder.tensors[found]
        if entry.dtype not in STORED_DTYPES:
            raise ModelError(
                f"{entry.file}: {found} is {entry.dtype}; weights are read from {', '.join(STORED_DTYPES)}. A quantised "
                "model must be made plain first"
            )
        expected = _their_shape(there, shape)
        if entry.shape != expected:
            raise ModelError(
                f"{entry.file}: {found} is {list(entry.shape)}, and by config.json it would be {list(expected)}"
            )
        return found, entry

    def _check_twin(self, entry: Entry, name: str, first: str) -> None:
        """
        A tensor that is a parameter under another of its names must hold the same, or it would be lost.

        transformers unties what differs in the files; here a config that says "tied" is taken at its word or refused.
        """
        found, other = self._entries.get(first, (name, entry))
        if found == name:
            return
        one, two = self._stored(entry, name), self._stored(other, found)
        same = entry.shape == other.shape
        for start in range(0, entry.shape[0] if same else 0, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            same = same and torch.equal(one[rows], two[rows])
        if not same:
            raise ModelError(
                f"{entry.file}: {name} is not {found}, and the config says that they are one (tied); set "
                "tie_word_embeddings to false in its config.json, or remove the one that is not meant"
            )

    def _stored(self, entry: Entry, name: str) -> Any:
        """A tensor of a file, of which slices can be read."""
        return self._files[entry.file].get_slice(name)  # type: ignore[no-untyped-call]

    def __call__(self, out: Tensor, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> None:
        """Fill `out` with a region of the parameter `name`, which is `shape` as a whole."""
        there = place(self._family, name)
        found, entry = self._entries[name]
        stored = self._stored(entry, found)
        rows = slices[0]
        start = there.part * shape[0]
        rows = slice(rows.start + start, rows.stop + start)
        if there.transposed:
            out.copy_(stored[slices[1], rows].t())
        else:
            out.copy_(stored[(rows, *slices[1:])])


def _their_shape(there: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    whole = (shape[0] * there.parts, *shape[1:])
    return whole[::-1] if there.transposed else whole


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def to_hugging_face(family: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Whole parameters of ours -> tensors as Hugging Face names and lays them out.

    All parts of a tensor of theirs must be among `parameters` (see `hub.names`).
    """
    gathered: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, tensor in parameters.items():
        there = place(family, name)
        gathered.setdefault(there.name, []).append((there, tensor))
    out = {}
    for theirs, pieces in gathered.items():
        pieces.sort(key=lambda piece: piece[0].part)
        assert len(pieces) == pieces[0][0].parts, theirs
        whole = torch.cat([t for _, t in pieces]) if len(pieces) > 1 else pieces[0][1]
        out[theirs] = (whole.t() if pieces[0][0].transposed else whole).contiguous()
    return out
