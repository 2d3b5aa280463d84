"""The files beside the weights in a folder: tokenizer, generation config, license. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.errors import ModelError
from shoal.hub.folder import CONFIG, HEADERS, ModelFolder
from shoal.hub.header import DTYPE_NAMES
from shoal.hub.names import spellings
from shoal.system.disk import sync, write_whole

GENERATION: Final = "generation_config.json"
TOKENIZER: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tekken.json",
    GENERATION,  # names token ids
)  # fmt: skip
LICENSES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
OF_MODEL: Final = (CONFIG, *LICENSES)


def keep(folder: Path, names: tuple[str, ...], copy: Path) -> None:
    """Copy to `copy` those of `names` that `folder` has, so that an export works without `folder`. Keep an existing copy."""
    if copy.is_dir():
        return
    aside = copy.with_name(f".{copy.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    copy_files(folder, aside, names)
    sync(aside)
    aside.rename(copy)


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a folder's weights, by safetensors' names: the most common one, and exceptions by tensor."""

    most: str
    others: Mapping[str, str]

    @property
    def name(self) -> str:
        """The most common dtype, by config.json's name."""
        return DTYPE_NAMES[self.most]

    def of(self, tensor: str) -> str:
        return next((self.others[s] for s in spellings(tensor) if s in self.others), self.most)


def keep_headers(model: ModelFolder, copy: Path) -> None:
    """Record the weights' dtypes and shapes in `copy`: config.json may state another dtype, and the folder may be deleted."""
    others = {name: e.dtype for name, e in model.tensors.items() if e.dtype != model.dtype}
    tensors = {name: (entry.dtype, entry.shape) for name, entry in model.tensors.items()}
    write_whole(copy / HEADERS, [json.dumps({"dtype": model.dtype, "others": others, "tensors": tensors}).encode()])


def read_dtypes(copy: Path) -> Dtypes:
    """Return the dtypes that `keep_headers` wrote."""
    said = json.loads((copy / HEADERS).read_text("utf-8"))
    return Dtypes(said["dtype"], said["others"])


def _refuse_stray(folder: Path, path: Path) -> None:
    """
    Raise `ModelError` if `path` is a link out of `folder`.

    The copy of the linked file may be published, and a downloaded folder may contain `LICENSE -> ~/.ssh/id_rsa`. Links into the
    `blobs` of Hugging Face's cache are allowed, since all its snapshots consist of them.
    """
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and target.parent.name != "blobs":
        raise ModelError(
            f"{path} links out of its folder to {target}, whose content would be copied with the model; replace the link "
            "by the file"
        )


def copy_files(folder: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy to `target` those of `names` that exist in `folder`; return them. Raises `ModelError` for a link out of `folder`."""
    found = [name for name in names if (folder / name).is_file()]
    for name in found:
        _refuse_stray(folder, folder / name)
        shutil.copyfile(folder / name, target / name)
    return found
