"""The memory of rehearsed steps, against torch's allocator in real runs on gloo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.bench.trace import LiveBytes, traced_bytes
from shoal.config.data_options import Data
from shoal.config.layout import AXES, Layout, find_layout
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.config.schedules import Schedule, stages_per_rank
from shoal.errors import ShoalError
from shoal.mesh.mesh import Mesh
from shoal.metrics.allocated import most_alive
from shoal.models.loss import linear_cross_entropy_sum
from shoal.parallel import reduce
from shoal.parallel.shared_sum import shared_bytes
from shoal.plan import fits
from shoal.plan.estimate import parameter_count
from shoal.plan.rehearse import layers, step
from shoal.plan.rehearse.layers import Kernels
from shoal.plan.rehearse.step import Case, rehearse
from shoal.plan.rehearse.tape import Memory, Space, Tensor
from shoal.training.loop import take_step
from shoal.training.run import Run
from tests.parallel.layouts import NeverStop, config_of, mesh_for
from tests.world import World

SHAPE: dict[str, Any] = {
    "model__dim": 128, "model__head_dim": 32, "model__ffn_dim": 384, "data__seq_len": 64, "data__document_mask": False,
    "train__global_batch": 16, "train__micro_batch": 4,
}  # fmt: skip
# The update needs more than backward, with few tokens and a small vocabulary
MUON = {"optim__name": "muon", "data__seq_len": 8, "train__global_batch": 2, "train__micro_batch": 1}
GPT2 = {"family": "gpt2", "model__head_dim": None, "model__ffn_dim": None}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "untied, grouped heads": (1, {"model__tie_embeddings": False, "model__num_kv_heads": 2, "model__qk_norm": False}),
    "gpt2": (1, GPT2),
    "document mask": (1, {"data__document_mask": True}),
    "full": (1, {"train__activation_checkpointing": "full"}),
    "selective": (1, {"train__activation_checkpointing": "selective"}),
    "muon": (1, MUON),
    "muon, replicas": (2, MUON),
    "muon, dp_shard": (2, {**MUON, "parallel__dp_shard": 2}),
    "muon, tp": (2, {**MUON, "parallel__tp": 2}),
    "muon, many tokens": (1, {"optim__name": "muon"}),
    "replicas": (2, {}),
    "dp_shard": (2, {"parallel__dp_shard": 2, "train__micro_batch": 8}),
    "dp_shard, untied, a large vocabulary": (
        2,
        {"parallel__dp_shard": 2, "train__micro_batch": 8, "model__tie_embeddings": False, "model__vocab_size": 8192},
    ),
    "dp_shard, gradients of several micro-batches": (2, {"parallel__dp_shard": 2}),
    "tp": (2, {"parallel__tp": 2}),
    "tp, gpt2": (
        2,
        {
            "parallel__tp": 2,
            "train__micro_batch": 1,
            "data__seq_len": 16,
            "model__vocab_size": 8192,
            "model__tie_embeddings": True,
            **GPT2,
        },
    ),
    "cp": (2, {"parallel__cp": 2}),
    "ulysses": (2, {"parallel__cp": 2, "parallel__cp_method": "ulysses"}),
    "pp": (2, {"parallel__pp": 2, "data__document_mask": True}),
    "pp, gpipe": (2, {"parallel__pp": 2, "parallel__pp_schedule": "gpipe", "train__activation_checkpointing": "full"}),
    "dp_shard x tp": (4, {"parallel__dp_shard": 2, "parallel__tp": 2}),
    "pp x dp_shard": (4, {"parallel__pp": 2, "parallel__dp_shard": 2, "train__micro_batch": 2}),
    "pp x dp_shard, interleaved": (
        4,
        {
            "parallel__pp": 2,
            "parallel__dp_shard": 2,
            "parallel__pp_schedule": "interleaved_1f1b",
            "train__micro_batch": 2,
            "model__num_layers": 8,
        },
    ),
    "pp x dp_shard, interleaved, a block a stage": (
        4,
        {
            "parallel__pp": 2,
            "parallel__dp_shard": 2,
            "parallel__pp_schedule": "interleaved_1f1b",
            "train__micro_batch": 2,
            "train__activation_checkpointing": "full",
            "model__vocab_size": 4096,
            "model__tie_embeddings": True,
            **GPT2,
        },
    ),
    "pp x dp_shard, gpt2, large embeddings": (
        4,
        {"parallel__pp": 2, "parallel__dp_shard": 2, "train__micro_batch": 4, "model__vocab_size": 8192, **GPT2},
    ),
    "pp x dp_shard, gpt2, gpipe": (
        4,
        {
            "parallel__pp": 2,
            "parallel__dp_shard": 2,
            "parallel__pp_schedule": "gpipe",
            "train__micro_batch": 2,
            "model__vocab_size": 2048,
            "train__activation_checkpointing": "selective",
            **GPT2,
        },
    ),
}


QUICK = ("one process", "selective", "dp_shard, gradients of several micro-batches", "tp, gpt2", "cp", "pp", "muon, tp")


def test_the_plan_knows_which_gradients_are_added_in_shared_memory() -> None:
    assert step.SHARED_BYTES == reduce.SHARED_BYTES


def measured_and_rehearsed(mesh: Mesh, config: Config) -> tuple[int, int]:
    """Return, in a worker: the most bytes alive in a step, and those of the rehearsal."""
    runs: list[Run] = []

    def open_run() -> None:
        runs.append(Run.open(config, mesh_for(mesh, config.parallel), NeverStop()))
        take_step(runs[0])

    most = most_alive(open_run, lambda: take_step(runs[0])) + shared_bytes()
    run = runs.pop()
    known = dataclasses.replace(run.config, model=resolve_shape(run.config.model))
    run.close()
    layout = find_layout(config.parallel, mesh.world_size)
    assert isinstance(layout, Layout)
    turns = config.train.global_batch // config.train.micro_batch // layout.dp
    rank = layout.coordinates(mesh.place.rank)["pp"]
    return most, rehearse(
        Case.of(known), layout, Kernels(cuda=False, width=4, copies=True), turns, pp_rank=rank
    ).peak.total


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_rehearsed_step_needs_the_memory_of_a_real_one(
    world: Callable[[int], World], tmp_path: Path, name: str
) -> None:
    processes, options = CASES[name]
    config = config_of(tmp_path, "rehearsed", **{**SHAPE, **options})
    found = world(processes).run(measured_and_rehearsed, config)
    print(name, found)
    # Ranks differ: the first one's shards are the largest, and the first and last of a pipeline hold other parts
    most, rehearsed = max(found)
    assert rehearsed == pytest.approx(most, rel=0.004)
    assert all(abs(mine - theirs) < 0.004 * theirs for theirs, mine in found)


@pytest.mark.parametrize(
    ("layout", "mode", "blocks"),
    [
        (Layout(), "none", 24), (Layout(dp_shard=8), "full", 24), (Layout(dp_shard=8), "none", 24),
        (Layout(dp_shard=2, tp=2), "selective", 24), (Layout(pp=4), "none", 24), (Layout(pp=2, dp_shard=2), "full", 24),
        (Layout(cp=2), "none", 24), (Layout(pp=2), "none", 25), (Layout(pp=4), "none", 21), (Layout(pp=4), "full", 23),
        (Layout(pp=4, dp_shard=2), "none", 22),
    ],
)  # fmt: skip
def test_many_blocks_need_what_few_predict(
    layout: Layout, mode: Any, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(dim=256, num_layers=blocks, num_heads=8, num_kv_heads=4, ffn_dim=768, vocab_size=2000)
    train = Train(global_batch=64, micro_batch=2, dtype="bfloat16", activation_checkpointing=mode, steps=1)
    config = Config(model=model, data=Data(seq_len=256), train=train)
    few = fits.need_of(config, layout, cuda=True)
    monkeypatch.setattr(fits, "FEW", (blocks,))
    all_blocks = fits.need_of(config, layout, cuda=True, few=(blocks,))
    assert few.total == all_blocks.total
    assert few.parts == all_blocks.parts
    assert few.sent == pytest.approx(all_blocks.sent)


def all_of_it(schedule: Schedule, pp: int, turns: int, *, whole: bool) -> tuple[list[tuple[int, int]], int]:
    """Rehearse the whole pipeline, and every micro-batch."""
    return [(pp, turns)], 0


@pytest.mark.parametrize(
    "layout",
    [Layout(dp_replicate=2), Layout(dp_shard=2), Layout(dp_replicate=2, dp_shard=2), Layout(tp=2), Layout(pp=2)],
)
def test_many_micro_batches_need_what_few_predict(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(dim=64, num_layers=4, num_heads=4, ffn_dim=128, vocab_size=200)
    config = Config(
        model=model, data=Data(seq_len=32), train=Train(global_batch=64, micro_batch=2, dtype="bfloat16", steps=1)
    )
    few = fits.need_of(config, layout, cuda=True)
    monkeypatch.setattr(fits, "_depths", all_of_it)
    every = fits.need_of(config, layout, cuda=True)
    assert few.total == every.total
    assert few.sent == pytest.approx(every.sent, rel=1e-6)


@pytest.mark.parametrize("layout", [Layout(pp=8), Layout(pp=6, dp_shard=2, tp=2)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved_1f1b", "zbv"])
def test_a_long_pipeline_needs_what_short_ones_predict(
    layout: Layout, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = layout.pp * stages_per_rank(schedule, None)
    config = Config(
        model=Model(dim=64, num_layers=2 * stages, num_heads=4, ffn_dim=128, vocab_size=200),
        data=Data(seq_len=32),
        train=Train(global_batch=48 * layout.dp, micro_batch=2, dtype="bfloat16", steps=1),
        parallel=Parallel(pp_schedule=schedule),
    )
    short = fits.need_of(config, layout, cuda=True)
    monkeypatch.setattr(fits, "_depths", all_of_it)
    whole = fits.need_of(config, layout, cuda=True)
    assert short.total == pytest.approx(whole.total, rel=0.01 if schedule == "interleaved_1f1b" else 1e-9)
    # what is outside the blocks is gathered less often while a pipeline fills, of which a short one sees less
    assert short.sent == pytest.approx(whole.sent, rel=0.1)


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [(Layout(), "selective"), (Layout(dp_shard=2, tp=2), "none"), (Layout(dp_replicate=2, dp_shard=2), "full"), (Layout(cp=2), "none")],
)  # fmt: skip
def test_the_real_step_on_fake_tensors_needs_the_same_memory(layout: Layout, checkpointing: str) -> None:
    parallel = Parallel(**{name: getattr(layout, name) for name in AXES})
    config = Config(
        model=Model(dim=128, num_layers=3, num_heads=4, vocab_size=500, ffn_dim=384, max_seq_len=128),
        data=Data(seq_len=128),
        train=Train(
            global_batch=16, micro_batch=2, dtype="bfloat16", steps=1, activation_checkpointing=checkpointing  # type: ignore[arg-type]
        ),
        parallel=parallel,
    )  # fmt: skip
    config = config.replace("model", **dataclasses.asdict(resolve_shape(config.model)))
    assert fits.need_of(config, layout, cuda=False, copies=False).total == pytest.approx(
        traced_bytes(config, layout), rel=0.01
    )


def test_muon_on_several_ranks_cannot_be_traced() -> None:
    config = Config(optim=Optim(name="muon"), parallel=Parallel(dp_shard=2))
    with pytest.raises(ShoalError, match="which parts they hold"):
        traced_bytes(config, Layout(dp_shard=2))


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_loss_in_chunks_holds_the_logits_of_one(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, dim, rows = 640, 32, 1000
    limit = tokens // chunks * rows * 4
    monkeypatch.setattr(layers, "CHUNK_BYTES", limit)
    hidden, weight = (torch.randn(n, dim, requires_grad=True) for n in (tokens, rows))
    with LiveBytes() as live:
        live.ignore(hidden)
        live.ignore(weight)
        linear_cross_entropy_sum(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk_bytes=limit)
    memory = Memory(1)
    memory.begin("loss")
    rehearsed = layers.Layers(memory, Kernels(cuda=False, width=4, copies=True))
    x, w = (
        rehearsed.tape.leaf(Tensor(Space(memory, "parameters", 0), n * dim, 4), lambda grad: None)
        for n in (tokens, rows)
    )
    rehearsed.linear_cross_entropy(x, w, rows, dim)
    # the real one also holds labels and terms of a slice
    assert memory.peaks["loss"].total == pytest.approx(live.most, rel=0.02)
    assert memory.peaks["loss"].parts["logits"] <= limit + layers.SLICE_BYTES_CPU


def test_ddp_sends_its_gradients_and_fsdp_half_as_much_again() -> None:
    model = Model(dim=64, num_layers=2, num_heads=4, vocab_size=100, ffn_dim=128, tie_embeddings=False)
    config = Config(
        model=model, data=Data(seq_len=32), train=Train(global_batch=8, micro_batch=2, dtype="float32", steps=1)
    )
    parameters = parameter_count(resolve_shape(model))
    ddp, fsdp = (fits.need_of(config, layout, cuda=False) for layout in (Layout(dp_replicate=4), Layout(dp_shard=4)))
    assert sum(ddp.sent.values()) == pytest.approx(2 * 3 / 4 * 4 * parameters, rel=1e-6)
    root = 4 * (2 * 100 * 64 + 64)
    # blocks are gathered in forward and in backward, what is around them once; each gradient is reduced once
    assert sum(fsdp.sent.values()) == pytest.approx(3 / 4 * (3 * 4 * parameters - root), rel=1e-6)
