"""Pipelines of real processes against one process that runs the same micro-batches through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shoal.config.options import Model
from shoal.config.schedules import Schedule, stages_per_rank
from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis, Mesh
from shoal.models.build import build_model, initialize
from shoal.models.family import LanguageModel
from shoal.models.loss import linear_cross_entropy_sum
from shoal.parallel import pipeline
from shoal.parallel.pipeline import Pipeline, cut, sum_tied
from tests.world import World, laid_out

BATCH, SEQ, DIM, VOCAB = 2, 12, 16, 29
ALL: list[Schedule] = ["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"]
Grads = dict[str, Tensor]


def shape_of(family: Any, tied: bool, num_layers: int) -> Model:
    kinds: dict[str, Any] = {"llama": {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": True}, "gpt2": {}}[family]
    return Model(
        family=family, dim=DIM, num_layers=num_layers, num_heads=4, vocab_size=VOCAB, max_seq_len=SEQ,
        ffn_dim=24, tie_embeddings=tied, dropout=0.0, **kinds,
    )  # fmt: skip


def new_model(shape: Model) -> LanguageModel:
    return build_model(shape, compute_dtype=torch.float32)


def batches_of(count: int, seed: int, *, documents: bool = True) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
        ids = (torch.arange(SEQ) >= torch.randint(1, SEQ, (BATCH, 1), generator=generator)).long()
        places = torch.arange(SEQ) - ids * ids.argmax(1, keepdim=True)
        valid = int((labels != -100).sum())
        made.append(Batch(tokens[:, :-1], labels, places, ids if documents else None, (), valid))
    return made


class Scaled:
    """A loss whose scale changes at each step, as the number of tokens does."""

    def __init__(self) -> None:
        self.scale = torch.ones(())

    def __call__(self, last: LanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_sum(hidden, last.head_weight(), labels, self.scale)


def alone(shape: Model, steps: list[list[Batch]]) -> list[tuple[list[Tensor], Grads]]:
    """Return the reference: each step's losses and gradients, by plain backward through the whole model."""
    model, loss = new_model(shape), Scaled()
    initialize(model, 0, "cpu")
    answers = []
    for batches in steps:
        model.zero_grad()
        loss.scale = torch.tensor(1.0 / sum(b.valid_tokens for b in batches))
        losses = [loss(model, model(b.tokens, b.positions, b.document_ids), b.labels) for b in batches]
        for value in losses:
            value.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        answers.append(([value.detach() for value in losses], grads))
    return answers


def give_weights(stages: dict[int, LanguageModel]) -> None:
    for stage in stages.values():
        initialize(stage, 0, "cpu")


def pipeline_of(
    stages: dict[int, LanguageModel], axis: Axis, schedule: Schedule, count: int, loss: Scaled, **more: Any
) -> Pipeline:
    return Pipeline(
        stages, axis, schedule, count, torch.device("cpu"), (BATCH, SEQ, DIM), torch.float32, loss, **more
    )  # fmt: skip


def tie(stages: dict[int, LanguageModel], axis: Axis, count: int) -> None:
    ends = [stages[i].embed.weight.grad if i in stages else None for i in (0, count - 1)]
    first, last = (e.to_local() if isinstance(e, DTensor) else e for e in ends)
    sum_tied(first, last, axis)


