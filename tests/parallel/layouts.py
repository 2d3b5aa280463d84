"""A tiny run in any layout, and the results of its first step, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from shoal.config.data_options import Data
from shoal.config.layout import find_layout
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.config.run_options import Launch, Metrics
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.mesh.region import Region
from shoal.system.signals import StopRequest
from shoal.training.compile_check import check_compiled
from shoal.training.run import Run
from shoal.training.step import train_step
from tests.world import laid_out

ALONE = Mesh(Place(), torch.device("cpu"))

SHAPES = {
    "llama": Model(
        dim=48, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=12, ffn_dim=101, max_seq_len=64, qk_norm=True,
        tie_embeddings=True, init_std=0.1,
    ),
    "gpt2": Model(family="gpt2", dim=48, num_layers=4, num_heads=4, max_seq_len=64, init_std=0.1),
}  # fmt: skip


class NeverStop(StopRequest):
    """A stop request that handles no signals: a worker of the tests serves many runs."""

    def __init__(self) -> None:
        self.signal = None


def config_of(folder: Path, name: str, family: str = "llama", **options: Any) -> Config:
    """Return a small config. options: options to change, such as parallel__tp=2 for `parallel.tp`."""
    config = Config(
        model=SHAPES[family],
        data=Data(
            corpus="dummy", dummy_documents=120, tokenizer="bytes", seq_len=48, document_mask=True, folder=str(folder / "data")
        ),
        optim=Optim(lr=3e-3, warmup_steps=2, clip_norm=0.0),
        train=Train(steps=4, global_batch=8, micro_batch=1, dtype="float32"),
        metrics=Metrics(peak_tflops=1.0),
        launch=Launch(runs=str(folder / "runs"), name=name),
    )  # fmt: skip
    for key, value in options.items():
        section, _, option = key.partition("__")
        config = config.replace(section, **{option: value})
    return config


def mesh_for(mesh: Mesh, parallel: Parallel) -> Mesh:
    layout = find_layout(parallel, mesh.world_size)
    assert not isinstance(layout, str), layout
    return mesh if mesh.world_size == 1 else laid_out(mesh, **dataclasses.asdict(layout))


@dataclasses.dataclass
class Step:
    """Loss, gradient norm and a rank's regions of the gradients in the first step; its regions of the parameters after the last."""

    loss: float
    norm: float
    gradients: dict[str, tuple[Region, torch.Tensor]]
    parameters: dict[str, tuple[Region, torch.Tensor]]


def first_step(mesh: Mesh, config: Config, steps: int = 1) -> Step:
    """Take `steps` steps. Return loss, norm and gradients of the first one, and the parameters after the last one."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    if config.train.compile:
        check_compiled(run)
    for step in range(1, steps + 1):
        batches = run.loader.next_step()
        stats = train_step(run.runnable, run.state, batches, step=step, lr=1e-3, clip_norm=config.optim.clip_norm)
        if step == 1:
            loss, tokens, norm, *_ = stats.read()
            grads = {
                s.name: (s.region, s.tensor.grad.clone()) for s in run.runnable.shards if s.tensor.grad is not None
            }
    run.close()
    after = {s.name: (s.region, s.tensor.detach().clone()) for s in run.runnable.shards}
    return Step(loss / tokens, norm, grads, after)


def whole(parts: list[dict[str, tuple[Region, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Assemble all ranks' regions into whole tensors; ranks that hold the same region must have the same bits."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, (region, tensor) in part.items():
            if name not in found:
                found[name] = torch.full(region.shape, float("nan"))
            there = found[name][region.slices]
            if not there.isnan().all():
                assert torch.equal(there, tensor), f"{name}: two processes hold different bits of the same region"
            found[name][region.slices] = tensor
    assert not any(t.isnan().any() for t in found.values())
    return found
