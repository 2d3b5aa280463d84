"""From a settled config to what trains: model, optimizer, loader, each in this process's part of the layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.config import Config
from shoal.data.loader import Loader
from shoal.data.pack import Rows
from shoal.models.build import build_model
from shoal.optim.build import build_optimizer
from shoal.parallel.apply import Runnable, parallelize
from shoal.parallel.mesh import Mesh
from shoal.train.scaler import LossScaler
from shoal.train.state import TrainState

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def assemble(config: Config, mesh: Mesh, say: Callable[[str], None]) -> tuple[Runnable, TrainState]:
    """The model, parallel and with its initial weights, and its optimizer. `say` gets a line for each thing applied."""
    train = config.train
    if train.repro == "bitwise" and mesh.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # attention's backward adds in any order otherwise
    model = build_model(config.model, compute_dtype=DTYPES[train.dtype])
    runnable = parallelize(model, mesh, parallel=config.parallel, train=train, data=config.data, say=say)
    team = mesh.axis("stage")
    optimizer = build_optimizer(runnable.shards, config.optim, team, bitwise=train.repro == "bitwise")
    scaler = LossScaler(mesh.device) if train.dtype == "float16" else None
    return runnable, TrainState(runnable.shards, optimizer, scaler)


def open_loader(config: Config, mesh: Mesh, rows: Rows, position: int = 0) -> Loader:
    """This process's micro-batches, from `position` (samples) on."""
    return Loader(
        rows,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        position=position,
        prefetch=config.data.prefetch,
        pin_memory=mesh.device.type == "cuda",
    )
