"""A model to use: a run's checkpoint, or a folder of Hugging Face weights, whole on one device."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.restore import load_model
from shoal.config.options import Config, Model
from shoal.config.presets import shape_problems
from shoal.data.tokens.tokenize import Tokenizer, load_tokenizer
from shoal.errors import ModelError, spelled
from shoal.hub.find import find_model
from shoal.hub.folder import CONFIG, ModelFolder
from shoal.hub.header import DTYPE_NAMES
from shoal.hub.shape import Shape, read_folder
from shoal.hub.values import token_ids
from shoal.infer.asked import Wanted
from shoal.infer.target import find_checkpoint
from shoal.mesh.mesh import check_dtype, choose_device, has_bfloat16
from shoal.models.attention import CPU_HAS_TILES
from shoal.models.build import COMPUTE_DTYPES, build_model, materialize
from shoal.models.family import LanguageModel
from shoal.models.layers import Linear
from shoal.system.cpu import multiplies_bfloat16
from shoal.training.assemble import weights_of

# Options of training, as the verbs that use a model have them.
FLAGS = {"train.dtype": "--dtype", "train.device": "--device"}


@dataclass(frozen=True)
class LoadedModel:
    """
    A model in eval mode, and what is needed to use it.

    end_ids: the tokens that end a text. files: the folder with what came beside the weights (chat template), if any.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer | None
    device: torch.device
    end_ids: frozenset[int]
    files: Path | None
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # what a person should be told

    def need_tokenizer(self) -> Tokenizer:
        """Raises `ModelError` where there is none."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} has no tokenizer, so text is nothing to it; put its tokenizer.json beside it"
            )
        return self.tokenizer


@dataclass(frozen=True)
class LoadedRun(LoadedModel):
    """A run's model as a checkpoint has it."""

    config: Config
    step: int
    data_id: str


def load(wanted: Wanted) -> LoadedModel:
    """The model, its weights in the dtype it computes in. Raises `RunError`, `CheckpointError` or `ModelError`."""
    if wanted.folder is not None:
        return load_folder(wanted.folder, family=wanted.family, device=wanted.device, dtype=wanted.dtype)
    assert wanted.target is not None
    run = load_run(wanted.runs, wanted.target, step=wanted.step, device=wanted.device, dtype=wanted.dtype)
    for parameter in run.model.parameters():  # cast once, and not at each use
        parameter.data = parameter.data.to(run.model.compute_dtype)
    lay_out(run.model)
    return run


def load_run(runs: Path, target: str, *, step: int | None, device: str, dtype: str = "auto") -> LoadedRun:
    """
    The model of run `target` (a name under `runs`, or a folder) at `step` (None: the last), its weights in float32.

    dtype: what it computes in; "auto": as it was trained, but float32 on a CPU that is slow in that. Raises `RunError` or
    `CheckpointError`.
    """
    folder, saved = find_checkpoint(runs, target, step)
    config, place = folder.load_config(), find_device(device)
    chosen = run_dtype(config.train.dtype, dtype, place)
    _check_dtype(chosen, place)
    model = build_model(config.model, compute_dtype=COMPUTE_DTYPES[chosen])
    state = load_model(saved, model, place)
    tokenizer = load_tokenizer(str(folder.tokenizer_file))
    files = folder.tokenizer_files
    return LoadedRun(
        name=target, model=model.eval(), tokenizer=tokenizer, device=place, config=config, step=int(state["step"]),
        data_id=state["data_id"], files=files, end_ids=_end_ids(files, tokenizer),
    )  # fmt: skip


def run_dtype(trained: str, wanted: str, device: torch.device) -> str:
    """Return what a run's model is computed in: "auto" is as it was trained, but float32 on a CPU that is slow in that."""
    if wanted != "auto":
        return wanted
    slow = trained == "float16" or (trained == "bfloat16" and not multiplies_bfloat16())
    return "float32" if device.type == "cpu" and slow else trained


