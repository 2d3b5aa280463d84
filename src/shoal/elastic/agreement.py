"""The settings that all nodes of a run must share, and how those of two nodes differ."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

import shoal
from shoal.config.keys import options_of
from shoal.config.options import Config

# Options that may differ between nodes: each may have its own copy of the data, and its own speed.
_OF_A_PLACE: Final = {
    ("data", "paths"), ("data", "folder"), ("data", "tokenizer"), ("model", "from_"), ("checkpoint", "fast"),
    ("metrics", "peak_tflops"),
}  # fmt: skip
_OF_THE_WORLD: Final = ("launch.nodes", "launch.min_nodes", "launch.processes")  # the others of `launch` may differ


def shared_settings(config: Config, *, sizes: bool = True) -> dict[str, object]:
    """
    Return what must match on all nodes: versions, code, kind of device, the size of the world, and options.

    Paths, speeds and most options of `launch` are not included. sizes: whether options of `launch` set the size of the world.
    """
    on_gpus = config.train.device != "cpu" and torch.cuda.is_available()
    found: dict[str, object] = {
        "shoal": shoal.__version__,
        "shoal's code": code_digest(),
        "torch": torch.__version__.partition("+")[0],
        "the device": "cuda" if on_gpus else "cpu",
    }
    if on_gpus and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for key, (f, value) in options_of(config).items():
        section = key.partition(".")[0]
        if (sizes and key in _OF_THE_WORLD) or (section != "launch" and (section, f.name) not in _OF_A_PLACE):
            found[key] = value
    return found


def code_digest(folder: Path | None = None) -> str:
    """Return the first 12 digits of the SHA-256 of shoal's source files; folder: of the files in another folder."""
    root = folder or Path(shoal.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def difference(mine: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """Return "optim.lr is 0.1 here and 0.2 there" for each of the first few settings that differ."""
    keys = [key for key in [*theirs, *(k for k in mine if k not in theirs)] if mine.get(key) != theirs.get(key)]
    more = f", and {len(keys) - 4} more differ" if len(keys) > 4 else ""
    return ", ".join(f"{key} is {mine.get(key)} here and {theirs.get(key)} there" for key in keys[:4]) + more


def most_common(settings: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the first of the settings that most nodes have."""
    texts = [json.dumps(each, sort_keys=True) for each in settings]
    counts = Counter(texts)
    return max(range(len(texts)), key=lambda index: (counts[texts[index]], -index))
