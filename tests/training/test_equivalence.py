"""N processes train what one process would; a stopped run resumes with identical bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Train
from shoal.config.run_options import Launch, Metrics
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.run.phases import NO_PHASES
from shoal.run.records import StepRecord, read_metrics
from shoal.system.signals import StopRequest
from shoal.training.loop import complete, take_steps
from shoal.training.run import Run
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


class NeverStop(StopRequest):
    """Handles no signals: a worker of the tests serves many runs."""

    def __init__(self) -> None:
        self.signal = None


def config_in(folder: Path, name: str, **train: Any) -> Config:
    values: dict[str, Any] = {"steps": 6, "global_batch": 24, "micro_batch": 2, "dtype": "float32"}
    return Config(
        model=Model(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=101, max_seq_len=64),
        data=Data(
            corpus="dummy", dummy_documents=120, tokenizer="bytes", seq_len=48, document_mask=True, folder=str(folder / "data")
        ),
        optim=Optim(lr=3e-3, warmup_steps=2),
        train=Train(**(values | train)),
        metrics=Metrics(peak_tflops=1.0),
        launch=Launch(runs=str(folder / "runs"), name=name),
    )  # fmt: skip


def train_here(mesh: Mesh, config: Config, steps: int | None = None) -> list[StepRecord]:
    """Take `steps` steps (None: all, and finish the run); return the metrics of the steps."""
    run = Run.open(config, mesh, NeverStop())
    if steps is None:
        complete(run)
    else:
        run.total_steps, planned = steps, run.total_steps
        take_steps(run)
        run.total_steps = planned
        assert run.saving.finish(run.state, None).ok
    run.close()
    mesh.barrier()
    return list(read_metrics(run.folder.metrics_file).steps)


def first_gradients(mesh: Mesh, config: Config) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the first step's mean loss and gradients, before the optimizer uses them."""
    run = Run.open(config, mesh, NeverStop())
    losses, _ = run.runnable.forward_backward(run.loader.next_step(), 1, NO_PHASES)
    loss = mesh.sum(losses.double()).sum()
    run.close()
    gradients = {n: p.grad.clone() for n, p in run.runnable.parts[0].named_parameters() if p.grad is not None}
    return float(loss), gradients


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_first_step_agrees_with_one_process(world: Callable[[int], World], size: int, tmp_path: Path) -> None:
    config = config_in(tmp_path, "first")
    loss, gradients = first_gradients(ALONE, config)
    for their_loss, theirs in world(size).run(first_gradients, config):
        assert their_loss == pytest.approx(loss, rel=1e-6)
        for name, mine in gradients.items():
            assert (theirs[name] - mine).norm() <= 1e-6 * mine.norm(), name


def test_accumulation_and_padding_do_not_change_the_gradient(tmp_path: Path) -> None:
    """The loss is the sum over valid tokens divided by their number, for any micro-batch. The reference is one float64 batch."""
    results = [
        first_gradients(ALONE, config_in(tmp_path, f"micro{micro}", global_batch=8, micro_batch=micro))
        for micro in (8, 4, 1)
    ]
    run = Run.open(config_in(tmp_path, "whole", global_batch=8, micro_batch=8), ALONE, NeverStop())
    [batch] = run.loader.next_step()
    run.close()
    model = run.runnable.parts[0].double()
    model.compute_dtype = torch.float64
    logits = model.logits(model(batch.tokens, batch.positions, batch.document_ids))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    for p in model.parameters():
        p.grad = None
    loss.backward()
    assert (batch.labels == -100).any()
    for their_loss, gradients in results:
        assert their_loss == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert (gradients[name] - p.grad).norm() <= 2e-6 * p.grad.norm(), name


def test_fifty_steps_stay_together(world: Callable[[int], World], tmp_path: Path) -> None:
    alone = train_here(ALONE, config_in(tmp_path, "alone", steps=50))
    config = config_in(tmp_path, "two", steps=50)
    world(2).run(train_here, config)
    two = read_metrics(Path(config.launch.runs) / "two" / "metrics.jsonl").steps
    assert len(alone) == len(two) == 50
    assert max(abs(a.loss - b.loss) for a, b in zip(alone, two, strict=True)) < 1e-3
    assert alone[-1].loss < alone[0].loss - 1.0  # and it learns


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_same_bits(world: Callable[[int], World], size: int, dtype: str, tmp_path: Path) -> None:
    def run(config: Config, steps: int | None) -> list[StepRecord]:
        return train_here(ALONE, config, steps) if size == 1 else world(size).run(train_here, config, steps)[0]

    whole = run(config_in(tmp_path, "whole", dtype=dtype), None)
    parts = config_in(tmp_path, "parts", dtype=dtype)
    run(parts, 2)
    resumed = run(parts, None)
    assert [r.loss for r in resumed] == [r.loss for r in whole]
    assert [r.grad_norm for r in resumed] == [r.grad_norm for r in whole]


def test_another_number_of_processes_goes_on_with_the_same_samples(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    whole = train_here(ALONE, config_in(tmp_path, "whole"))
    config = config_in(tmp_path, "changed")
    train_here(ALONE, config, 2)
    world(3).run(train_here, config)
    changed = read_metrics(Path(config.launch.runs) / "changed" / "metrics.jsonl").steps
    assert [r.step for r in changed] == [1, 2, 3, 4, 5, 6]
    assert max(abs(a.loss - b.loss) for a, b in zip(whole, changed, strict=True)) < 1e-4


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    plain = first_gradients(ALONE, config_in(tmp_path, "plain"))
    again = first_gradients(ALONE, config_in(tmp_path, "again", activation_checkpointing="full"))
    assert plain[0] == again[0]
    assert all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])


def test_dropout_is_a_function_of_the_step_and_the_slot(world: Callable[[int], World], tmp_path: Path) -> None:
    def with_dropout(name: str) -> Config:
        config = config_in(tmp_path, name)
        shape = Model(family="gpt2", dim=32, num_layers=1, num_heads=2, max_seq_len=64, dropout=0.3)
        return dataclasses.replace(config, model=shape)

    loss, gradients = first_gradients(ALONE, with_dropout("one"))
    their_loss, theirs = world(2).run(first_gradients, with_dropout("two"))[0]
    assert their_loss == pytest.approx(loss, rel=1e-6)
    assert all((theirs[n] - g).norm() <= 1e-5 * g.norm() for n, g in gradients.items())