def load_folder(name: str, *, family: str | None = None, device: str, dtype: str = "auto") -> LoadedModel:
    """
    The model of the folder `name`, or of a name that `find_model` knows.

    family: "hf" has transformers compute it, null the code here. dtype: "auto": that of its weights where the device is good at it, else float32. Raises `ModelError`.
    """
    folder, place = ModelFolder.open(find_model(name)), find_device(device)
    shape, tokens_from = read_folder(folder, family)
    chosen = _chosen_dtype(folder, dtype, place)
    model = build_model(_model_of(shape, name, folder), compute_dtype=COMPUTE_DTYPES[chosen])
    model.to(
        COMPUTE_DTYPES[chosen]
    )  # on meta: the weights are read into the dtype they are used in, not cast at each use
    materialize(model, weights_of(model, folder), place)
    lay_out(model)
    tokenizer = load_tokenizer(tokens_from) if tokens_from else None
    return LoadedModel(
        name=name, model=model.eval(), tokenizer=tokenizer, device=place, files=folder.path,
        end_ids=_end_ids(folder.path, tokenizer), notes=shape.notes,
    )  # fmt: skip


def _model_of(shape: Shape, name: str, folder: ModelFolder) -> Model:
    """Within the window of its attention: beyond it another model would be needed. Raises `ModelError`."""
    values = {**shape.values, "from_": name}
    if shape.window is not None:
        values["max_seq_len"] = min(shape.window, values["max_seq_len"])
    model = Model(**values)
    if problems := shape_problems(model):
        lines = "\n".join(f"  {what}" for _, what in problems)
        raise ModelError(f"{folder.path / CONFIG} says what no model can be:\n{lines}")
    return model


def lay_out(model: LanguageModel) -> None:
    """
    Turn the matrices of a model on a CPU in memory, inputs first: the same numbers, multiplied faster by few rows.

    Seen in float32 with 4 to 32 rows: 1.2 to 2 times as fast, and as fast with one row and with many. In bfloat16 one
    row would be slower, so that those stay as they are.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()


def folder_dtype(name: str, wanted: str, device: torch.device) -> str:
    """The dtype to compute a folder's model in. Raises `LaunchError` where the device lacks it."""
    return _chosen_dtype(ModelFolder.open(find_model(name)), wanted, device)


def _chosen_dtype(folder: ModelFolder, wanted: str, device: torch.device) -> str:
    chosen = wanted if wanted != "auto" else _own_dtype(folder.dtype, device)
    _check_dtype(chosen, device)
    return chosen


def _own_dtype(stored: str, device: torch.device) -> str:
    own = DTYPE_NAMES.get(stored)
    own = own if own in COMPUTE_DTYPES else "float32"
    if device.type == "cpu":
        # without matrix tiles a CPU multiplies bfloat16 at half the rate of float32, and float16 far slower
        return own if own == "bfloat16" and CPU_HAS_TILES else "float32"
    return "float32" if own == "bfloat16" and not has_bfloat16(device) else own


def find_device(wanted: str) -> torch.device:
    """The device that `--device` names. Raises `LaunchError` where it is not to be had."""
    with spelled(FLAGS):
        return choose_device(wanted)


def _check_dtype(dtype: str, device: torch.device) -> None:
    with spelled(FLAGS):
        check_dtype(dtype, device)


def _end_ids(files: Path | None, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokenizer's, and those that the files beside the weights name: chat models end a turn with another."""
    ids: set[int] = set() if tokenizer is None else {tokenizer.eot_id}
    for name in ("generation_config.json", CONFIG) if files is not None else ():
        assert files is not None
        said = token_ids(_read(files / name).get("eos_token_id"), str(files / name))
        if said:
            return frozenset({*ids, *said})
    return frozenset(ids)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}; get that file again") from error
    return value if isinstance(value, dict) else {}