def check(stages: dict[int, LanguageModel], wanted: Grads) -> set[str]:
    """Compare all gradients of these stages with the reference; return their names."""
    seen = set()
    for stage in stages.values():
        for name, parameter in stage.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert grad.dtype == torch.float32
            error = (grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
            # the tied embedding's gradient is a sum of two sums; a key's bias has gradient 0 up to rounding
            assert error < 1e-6 or (grad - wanted[name]).abs().max() < 1e-8, f"{name}: {error:.2e}"
            seen.add(name)
    return seen


def trains(mesh: Mesh, schedule: Schedule, family: str, tied: bool, count: int, flat: bool) -> set[str]:
    axis = laid_out(mesh, dp_replicate=1, pp=mesh.world_size).axis("pp")
    held = stages_per_rank(schedule, None)
    shape = shape_of(family, tied, axis.size * held + 1)
    stages = cut(new_model(shape), axis, schedule, held)
    give_weights(stages)
    if flat:
        for stage in stages.values():
            for _, p in stage.named_parameters():
                # A view of a larger buffer, as a reducer's buckets are
                p.grad = torch.zeros(p.numel() + 3)[3:].view_as(p)
    views = {p: p.grad for stage in stages.values() for p in stage.parameters()}
    order: dict[int, list[int]] = {index: [] for index in stages}

    @contextmanager
    def around(index: int, micro_batch: int) -> Iterator[None]:
        order[index].append(micro_batch)
        yield

    loss = Scaled()
    pipeline = pipeline_of(stages, axis, schedule, count, loss, around=around)
    steps = [batches_of(count, seed) for seed in (1, 2)]
    for batches, (losses, wanted) in zip(steps, alone(shape, steps), strict=True):
        for p, view in views.items():
            if view is None:
                p.grad = None
            else:
                view.zero_()
        loss.scale = torch.tensor(1.0 / sum(b.valid_tokens for b in batches))
        got = pipeline.forward_backward(batches)
        assert (got is None) == (axis.size * held - 1 not in stages)
        for mine, theirs in zip(got or losses, losses, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6)
            assert not mine.requires_grad
        assert all(numbers == list(range(count)) for numbers in order.values())
        order.update({index: [] for index in stages})
        if tied:
            tie(stages, axis, axis.size * held)
        seen = check(stages, wanted)
        assert all(view is None or p.grad is view for p, view in views.items())
    return seen


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("gpt2", False)])
def test_two_processes(world: Callable[[int], World], schedule: Schedule, family: str, tied: bool) -> None:
    seen = world(2).run(trains, schedule, family, tied, 4, family == "llama")
    shape = shape_of(family, tied, 2 * stages_per_rank(schedule, None) + 1)
    assert set().union(*seen) == {name for name, _ in new_model(shape).named_parameters()}


def trains_without_splitting(mesh: Mesh, schedule: Schedule) -> None:
    with (
        mock.patch.object(pipeline, "SPLITS_BACKWARD", False),
        mock.patch("torch.autograd.grad", side_effect=AssertionError),
    ):
        trains(mesh, schedule, "llama", True, 4, True)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_where_torch_cannot_split_a_backward(world: Callable[[int], World], schedule: Schedule) -> None:
    world(2).run(trains_without_splitting, schedule)


@pytest.mark.parametrize(("schedule", "count"), [("gpipe", 3), ("1f1b", 4), ("interleaved_1f1b", 6), ("zbv", 2), ("zbv", 7), ("dualpipev", 8)])  # fmt: skip
def test_four_processes(world: Callable[[int], World], schedule: Schedule, count: int) -> None:
    world(4).run(trains, schedule, "llama", True, count, True)


def evaluates(mesh: Mesh, schedule: Schedule, tied: bool) -> None:
    axis = laid_out(mesh, dp_replicate=1, pp=mesh.world_size).axis("pp")
    held = stages_per_rank(schedule, None)
    shape = shape_of("gpt2", tied, axis.size * held)
    stages = cut(new_model(shape), axis, schedule, held)
    give_weights(stages)
    loss, count = Scaled(), 2 * axis.size
    pipeline = pipeline_of(stages, axis, schedule, count, loss)
    other = batches_of(3, 5, documents=False)  # fewer than in a step, and before any step
    step = batches_of(count, 1)
    [(wanted, _), (_, grads)] = alone(shape, [other, step])
    loss.scale = torch.tensor(1.0 / sum(b.valid_tokens for b in other))
    for _ in range(2):
        got = pipeline.evaluate(other)
        assert (got is None) == (axis.size * held - 1 not in stages)
        for mine, theirs in zip(got or wanted, wanted, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6)
            assert not mine.requires_grad
        assert pipeline.evaluate([]) in ([], None)
        for stage in stages.values():
            stage.zero_grad()
        scale, loss.scale = loss.scale, torch.tensor(1.0 / sum(b.valid_tokens for b in step))
        pipeline.forward_backward(step)
        loss.scale = scale
        if tied:
            tie(stages, axis, axis.size * held)
        check(stages, grads)


@pytest.mark.parametrize("schedule", ALL)
def test_evaluates_between_steps(world: Callable[[int], World], schedule: Schedule) -> None:
    world(2).run(evaluates, schedule, False)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_evaluates_on_four_processes(world: Callable[[int], World], schedule: Schedule) -> None:
    world(4).run(evaluates, schedule, True)


