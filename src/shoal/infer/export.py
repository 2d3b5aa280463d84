"""
Exports a checkpoint to a Hugging Face folder, which other programs open without shoal.

The folder is written under a temporary name and renamed when complete. Only one weight file is in memory at a time.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from shoal import __version__
from shoal.checkpoint.convert import STORED_DTYPES, to_hugging_face
from shoal.checkpoint.restore import read_into
from shoal.checkpoint.saved import Saved, read_state, verify
from shoal.config.options import Model
from shoal.config.presets import resolve_shape
from shoal.data.tokens.tokenize import Tokenizer, load_tokenizer
from shoal.errors import ModelError
from shoal.hub.beside import GENERATION, LICENSES, TOKENIZER, Dtypes, copy_files, read_dtypes
from shoal.hub.card import CARD, Facts, model_card
from shoal.hub.folder import CONFIG, INDEX, SINGLE, ModelFolder
from shoal.hub.header import DTYPE_NAMES
from shoal.hub.names import stored_as
from shoal.hub.shape import write_shape
from shoal.infer.out_folder import OutFolder
from shoal.infer.target import find_checkpoint
from shoal.mesh.region import Part
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.system.disk import sync, write_whole

STORED: Final = {name: kind for kind, name in DTYPE_NAMES.items()}
SHARD_BYTES: Final = 5_000_000_000  # approximate size of a weight file, as Hugging Face's tools write them


@dataclass(frozen=True)
class Source:
    """The folder of weights that a run started from."""

    folder: Path
    config: Mapping[str, Any]
    dtypes: Dtypes

    @classmethod
    def of(cls, folder: RunFolder) -> Source | None:
        path = folder.source / CONFIG
        if not path.is_file():
            return None
        return cls(folder.source, json.loads(path.read_text("utf-8")), read_dtypes(folder.source))


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
    Export the checkpoint of `step` (None: the last) of run `target` to the folder `out`; return `out`.

    force: whether to replace an existing export. Raises `RunError` if there is no such run. Other arguments and errors: see
    `export_checkpoint`.
    """
    folder, saved = find_checkpoint(runs, target, step)
    place = OutFolder(out, force)
    export_checkpoint(folder, saved, place, dtype=dtype, license=license, shard_bytes=shard_bytes, console=console)
    return out


def export_checkpoint(
    folder: RunFolder,
    saved: Saved,
    place: OutFolder,
    *,
    dtype: str | None = None,
    license: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
) -> None:
    """
    Export a checkpoint of the run in `folder` to `place`.

    dtype: "float32", "bfloat16" or "float16"; None: each tensor's original dtype if the run started from weights, else
    float32. shard_bytes: approximate size of a weight file. Raises `ModelError` if `place` cannot be written or lacks space, or
    if transformers rejects the export; `CheckpointError` if the checkpoint is damaged.
    """
    console = console or Console(speaks=False)
    config, source = folder.load_config(), Source.of(folder)
    dtypes = Dtypes(STORED[dtype], {}) if dtype else source.dtypes if source else Dtypes("F32", {})
    model = build_model(config.model, compute_dtype=torch.float32)
    shards = list(_shards(model, dtypes, shard_bytes))
    console.note(f"verifying {saved.folder}")
    verify(saved.folder)
    with place.written(sum(size for _, size in shards)) as aside:
        _write_weights(aside, saved, model, [names for names, _ in shards], dtypes, console)
        tokenizer = load_tokenizer(str(folder.tokenizer_file))
        described = _write_config(aside, model, folder, source, tokenizer, dtypes)
        _write_tokenizer(aside, config.model, folder, tokenizer)
        facts = _facts(folder, saved, described, model, dtypes, license)
        _write(aside / CARD, model_card(config, facts))
        # check that every tensor is in a complete file before others open it
        _open_as_others_do(ModelFolder.open(aside), console)


