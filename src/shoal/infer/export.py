"""
A checkpoint -> a folder as Hugging Face lays it out, which needs no code of ours to be opened.

The folder is written aside and renamed when it is whole. Weights pass through memory a file at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from shoal import __version__
from shoal.checkpoint.convert import DTYPES, to_hugging_face
from shoal.checkpoint.store import Saved, read_into, read_state, verify
from shoal.config import Model
from shoal.data.tokenize import Tokenizer, load_tokenizer
from shoal.disk import sync, write_whole
from shoal.errors import ModelError
from shoal.hub.beside import GENERATION, LICENSES, TOKENIZER, copy_files
from shoal.hub.card import Facts, model_card
from shoal.hub.folder import CONFIG, INDEX, SINGLE, ModelFolder
from shoal.hub.names import place
from shoal.hub.shape import write_shape
from shoal.infer.target import find_checkpoint
from shoal.metrics.console import Console
from shoal.metrics.trackers import read_json_lines
from shoal.models.build import build_model
from shoal.parallel.region import Part
from shoal.presets import resolve_shape
from shoal.runs import RunFolder

NAMES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES: Final = 5_000_000_000  # of a file of weights, about: what the hub's tools make


@dataclass(frozen=True)
class Source:
    """What a run started from, where that was a folder."""

    config: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, folder: RunFolder) -> Source | None:
        path = folder.source / CONFIG
        return cls(json.loads(path.read_text("utf-8")), folder.source) if path.is_file() else None


def export_run(
    runs: Path,
    target: str,
    *,
    step: int | None,
    out: Path,
    dtype: str | None = None,
    license: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    console: Console | None = None,
) -> Path:
    """
    Write the checkpoint of `step` (None: the last) of run `target` to the folder `out`.

    dtype: "float32", "bfloat16" or "float16"; None: that of the weights it started from, else float32.
    Raises `ModelError` where `out` is taken, cannot be written or has no space; `CheckpointError`, `RunError`.
    """
    console = console or Console(speaks=False)
    folder, saved = find_checkpoint(runs, target, step)
    config, source = folder.load_config(), Source.of(folder)
    kind = NAMES[dtype] if dtype else _first_dtype(source)
    shapes = _shapes(config.model)
    shards = list(_shards(config.model.family, shapes, DTYPES[kind].itemsize, shard_bytes))
    aside = _make_aside(out, sum(size for _, size in shards), force)
    try:
        console.note(f"verifying {saved.folder}")
        verify(saved.folder)
        _write_weights(aside, saved, config.model.family, shapes, [names for names, _ in shards], DTYPES[kind], console)
        tokenizer = load_tokenizer(str(folder.tokenizer_file))
        described = _write_config(aside, config.model, folder, source, tokenizer, DTYPES[kind])
        _write_tokenizer(aside, config.model, folder, tokenizer)
        facts = _facts(folder, saved, described, shapes, DTYPES[kind], license)
        _write(aside / "README.md", model_card(config, facts))
        ModelFolder.open(aside)  # what others will open: every tensor in a whole file
        _put_in_place(aside, out)
    except OSError as error:
        raise ModelError(f"{out} could not be written: {error.strerror or error}; set --out to another disk") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _first_dtype(source: Source | None) -> str:
    said = str((source.config.get("torch_dtype") or source.config.get("dtype")) if source else "")
    return NAMES.get(said, "F32")


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of all parameters, in the model's order."""
    return {n: tuple(p.shape) for n, p in build_model(model, compute_dtype=torch.float32).named_parameters()}


def _shards(
    family: str, shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> Iterator[tuple[list[str], int]]:
    """Our names in groups of about `shard_bytes`, with their bytes; what is one tensor of theirs stays together."""
    tensors: dict[str, list[str]] = {}
    for name in shapes:
        tensors.setdefault(place(family, name).name, []).append(name)
    group: list[str] = []
    total = 0
    for names in tensors.values():
        size = sum(itemsize * torch.Size(shapes[n]).numel() for n in names)
        if group and total + size > shard_bytes:
            yield group, total
            group, total = [], 0
        group += names
        total += size
    yield group, total


def _make_aside(out: Path, needed: int, force: bool) -> Path:
    """An empty folder beside `out`, on a disk that has the space."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is there already; --force replaces it, or set --out to another folder")
    aside = out.absolute().with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error.strerror}; set --out to a folder that can") from error
    if free < needed:
        shutil.rmtree(aside, ignore_errors=True)
        raise ModelError(
            f"{out} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; set --out to another disk, or "
            "--dtype to bfloat16"
        )
    return aside


def _write_weights(
    aside: Path,
    saved: Saved,
    family: str,
    shapes: Mapping[str, tuple[int, ...]],
    shards: list[list[str]],
    dtype: torch.dtype,
    console: Console,
) -> None:
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        console.note(f"writing {file}")
        parameters = {n: torch.empty(shapes[n]) for n in names}
        read_into(saved, {f"model.{n}": Part.whole(t) for n, t in parameters.items()})
        tensors = {n: t.to(dtype) for n, t in to_hugging_face(family, parameters).items()}
        save_file(tensors, aside / file, metadata={"format": "pt"})
        sync(aside / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write(aside / INDEX, _json(index))


def _write_config(
    aside: Path, model: Model, folder: RunFolder, source: Source | None, tokenizer: Tokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    """`config.json`, which is given back, and the licences that the weights came with."""
    config = write_shape(resolve_shape(model), source.config if source else None)
    config.pop("torch_dtype", None)
    config["dtype" if source and "dtype" in source.config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if source is None or folder.tokenizer_files != source.folder:  # it names tokens of another tokenizer
        config |= _ends(tokenizer)
    if source is not None:
        copy_files(source.folder, aside, LICENSES)
    _write(aside / CONFIG, _json(config))
    return config


def _ends(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eot_id}


def _write_tokenizer(aside: Path, model: Model, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """All files that it came with, its chat template among them; or one of our own and what others need to know of it."""
    if folder.tokenizer_files is not None:
        copy_files(folder.tokenizer_files, aside, TOKENIZER)
        return
    _write(aside / "tokenizer.json", tokenizer.to_json())
    special = {"eos_token": tokenizer.decode([tokenizer.eot_id])}
    if tokenizer.bos_id is not None:
        special["bos_token"] = tokenizer.decode([tokenizer.bos_id])
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    _write(aside / "tokenizer_config.json", _json(described))
    _write(aside / GENERATION, _json({key: value for key, value in _ends(tokenizer).items() if value is not None}))


def _facts(
    folder: RunFolder,
    saved: Saved,
    described: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    license: str | None,
) -> Facts:
    return Facts(
        name=folder.path.name,
        architecture=str(described["architectures"][0]),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        dtype=str(dtype).removeprefix("torch."),
        step=saved.step,
        tokens=int(read_state(saved.folder)["tokens"]),
        license=license,
        metrics=read_json_lines(folder.metrics_file),
        version=__version__,
    )


def _put_in_place(aside: Path, out: Path) -> None:
    sync(aside)
    old = out.absolute().with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, [text.encode()])