def messages_of_an_evaluation(mesh: Mesh, schedule: Schedule, count: int) -> list[list[str]]:
    """Return the directions of each batch of this rank's messages in an evaluation of `count` micro-batches."""
    axis = laid_out(mesh, dp_replicate=1, pp=mesh.world_size).axis("pp")
    held = stages_per_rank(schedule, None)
    shape = shape_of("gpt2", False, axis.size * held)
    stages = cut(new_model(shape), axis, schedule, held)
    give_weights(stages)
    made = pipeline_of(stages, axis, schedule, 2 * axis.size, Scaled())
    sent: list[list[str]] = []
    torchs = dist.batch_isend_irecv

    def spy(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent.append(sorted(op.op.__name__ for op in ops))
        return torchs(ops)

    with mock.patch.object(dist, "batch_isend_irecv", spy):
        made.evaluate(batches_of(count, 5))
    return sent


def test_messages_of_one_slot_go_out_together(world: Callable[[int], World]) -> None:
    """
    Four stages interleaved on two ranks, three micro-batches. The expected order, one column per slot:

        stage 0   1 2 . . 3 . . .
        stage 1   . 1 2 . . 3 . .
        stage 2   . . 1 2 . . 3 .
        stage 3   . . . 1 2 . . 3

    Stages 0 and 2 are on the first rank. Each output but the last stage's is a message, sent in the slot that computes it.
    """
    way, back, both = ["isend"], ["irecv"], ["irecv", "isend"]
    assert world(2).run(messages_of_an_evaluation, "interleaved_1f1b", 3) == [
        [way, both, both, way, way, back, way],
        [back, both, both, back, back, way, back],
    ]


def shards(mesh: Mesh, schedule: Schedule, reshard: bool) -> None:
    both = laid_out(mesh, dp_replicate=1, pp=2, dp_shard=2)
    axis, dp = both.axis("pp"), both.axis("shard")
    held = stages_per_rank(schedule, None)
    shape = shape_of("llama", True, axis.size * held)
    stages = cut(new_model(shape), axis, schedule, held)
    give_weights(stages)
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))["dp_shard"]
    for stage in stages.values():
        for block in stage.blocks.values():
            fully_shard(block, mesh=device_mesh, reshard_after_forward=reshard)
        fully_shard(stage, mesh=device_mesh)
        module: Any
        for module in [*stage.blocks.values(), stage]:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    loss, count = Scaled(), 4
    pipeline = pipeline_of(stages, axis, schedule, count, loss)
    steps = [batches_of(2 * count, seed) for seed in (1, 2)]
    for batches, (losses, wanted) in zip(steps, alone(shape, steps), strict=True):
        for stage in stages.values():
            stage.zero_grad()
        loss.scale = torch.tensor(1.0 / sum(b.valid_tokens for b in batches))
        got = pipeline.forward_backward(batches[dp.rank * count :][:count])
        mine = losses[dp.rank * count :][:count]
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got or mine, mine, strict=True))
        tie(stages, axis, axis.size * held)
        check(stages, wanted)
        again = pipeline.evaluate(batches[dp.rank * count :][:2])
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(again or mine[:2], mine[:2], strict=True))


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("schedule", ALL)
def test_with_sharded_stages(world: Callable[[int], World], schedule: Schedule, reshard: bool) -> None:
    world(4).run(shards, schedule, reshard)


def test_stages_hold_what_is_theirs_alone() -> None:
    shape = shape_of("gpt2", True, 9)
    whole = {name for name, _ in new_model(shape).named_parameters()}
    held = [cut(new_model(shape), Axis(2, rank), "zbv", 2) for rank in range(2)]
    assert [list(stages) for stages in held] == [[0, 3], [1, 2]]
    names = {i: {name for name, _ in s.named_parameters()} for stages in held for i, s in stages.items()}
    assert set().union(*names.values()) == whole
    assert {n for n in whole if sum(n in held for held in names.values()) > 1} == {"embed.weight"}
    assert names[0] >= {"embed.weight", "position.weight"}
    assert names[3] >= {"embed.weight", "norm.weight"}
    assert not {n for i in (1, 2) for n in names[i] if not n.startswith("blocks.")}
    assert [sorted({int(n.split(".")[1]) for n in names[i] if n.startswith("blocks")}) for i in range(4)] == [
        [0, 1], [2, 3, 4], [5, 6], [7, 8],
    ]  # fmt: skip
    assert all(p.is_meta for stages in held for s in stages.values() for p in s.parameters())
    assert [s.begins for s in held[0].values()] == [True, False]
    assert [s.ends for s in held[0].values()] == [False, True]


def test_a_step_has_as_many_micro_batches_as_it_was_made_for() -> None:
    pipeline = object.__new__(Pipeline)
    pipeline._micro_batches = 4
    with pytest.raises(ValueError, match="4 micro-batches, not 3"):
        pipeline.forward_backward(batches_of(3, 0))
