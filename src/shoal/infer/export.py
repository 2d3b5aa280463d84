"""
A checkpoint -> a folder as Hugging Face lays it out, which needs no code of ours to be opened.

The folder is written aside and renamed when it is whole. Weights pass through memory a file at a time.
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
from shoal.hub.names import place
from shoal.hub.shape import write_shape
from shoal.infer.out_folder import OutFolder
from shoal.infer.target import find_checkpoint
from shoal.mesh.region import Part
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.run.console import Console
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.system.disk import sync, write_whole

STORED: Final = {name: kind for kind, name in DTYPE_NAMES.items()}
SHARD_BYTES: Final = 5_000_000_000  # of a file of weights, about: what the hub's tools make
WRITTEN: Final = (CARD, CONFIG, INDEX, "*.safetensors", *TOKENIZER, *LICENSES)


@dataclass(frozen=True)
class Source:
    """What a run started from, where that was a folder."""

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
    Write the checkpoint of `step` (None: the last) of run `target` to the folder `out`.

    dtype: "float32", "bfloat16" or "float16"; None: each tensor's as it was where the run started from weights, else
    float32. force: replace an export that is there. Raises `ModelError` where `out` is taken, cannot be written or has no
    space; `CheckpointError`, `RunError`.
    """
    console = console or Console(speaks=False)
    folder, saved = find_checkpoint(runs, target, step)
    config, source = folder.load_config(), Source.of(folder)
    dtypes = Dtypes(STORED[dtype], {}) if dtype else source.dtypes if source else Dtypes("F32", {})
    model = build_model(config.model, compute_dtype=torch.float32)
    shards = list(_shards(model, dtypes, shard_bytes))
    place = OutFolder(out, force)
    console.note(f"verifying {saved.folder}")
    verify(saved.folder)
    with place.written(sum(size for _, size in shards)) as aside:
        _write_weights(aside, saved, model, [names for names, _ in shards], dtypes, console)
        tokenizer = load_tokenizer(str(folder.tokenizer_file))
        described = _write_config(aside, model, folder, source, tokenizer, dtypes)
        _write_tokenizer(aside, config.model, folder, tokenizer)
        facts = _facts(folder, saved, described, model, dtypes, license)
        _write(aside / CARD, model_card(config, facts))
        # what others will open: every tensor in a whole file
        _open_as_others_do(ModelFolder.open(aside), console)
    return out


def _open_as_others_do(folder: ModelFolder, console: Console) -> None:
    """
    Have transformers, where it is installed, make the model that the folder says, without memory for its weights.

    Raises `ModelError` where it refuses the config, or has a tensor in another shape.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        console.note("transformers is not installed here, so it has not opened this export (pip install 'shoal[hf]')")
        return
    except Exception as error:  # an installation that does not fit together fails in many ways
        console.note(
            f"transformers cannot be imported here, so it has not opened this export ({type(error).__name__}: {error})"
        )
        return
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each of its models has errors of its own
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"transformers {transformers.__version__} does not open this export ({why})") from error
    theirs = dict(model.named_parameters(remove_duplicate=False))
    there = {id(theirs[name]) for name in theirs.keys() & folder.tensors.keys()}  # one that is tied has two names
    if missing := next((name for name, parameter in theirs.items() if id(parameter) not in there), None):
        raise ModelError(f"transformers {transformers.__version__} needs {missing}, which this export does not have")
    for name, stored in folder.tensors.items():
        if name in theirs and tuple(theirs[name].shape) != tuple(stored.shape):
            raise ModelError(
                f"transformers {transformers.__version__} has {name} as {list(theirs[name].shape)}, and this export as {list(stored.shape)}"
            )


def _shards(model: LanguageModel, dtypes: Dtypes, shard_bytes: int) -> Iterator[tuple[list[str], int]]:
    """Our names in groups of about `shard_bytes`, with their bytes; what is one tensor of theirs stays together."""
    tensors: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        theirs = place(model.shape.family, name).name
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
        (aside / file).chmod(0o666 & ~_umask())  # safetensors keeps the mode of a temporary file: for its owner alone
        sync(aside / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write(aside / INDEX, _json(index))


def _umask() -> int:
    """There is no way to ask but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_config(
    aside: Path, model: LanguageModel, folder: RunFolder, source: Source | None, tokenizer: Tokenizer, dtypes: Dtypes
) -> dict[str, Any]:
    """`config.json`, which is given back, and the licences that the weights came with."""
    config = write_shape(resolve_shape(model.shape), source.config if source else None)
    config["architectures"] = config.get("architectures") or [model.architecture]
    config.pop("torch_dtype", None)
    config["dtype" if source and "dtype" in source.config else "torch_dtype"] = dtypes.name
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
    model: LanguageModel,
    dtypes: Dtypes,
    license: str | None,
) -> Facts:
    return Facts(
        name=folder.path.name,
        architecture=str(described["architectures"][0]),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtypes.name,
        step=saved.step,
        tokens=int(read_state(saved.folder)["tokens"]),
        license=license,
        metrics=read_json_lines(folder.metrics_file),
        version=__version__,
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, [text.encode()])
