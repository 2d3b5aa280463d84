"""Loading a model whole on one device, from a run's checkpoint or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from shoal.models.generate import generate
from shoal.models.layers import Linear
from shoal.models.sampling import Sampling
from shoal.system.cpu import multiplies_bfloat16
from shoal.training.assemble import weights_of

# Training options -> their names in the verbs that use a model.
FLAGS = {"train.dtype": "--dtype", "train.device": "--device"}


@dataclass(frozen=True)
class LoadedModel:
    """
    A model in eval mode, with its tokenizer and device.

    end_ids: tokens that end a text. files: the folder with the files beside the weights (chat template), if any.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer | None
    device: torch.device
    end_ids: frozenset[int]
    files: Path | None
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # to print for the user

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises `ModelError` if there is none."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} has no tokenizer and cannot process text; put its tokenizer.json into the folder"
            )
        return self.tokenizer

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """
        Return each prompt's new tokens, up to the end of its text or `max_new_tokens`.

        on_token(prompt's index, token) is called for each token as it comes. Raises `GenerateError` if a prompt or an option
        is invalid, `ModelError` if there is no tokenizer.
        """
        return generate(
            self.model, prompts, max_new_tokens=max_new_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, seed=sampling.seed, eot_id=self.end_ids, known_ids=self.need_tokenizer().vocab_size,
            on_token=on_token,
        )  # fmt: skip


@dataclass(frozen=True)
class LoadedRun(LoadedModel):
    """A run's model at one checkpoint."""

    config: Config
    step: int
    data_id: str


def load_path(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """
    Load a model from a run's folder, a checkpoint's folder, or a Hugging Face folder (or the name of a downloaded one).

    Raises `RunError`, `CheckpointError` or `ModelError` if there is no such model or its files are broken, `LaunchError` if the
    device is missing or lacks `dtype`.
    """
    return load(Wanted.at(path, device=device, dtype=dtype))


def load(wanted: Wanted) -> LoadedModel:
    """Load a model, with its weights in its compute dtype. Raises the same errors as `load_path`."""
    if wanted.folder is not None:
        return load_folder(wanted.folder, family=wanted.family, device=wanted.device, dtype=wanted.dtype)
    assert wanted.target is not None
    run = load_run(wanted.runs, wanted.target, step=wanted.step, device=wanted.device, dtype=wanted.dtype)
    for parameter in run.model.parameters():  # cast once, not at each use
        parameter.data = parameter.data.to(run.model.compute_dtype)
    lay_out(run.model)
    return run


def load_run(runs: Path, target: str, *, step: int | None, device: str, dtype: str = "auto") -> LoadedRun:
    """
    Load run `target` (a name under `runs`, or a folder) at `step` (None: the last), its weights in float32.

    dtype: the compute dtype; "auto" uses the dtype of training, or float32 on a CPU that is slow in it. Raises `RunError`
    if there is no such run, `CheckpointError` if there is no such checkpoint or it is damaged, `LaunchError` if the device is
    missing or lacks the dtype.
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
    """Return a run's compute dtype: "auto" means the dtype of training, or float32 on a CPU that is slow in it."""
    if wanted != "auto":
        return wanted
    slow = trained == "float16" or (trained == "bfloat16" and not multiplies_bfloat16())
    return "float32" if device.type == "cpu" and slow else trained


def load_folder(name: str, *, family: str | None = None, device: str, dtype: str = "auto") -> LoadedModel:
    """
    Load the model in folder `name`, or in the folder that `find_model` finds for that name.

    family: the code that runs the model: "hf" for transformers, None for shoal's own. dtype: the compute dtype; "auto" uses
    the weights' dtype if it is fast on the device, else float32. Raises `ModelError` if the folder is missing, broken or
    unsupported, `LaunchError` if the device is missing or lacks the dtype.
    """
    folder, place = ModelFolder.open(find_model(name)), find_device(device)
    shape, tokens_from = read_folder(folder, family)
    chosen = _chosen_dtype(folder, dtype, place)
    model = build_model(_model_of(shape, name, folder), compute_dtype=COMPUTE_DTYPES[chosen])
    model.to(COMPUTE_DTYPES[chosen])  # on meta, so that weights are read directly into the compute dtype
    materialize(model, weights_of(model, folder), place)
    lay_out(model)
    tokenizer = load_tokenizer(tokens_from) if tokens_from else None
    return LoadedModel(
        name=name, model=model.eval(), tokenizer=tokenizer, device=place, files=folder.path,
        end_ids=_end_ids(folder.path, tokenizer), notes=shape.notes,
    )  # fmt: skip


def _model_of(shape: Shape, name: str, folder: ModelFolder) -> Model:
    """
    Return the model section of a folder. Its context is limited to the sliding window, which is not implemented.

    Raises `ModelError` if the shape is invalid.
    """
    values = {**shape.values, "from_": name}
    if shape.window is not None:
        values["max_seq_len"] = min(shape.window, values["max_seq_len"])
    model = Model(**values)
    if problems := shape_problems(model):
        lines = "\n".join(f"  {what}" for _, what in problems)
        raise ModelError(f"{folder.path / CONFIG} describes an invalid model:\n{lines}")
    return model


def lay_out(model: LanguageModel) -> None:
    """
    Store a CPU model's float32 matrices transposed: the same numbers, but products with few rows are faster.

    Measured in float32: 1.2 to 2 times as fast with 4 to 32 rows, unchanged with one row or many. bfloat16 matrices are
    left unchanged, because with one row they would be slower.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()


def folder_dtype(name: str, wanted: str, device: torch.device) -> str:
    """Return the compute dtype of a folder's model. Raises `LaunchError` if the device lacks it."""
    return _chosen_dtype(ModelFolder.open(find_model(name)), wanted, device)


def _chosen_dtype(folder: ModelFolder, wanted: str, device: torch.device) -> str:
    chosen = wanted if wanted != "auto" else _own_dtype(folder.dtype, device)
    _check_dtype(chosen, device)
    return chosen


def _own_dtype(stored: str, device: torch.device) -> str:
    own = DTYPE_NAMES.get(stored)
    own = own if own in COMPUTE_DTYPES else "float32"
    if device.type == "cpu":
        # without matrix tiles (AMX) a CPU multiplies bfloat16 at half the rate of float32, and float16 far slower
        return own if own == "bfloat16" and CPU_HAS_TILES else "float32"
    return "float32" if own == "bfloat16" and not has_bfloat16(device) else own


def find_device(wanted: str) -> torch.device:
    """Return the device that `--device` names. Raises `LaunchError` if it is unavailable."""
    with spelled(FLAGS):
        return choose_device(wanted)


def _check_dtype(dtype: str, device: torch.device) -> None:
    with spelled(FLAGS):
        check_dtype(dtype, device)


def _end_ids(files: Path | None, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the end tokens of the tokenizer and of `files`: chat models may end a turn with another token."""
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
        raise ModelError(f"cannot read {path}: {error}; download that file again") from error
    return value if isinstance(value, dict) else {}
