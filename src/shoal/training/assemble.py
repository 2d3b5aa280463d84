"""Builds model, optimizer and loader from a finished config, each for this rank's part of the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from shoal.checkpoint.convert import FolderWeights
from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.data.dataset import BlendRows, new_order
from shoal.data.loader import Loader
from shoal.data.order.blend import Blend
from shoal.data.order.quarantine import Quarantine
from shoal.hub.find import find_model
from shoal.hub.folder import ModelFolder
from shoal.mesh.mesh import Mesh
from shoal.models.attention import describe_kernel, take_deterministic_kernels
from shoal.models.build import COMPUTE_DTYPES, Fill, build_model, initial_weights
from shoal.models.family import LanguageModel
from shoal.models.hf_check import check_sight
from shoal.optim.build import build_optimizer
from shoal.parallel.apply import parallelize
from shoal.parallel.fsdp import reshard
from shoal.parallel.runnable import Runnable
from shoal.training.scaler import LossScaler
from shoal.training.state import TrainState


def assemble(
    config: Config,
    mesh: Mesh,
    say: Callable[[str], None],
    *,
    fresh: bool = True,
    built: Callable[[LanguageModel], None] = lambda model: None,
) -> tuple[Runnable, TrainState]:
    """
    Build the parallel model and its optimizer. `say` gets a line for each technique applied.

    fresh: whether to initialize the weights; False leaves them for a checkpoint to fill. built: a function called with the
    whole model, on torch's meta device.
    """
    train = config.train
    if train.repro == "bitwise" and mesh.device.type == "cuda":
        take_deterministic_kernels()
    model = build_model(config.model, compute_dtype=COMPUTE_DTYPES[train.dtype])
    built(model)
    weights = _first_weights(model, config) if fresh else _leave_empty
    runnable = parallelize(
        model, mesh, parallel=config.parallel, train=train, data=config.data, weights=weights, say=say
    )
    if (kernel := _attention_kernel(config, mesh)) is not None:
        say(kernel)
    if fresh and config.model.family == "hf":
        check_sight(
            runnable.parts[0], batch=train.micro_batch, seq_len=config.data.seq_len,
            documents=config.data.document_mask, device=mesh.device,
        )  # fmt: skip
        reshard(runnable.parts[0])
    team = mesh.axis("stage")
    optimizer = build_optimizer(runnable.shards, config.optim, team, bitwise=train.repro == "bitwise")
    scaler = LossScaler(mesh.device) if train.dtype == "float16" else None
    return runnable, TrainState(runnable.shards, optimizer, scaler)


def _attention_kernel(config: Config, mesh: Mesh) -> str | None:
    """Describe the attention kernel of training; None if transformers or ring attention chooses the kernel."""
    shape, parallel = resolve_shape(config.model), config.parallel
    if shape.family == "hf" or (parallel.cp_method == "ring" and mesh.layout.cp > 1):
        return None
    assert shape.num_kv_heads is not None
    assert shape.head_dim is not None
    return describe_kernel(
        heads=shape.num_heads, kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, seq_len=config.data.seq_len,
        masked=config.data.document_mask, dropout=shape.dropout, dtype=COMPUTE_DTYPES[config.train.dtype],
        device=mesh.device,
    )  # fmt: skip


def start_over(config: Config, mesh: Mesh, state: TrainState) -> None:
    """
    Fill `state` in place with the initial state: for a rollback before the first checkpoint.

    Needs the memory of a second model and optimizer meanwhile. A collective over the world.
    """
    fresh = assemble(config, mesh, lambda text: None)[1]
    values = fresh.tensors()
    for name, part in state.tensors().items():
        part.tensor.copy_(values[name].tensor)
    state.load_scalars(fresh.scalars())


def _first_weights(model: LanguageModel, config: Config) -> Fill:
    """Return the weights of the folder `model.from`; random initial weights if it is null."""
    if config.model.from_ is None:
        return initial_weights(model, config.train.seed)
    return folder_weights(model, config.model.from_, config.model.kept)


def folder_weights(model: LanguageModel, name: str, kept: Path | None = None) -> Fill:
    """
    Return the weights of the model folder `name` for a model (on meta) of the same shape.

    Raises `ModelError` if the folder is not found, or its weights do not fit the model.
    """
    return weights_of(model, ModelFolder.open(find_model(name, kept)))


def weights_of(model: LanguageModel, folder: ModelFolder) -> FolderWeights:
    """Return the weights of an open model folder, as `folder_weights` does."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return FolderWeights(folder, model.shape.family, shapes, model.other_names)


def _leave_empty(*_: object) -> None:
    """Leave the weights for a checkpoint to fill."""


def open_loader(
    config: Config,
    mesh: Mesh,
    rows: BlendRows,
    position: int = 0,
    passed_over: Sequence[tuple[int, int]] = (),
    at: Callable[[str], None] = lambda phase: None,
    order: Blend | None = None,
    quarantined: Mapping[int, int] = MappingProxyType({}),
) -> Loader:
    """
    Open the loader of this rank's micro-batches from sample `position` on. It skips the position ranges in `passed_over`.

    order: the order of rows; None for the order of a new run. quarantined: the rows that the run has replaced; it may grow.
    """
    train = config.train
    order = order or new_order(config.data, rows.sizes, train.seed, train.global_batch)
    return Loader(
        rows,
        order,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        position=position,
        passed_over=passed_over,
        at=at,
        prefetch=config.data.prefetch,
        device=mesh.device,
        quarantine=Quarantine(rows, order, quarantined) if config.data.max_quarantined else None,
        stuck_seconds=config.data.stuck_seconds,
    )
