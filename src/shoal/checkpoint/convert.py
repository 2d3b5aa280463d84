"""
Conversion between Hugging Face weight files and shoal's parameters, one region at a time.

A rank reads only the rows and columns that it holds: the files are memory-mapped, and only the requested slices are
read. shoal's weights are float32, whatever the dtype in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from shoal.config.families import FAMILIES, Stored
from shoal.errors import ModelError
from shoal.hub.folder import Entry, ModelFolder
from shoal.hub.header import DTYPE_NAMES
from shoal.hub.names import is_computed, spellings, stored_as

ROWS_AT_A_TIME: Final = 4096
STORED_DTYPES: Final[dict[str, torch.dtype]] = {kind: getattr(torch, name) for kind, name in DTYPE_NAMES.items()}


class FolderWeights:
    """
    The weights of a Hugging Face folder as a model's parameters. Call the object to fill a region of a parameter.

    The constructor raises `ModelError` if the folder lacks a parameter, has a parameter of another shape or an unsupported
    dtype, has weights that the model does not use, or has tied tensors that differ. It reads the values of tied tensors only.
    """

    def __init__(
        self,
        folder: ModelFolder,
        family: str,
        shapes: Mapping[str, tuple[int, ...]],
        other_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """other_names: a map from each alternative name in the files to the parameter that it names."""
        self._family, self._other_names = family, other_names
        native = FAMILIES[family].native
        if folder.is_kept:
            raise ModelError(
                f"the initial weights of this run are gone, and it has no checkpoint yet; set model.from to their new location "
                f"({folder.path} keeps everything but the weights)"
            )
        # Opened now: if the folder is replaced later, open files keep the old contents.
        self._files = {file: safe_open(str(file), framework="pt") for file in folder.files}
        self._entries = {name: self._find(folder, name, shape) for name, shape in shapes.items()}
        used = {entry_name for entry_name, _ in self._entries.values()}
        tied = native and "head.weight" not in shapes
        twins = {stored_as(family, "head.weight").name: "embed.weight"} if tied else dict(other_names)
        for name in set(folder.tensors) - used & twins.keys():
            self._check_twin(folder.tensors[name], name, twins[name])
        strange = [n for n in folder.tensors if n not in used and n not in twins and not is_computed(n)]
        if strange:
            through = " Set model.family to hf to have transformers compute it" if native else ""
            raise ModelError(
                f"{folder.path} has weights that this model does not use: {_some(strange)}; does its config.json belong to "
                f"another model?{through}"
            )

    def _find(self, folder: ModelFolder, name: str, shape: tuple[int, ...]) -> tuple[str, Entry]:
        there = stored_as(self._family, name)
        others = [theirs for theirs, ours in self._other_names.items() if ours == name]
        found = next((s for s in (*spellings(there.name), *others) if s in folder.tensors), None)
        if found is None:
            raise ModelError(
                f"{folder.path} has no weight {there.name}, which its config.json requires; it belongs to another model, or "
                "one of its files is missing"
            )
        entry = folder.tensors[found]
        if entry.dtype not in STORED_DTYPES:
            raise ModelError(
                f"{entry.file}: {found} is {entry.dtype}; readable dtypes are {', '.join(STORED_DTYPES)}. Dequantize "
                "a quantized model first"
            )
        expected = _their_shape(there, shape)
        if entry.shape != expected:
            raise ModelError(
                f"{entry.file}: {found} has shape {list(entry.shape)}, but config.json implies {list(expected)}"
            )
        return found, entry

    def _check_twin(self, entry: Entry, name: str, first: str) -> None:
        """
        Raise `ModelError` if a tied tensor differs from its parameter, since its values would be lost.

        transformers silently unties tensors that differ in the files; here they must be equal if the config ties them.
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
                f"{entry.file}: {name} differs from {found}, but the config ties them; set tie_word_embeddings to false in its "
                "config.json, or remove the wrong tensor"
            )

    def _stored(self, entry: Entry, name: str) -> Any:
        """Return a tensor of a file as a sliceable handle, without reading it."""
        return self._files[entry.file].get_slice(name)  # type: ignore[no-untyped-call]

    def __call__(self, out: Tensor, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> None:
        """Fill `out` with the region `slices` of the parameter `name`, whose whole shape is `shape`."""
        there = stored_as(self._family, name)
        found, entry = self._entries[name]
        stored = self._stored(entry, found)
        rows = slices[0]
        start = there.part * shape[0]
        rows = slice(rows.start + start, rows.stop + start)
        if there.transposed:
            out.copy_(stored[slices[1], rows].t())
        else:
            out.copy_(stored[(rows, *slices[1:])])


def _their_shape(there: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    whole = (shape[0] * there.parts, *shape[1:])
    return whole[::-1] if there.transposed else whole


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def to_hugging_face(family: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Convert whole parameters to tensors with Hugging Face's names and layout.

    `parameters` must contain all parts of each Hugging Face tensor (see `hub.names`).
    """
    gathered: dict[str, list[tuple[Stored, Tensor]]] = {}
    for name, tensor in parameters.items():
        there = stored_as(family, name)
        gathered.setdefault(there.name, []).append((there, tensor))
    out = {}
    for theirs, pieces in gathered.items():
        pieces.sort(key=lambda piece: piece[0].part)
        assert len(pieces) == pieces[0][0].parts, theirs
        whole = torch.cat([t for _, t in pieces]) if len(pieces) > 1 else pieces[0][1]
        out[theirs] = (whole.t() if pieces[0][0].transposed else whole).contiguous()
    return out
