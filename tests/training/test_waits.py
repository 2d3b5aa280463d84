"""A step never waits for the device, as far as a CPU can tell; planted waits are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.mesh.ballot import Ballot, Vote
from shoal.mesh.mesh import Mesh
from shoal.training import loop
from shoal.training.run import Run
from shoal.training.step import train_step
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.rehearsal import DEVICE, Rehearsal, Wait
from tests.world import World

PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.empty(3).copy_(x),
    "__bool__": lambda x: bool(x[0]),
    "__float__": lambda x: float(x[0]),
    "__int__": lambda x: int(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "tensor": lambda x: torch.tensor([1.0], device=DEVICE),
    "masked_select": lambda x: torch.ops.aten.masked_select(x, x > 0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "_local_scalar_dense": lambda x: torch.ops.aten._local_scalar_dense(x[0]),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_of_wait_is_found(kind: str) -> None:
    there = torch.arange(3.0)
    with Rehearsal() as waits:
        PLANTED[kind](there)
    assert [wait.kind for wait in waits] == [kind]


def test_what_does_not_wait_is_none() -> None:
    there = torch.arange(3.0)
    rehearsal = Rehearsal()
    with rehearsal as waits:
        here = torch.tensor([1.0, 2.0])
        assert here.tolist() == [1.0, 2.0]
        moved = here.to(DEVICE, non_blocking=True) + 1
        assert here in rehearsal.host
        assert moved not in rehearsal.host
        there.double().to(torch.float32).sum()
        torch.where(there > 0, there, 0.0)
        torch.zeros((), device=DEVICE).fill_(3.0)
        torch.empty(3).copy_(there, non_blocking=True)
    assert waits == []
    with rehearsal as waits:
        moved.tolist()
        here.to(DEVICE)
    assert [wait.kind for wait in waits] == ["tolist", "to"]


def waits_of_a_step(mesh: Mesh, config: Any, planted: str | None = None) -> list[Wait]:
    """Return the waits of the second step. planted: a wait to add; "judge" reads the loss, "backward" a gradient."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())

    def step(number: int, batches: Sequence[Batch]) -> None:
        train_step(
            run.runnable, run.state, batches, step=number, lr=1e-3, clip_norm=1.0, guard=run.guard,
            ballot=Ballot({"one": Vote([0.0, 1.0])}),
        )  # fmt: skip

    step(1, run.loader.next_step())
    if planted == "judge":
        judge = run.guard.judge
        run.guard.judge = lambda loss, norm: (loss.tolist(), judge(loss, norm))[1]  # type: ignore[method-assign]
    if planted == "backward":
        # the hook returns None: any other value would replace the gradient
        weight = run.runnable.shards[0].parameter
        weight.register_post_accumulate_grad_hook(lambda p: (p.grad.max().item(), None)[1])
    batches, rehearsal = run.loader.next_step(), Rehearsal()
    for batch in batches:
        rehearsal.mark_host([batch.tokens, batch.labels, batch.positions, batch.document_ids])
    device, run.runnable.mesh.device = run.runnable.mesh.device, DEVICE
    try:
        with rehearsal as waits:
            step(2, batches)
    finally:  # other tests use the mesh too
        run.runnable.mesh.device = device
        run.close()
    return waits


STEPS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, options
    "plain": (1, {}),
    "muon": (1, {"optim__name": "muon", "model__qk_norm": False}),
    "recompute": (1, {"train__activation_checkpointing": "full"}),
    "dropout": (1, {"family": "gpt2", "model__dropout": 0.1}),
    "ddp": (2, {}),
    "fsdp": (2, {"parallel__dp_shard": 2}),
    "tp": (2, {"parallel__tp": 2}),
    "cp": (2, {"parallel__cp": 2}),
    "pp": (2, {"parallel__pp": 2}),
}
SLOW = {("tp", "bfloat16"), ("cp", "bfloat16")}  # two seconds each


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[pytest.mark.ci] if (kind, dtype) in SLOW else [])
        for kind in STEPS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_a_step_waits_for_nothing(world: Callable[[int], World], tmp_path: Path, kind: str, dtype: str) -> None:
    processes, options = STEPS[kind]
    config = config_of(tmp_path, "waits", train__dtype=dtype, train__global_batch=4, optim__clip_norm=1.0, **options)
    found = world(processes).run(waits_of_a_step, config) if processes > 1 else [waits_of_a_step(ALONE, config)]
    assert found == [[]] * processes


@pytest.mark.parametrize(
    ("kind", "planted", "found"),
    [
        ("fsdp", "judge", [("tolist", "step.train_step")]),
        ("fsdp", "backward", [("item", "runnable._in_turns")]),
        ("pp", "backward", [("item", "pipeline.backward_one_chunk")] * 2),  # for each micro-batch
    ],
)
def test_a_wait_inside_of_a_step_is_found(
    world: Callable[[int], World], tmp_path: Path, kind: str, planted: str, found: list[tuple[str, str]]
) -> None:
    config = config_of(tmp_path, planted, train__global_batch=2, **STEPS[kind][1])
    for waits in world(2).run(waits_of_a_step, config, planted):
        assert [(wait.kind, wait.where) for wait in waits] == found


def test_a_record_waits_for_the_step_before_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of(tmp_path, "late", train__steps=5, train__global_batch=2)
    run = Run.open(config, Mesh(ALONE.place, ALONE.device), NeverStop())
    story: list[Any] = []
    rehearsal = Rehearsal()

    def step(*args: Any, step: int, **options: Any) -> Any:
        before = len(rehearsal.waits)
        stats = train_step(*args, step=step, **options)
        assert rehearsal.waits[before:] == []
        story.append(("step", step))
        return stats

    plain = loop.record

    def record(run: Run, stats: Any) -> bool:
        before = len(rehearsal.waits)
        result = plain(run, stats)
        story.append(("record", stats.step, len(rehearsal.waits) - before))
        return result

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "record", record)
    run.mesh.device = DEVICE
    with rehearsal as waits:
        loop.take_steps(run)
    run.close()
    late = [("step", 1)]
    for number in range(1, 5):
        late += [("step", number + 1), ("record", number)]
    assert [entry[:2] for entry in story] == [*late, ("record", 5)]
    assert len(waits) == sum(entry[2] for entry in story if entry[0] == "record")
    assert all(entry[2] >= 1 for entry in story if entry[0] == "record")
