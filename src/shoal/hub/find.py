"""The place of a model on this machine, by folder or by name. No torch, and no network."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from shoal.errors import ModelError
from shoal.hub.record import MODELS, fetch_command, load_record
from shoal.system.output import on_one_line

__all__ = [
    "MODELS",
    "by_hand",
    "check_name",
    "close_names",
    "could_be_on_a_hub",
    "find_model",
    "find_path",
    "near_path",
    "no_name",
]


NAMES_COMPARED = 10_000  # file names in one folder; comparing more would take longer than a hint is worth


def find_model(name: str, kept: Path | None = None) -> Path:
    """
    Return the folder of a model: `name` itself, else `models/NAME`, else its folder in Hugging Face's cache, else `kept`.

    kept: a run's copy of everything but the weights. Raises `ModelError` if no folder is found, or if files of a
    fetched folder are missing or cut short.
    """
    for place in (name, str(MODELS / name)):
        folder = find_path(place)
        if folder is not None and folder.is_dir():
            return _whole(folder)
    return _in_cache(name) or kept or _refuse(name)


def find_path(name: str) -> Path | None:
    """
    Return the path of a file or folder, with `~` expanded as in a shell; None if it does not exist.

    Raises `ModelError` if its existence cannot be determined: no permission, an unknown `~user`, a name that is too long.
    """
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot look for {on_one_line(name)}: {why}") from error


def near_path(path: str) -> str:
    """Return a hint for a missing `path`, such as " (did you mean books/a.txt?)"; empty if there is none."""
    if any(sign in path for sign in "*?["):
        return " (no file matches this pattern)"
    try:
        whole = Path(path).expanduser()
        there = whole
        while there != there.parent and not there.parent.is_dir():
            there = there.parent  # the first missing part
        beside = [entry.name for entry in islice(os.scandir(there.parent), NAMES_COMPARED)]
        near = [there.parent / name for name in difflib.get_close_matches(there.name, beside, 3)]
        whole_ones = [deeper for path in near if (deeper := path / whole.relative_to(there)).exists()]
    except (OSError, RuntimeError, ValueError):  # no permission, or an unknown `~user`: there is no hint
        return ""
    return f" (did you mean {' or '.join(map(str, whole_ones or near))}?)" if near else ""


def by_hand(name: str, folder: Path) -> str:
    """Return instructions to provide a model without a network."""
    cached = _in_cache(name)
    if cached:
        return f"without a network, shoal reads it from {cached}, Hugging Face's cache"
    return (
        f"without a network, put {name}'s config.json, *.safetensors (with model.safetensors.index.json if there are "
        f"several), tokenizer.json, tokenizer_config.json and generation_config.json into {folder}"
    )


def check_name(name: str) -> None:
    """Raise `ModelError` unless `name` could be a model on a hub, and is therefore safe as a folder's name."""
    if not could_be_on_a_hub(name):
        raise ModelError(no_name(name))


def no_name(name: str) -> str:
    """Return the message for an invalid name."""
    return f"{name!r} is not a model's name; use OWNER/NAME, as shown on the model's page on the hub"


def could_be_on_a_hub(name: str) -> bool:
    """Return whether `name` has the form NAME or OWNER/NAME."""
    parts = name.split("/")
    return len(parts) <= 2 and all(p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts)


def close_names(name: str) -> list[str]:
    """Return the models on this machine with a name similar to `name`, as a whole or in the part after the slash."""
    known: dict[str, str] = {}
    for model in sorted({*_names_under(MODELS), *_names_in_cache()}):
        known.setdefault(model.lower(), model)
        known.setdefault(_base(model).lower(), model)
    close = [c for n in (name, _base(name)) for c in difflib.get_close_matches(n.lower(), known)]
    return list(dict.fromkeys(known[c] for c in close))


def _whole(folder: Path) -> Path:
    record = load_record(folder)
    problem = record.missing(folder) if record else ""
    if record and problem:
        raise ModelError(f"{problem}; {fetch_command(record.name, folder)} fetches it again")
    return folder


def _refuse(name: str) -> Path:
    close = close_names(name)
    meant = f". Did you mean {' or '.join(close)}?" if close else ""
    if not could_be_on_a_hub(name):
        raise ModelError(f"there is no folder {on_one_line(name)}{meant}")
    folder = MODELS / name
    if folder.with_name(f".{folder.name}.partial").is_dir():
        raise ModelError(
            f"{folder} is not complete yet; {fetch_command(name, folder)} resumes the fetch, or waits for another process"
        )
    raise ModelError(
        f"there is no folder {name} and no {folder}{meant or ';'} {fetch_command(name, folder)} fetches it; {by_hand(name, folder)}"
    )


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _names_under(folder: Path) -> Iterator[str]:
    for pattern in ("*/config.json", "*/*/config.json"):
        for path in folder.glob(pattern):
            found = path.parent.relative_to(folder)
            if not found.name.startswith("."):  # an unfinished fetch
                yield found.as_posix()


# --- the cache of huggingface_hub --------------------------------------------------------------------------


def _cache() -> Path:
    """
    Return Hugging Face's cache, found as huggingface_hub does. Importing that library would take longer.

    Raises `ModelError` if the cache is in an unknown user's home.
    """
    above = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    below = Path(os.environ.get("HF_HOME") or above) / "hub"
    folder = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or below)
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ModelError(f"cannot look for models in {folder}: {error} Set HF_HUB_CACHE to a folder") from error


def _in_cache(name: str) -> Path | None:
    """Return the snapshot of a model's main branch, if it has a config and weights."""
    if not could_be_on_a_hub(name):
        return None
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    if not commit.isalnum():
        return None
    snapshot = folder / "snapshots" / commit
    has_weights = any(path.is_file() for path in snapshot.glob("*.safetensors"))
    return snapshot if has_weights and (snapshot / "config.json").is_file() else None


def _names_in_cache() -> Iterator[str]:
    for folder in _cache().glob("models--*"):
        name = folder.name.removeprefix("models--").replace("--", "/")
        if _in_cache(name):
            yield name