def _open_as_others_do(folder: ModelFolder, console: Console) -> None:
    """
    Build the exported model with transformers on the meta device, if transformers is installed.

    Raises `ModelError` if transformers rejects the config, or expects another tensor or shape.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        console.note("transformers is not installed, so the export was not checked with it (pip install 'shoal[hf]')")
        return
    except Exception as error:  # a broken installation fails in many ways
        console.note(
            f"transformers cannot be imported, so the export was not checked with it ({type(error).__name__}: {error})"
        )
        return
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each of its models raises its own errors
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"transformers {transformers.__version__} cannot open this export ({why})") from error
    theirs = dict(model.named_parameters(remove_duplicate=False))
    there = {id(theirs[name]) for name in theirs.keys() & folder.tensors.keys()}  # a tied embedding has two names
    if missing := next((name for name, parameter in theirs.items() if id(parameter) not in there), None):
        raise ModelError(f"transformers {transformers.__version__} needs {missing}, which this export lacks")
    for name, stored in folder.tensors.items():
        if name in theirs and tuple(theirs[name].shape) != tuple(stored.shape):
            raise ModelError(
                f"transformers {transformers.__version__} expects {name} of shape {list(theirs[name].shape)}; this export has {list(stored.shape)}"
            )


def _shards(model: LanguageModel, dtypes: Dtypes, shard_bytes: int) -> Iterator[tuple[list[str], int]]:
    """Yield shoal's parameter names in groups of about `shard_bytes`, with their bytes; parts of one HF tensor stay together."""
    tensors: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        theirs = stored_as(model.shape.family, name).name
        size = parameter.numel() * STORED_DTYPES[dtypes.of(theirs)].itemsize
        tensors.setdefault(theirs, []).append((name, size))
    group: list[str] = []
    total = 0
    for pieces in tensors.values():
        size = sum(size for _, size in pieces)
        if group and total + size > shard_bytes:
            yield group, total
            group, total = [], 0
        group += [name for name, _ in pieces]
        total += size
    yield group, total


def _write_weights(
    aside: Path, saved: Saved, model: LanguageModel, shards: list[list[str]], dtypes: Dtypes, console: Console
) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        console.note(f"writing {file}")
        parameters = {n: torch.empty(shapes[n]) for n in names}
        read_into(saved, {f"model.{n}": Part.whole(t) for n, t in parameters.items()})
        weights = to_hugging_face(model.shape.family, parameters)
        tensors = {n: t.to(STORED_DTYPES[dtypes.of(n)]) for n, t in weights.items()}
        if number == 1:
            tensors |= {name: tensor.contiguous() for name, tensor in model.constants().items()}
        save_file(tensors, aside / file, metadata={"format": "pt"})
        # Safetensors leaves the mode of a temporary file, readable by its owner only
        (aside / file).chmod(0o666 & ~_umask())
        sync(aside / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write(aside / INDEX, _json(index))


def _umask() -> int:
    """Return the umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_config(
    aside: Path, model: LanguageModel, folder: RunFolder, source: Source | None, tokenizer: Tokenizer, dtypes: Dtypes
) -> dict[str, Any]:
    """Write `config.json` and the source weights' licenses; return the config."""
    config = write_shape(resolve_shape(model.shape), source.config if source else None)
    config["architectures"] = config.get("architectures") or [model.architecture]
    config.pop("torch_dtype", None)
    config["dtype" if source and "dtype" in source.config else "torch_dtype"] = dtypes.name
    if source is None or folder.tokenizer_files != source.folder:  # the source config names tokens of another tokenizer
        config |= _ends(tokenizer)
    if source is not None:
        copy_files(source.folder, aside, LICENSES)
    _write(aside / CONFIG, _json(config))
    return config


def _ends(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eot_id}


def _write_tokenizer(aside: Path, model: Model, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's original files, with its chat template; or write shoal's own tokenizer and its description."""
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
    model: LanguageModel,
    dtypes: Dtypes,
    license: str | None,
) -> Facts:
    metrics = read_metrics(folder.metrics_file)
    return Facts(
        name=folder.path.name,
        architecture=str(described["architectures"][0]),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtypes.name,
        step=saved.step,
        tokens=int(read_state(saved.folder)["tokens"]),
        license=license,
        steps=metrics.steps,
        evaluations=metrics.evaluations,
        version=__version__,
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, [text.encode()])
