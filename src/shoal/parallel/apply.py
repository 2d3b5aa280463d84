"""
The one place that sets the order in which a model is parallelized. The result is a `Runnable`.

    pipeline -> tensor and sequence -> context -> checkpointing -> compile -> shard -> initialize -> reduce

The model remains single-device code and keeps its parameter names: everything here wraps it from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from shoal.config.data_options import Data
from shoal.config.layout import split_slots
from shoal.config.options import Parallel, Train
from shoal.config.schedules import V_SHAPED, stages_per_rank
from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region, Shard
from shoal.models.build import Fill
from shoal.models.family import LanguageModel
from shoal.parallel import context, pipeline, tensor
from shoal.parallel.fsdp import shard
from shoal.parallel.randomness import Randomness
from shoal.parallel.recompute import Compiled, checkpointed, compile_forward, set_activation_budget
from shoal.parallel.reduce import GradientReducer, Gradients
from shoal.parallel.runnable import Loss, Runnable, own_loss, uncut
from shoal.parallel.tree import Leaves
from shoal.parallel.vocab_loss import vocab_parallel_cross_entropy_sum
from shoal.system.torch_private import require, torch_version

Parts = dict[int, LanguageModel]  # this rank's pipeline stages, by index
Say = Callable[[str], None]


def parallelize(
    model: LanguageModel, mesh: Mesh, *, parallel: Parallel, train: Train, data: Data, weights: Fill, say: Say
) -> Runnable:
    """Parallelize `model` (on meta) over `mesh` and fill it with `weights`. `say` gets one line per technique applied."""
    require("train")
    layout = mesh.layout
    shapes = {name: p.shape for name, p in model.named_parameters()}
    slots = tuple(split_slots(train.global_batch // train.micro_batch, layout.dp))
    sharded = layout.dp_shard > 1
    # FSDP2's collectives are part of forward and backward: every rank must run the same number of both. Ranks with fewer
    # micro-batches add some with ignored labels.
    turns = max(map(len, slots)) if sharded else len(slots[mesh.dp_rank])

    parts = _split_into_stages(model, mesh, parallel, say)
    regions = _split_matrices(model, parts, mesh, say)  # before FSDP2, which shards the rows of the results
    _split_sequences(parts, mesh, parallel, say)
    compiled = _wrap_parts(parts, mesh, train, regions, say)
    randomness = Randomness(parts, train.seed)
    randomness.wrap()  # outside of checkpointing, so that a recomputed forward draws the same numbers
    leaves = _leaves(slots, mesh, say) if train.repro == "bitwise" else None
    gradients = _shard(parts, mesh, parallel, leaves, say) if sharded else {}
    shards = []  # memory is allocated only now: a rank never holds a whole parameter that it shards
    for index, part in parts.items():
        part.to_empty(device="cpu" if parallel.cpu_offload and sharded else mesh.device)
        shards += hold(part, regions[index], mesh, weights, twin=not part.begins)
    if not sharded:
        gradients = _replicate(parts, mesh, leaves, say)

    runnable = Runnable(
        parts, shards, shapes, gradients, mesh, slots, randomness, _loss(model, mesh), _cutter(mesh, parallel),
        leaves is not None, turns, compiled, num_sources=len(data.sources or ("",)),
    )  # fmt: skip
    if layout.pp > 1:
        _open_pipeline(runnable, parallel, train, data, model)
    return runnable


def _split_into_stages(model: LanguageModel, mesh: Mesh, parallel: Parallel, say: Say) -> dict[int, LanguageModel]:
    count = mesh.layout.pp
    if count == 1:
        return {0: model}
    stages = stages_per_rank(parallel.pp_schedule, parallel.pp_stages)
    joint = parallel.pp_schedule in V_SHAPED and not pipeline.SPLITS_BACKWARD
    say(
        f"pipeline parallel: {count * stages} stages on {count} processes, {parallel.pp_schedule}"
        + f"; torch {torch_version()} cannot split a backward, so processes are idle longer" * joint
    )
    return pipeline.cut(model, mesh.axis("pp"), parallel.pp_schedule, stages)


def _split_matrices(model: LanguageModel, parts: Parts, mesh: Mesh, say: Say) -> dict[int, dict[str, Region]]:
    """Shrink parameters to this rank's tensor-parallel shards, if any. Return this rank's regions, by part and name."""
    axis = mesh.axis("tp")
    if axis.size == 1:
        return {i: {n: Region.whole(p.shape) for n, p in part.named_parameters()} for i, part in parts.items()}
    by_sequence = "gather_reduce_scatter" in model.TENSOR_PARALLEL.values()
    also = ", sequences between them, and the loss" if by_sequence else ""
    regions = {index: tensor.cut(part, axis) for index, part in parts.items()}
    say(f"tensor parallel: matrices{also} over {axis.size} processes")
    return regions


def _split_sequences(parts: Parts, mesh: Mesh, parallel: Parallel, say: Say) -> None:
    axis = mesh.axis("cp")
    if axis.size > 1:
        for part in parts.values():
            context.apply_context(part, axis, parallel.cp_method)
        say(f"context parallel: each sequence over {axis.size} processes, {parallel.cp_method}")


def _wrap_parts(
    parts: Parts, mesh: Mesh, train: Train, regions: dict[int, dict[str, Region]], say: Say
) -> list[Compiled]:
    compiled: list[Compiled] = []
    for index, part in parts.items():
        compiled += wrap_blocks(part, mesh, train, regions[index])
    if train.activation_checkpointing != "none":
        say(_RECOMPUTED[train.activation_checkpointing].format(budget=train.activation_budget))
    if train.compile:
        say("compile: each block" if mesh.layout.tp == 1 else "compile: attention and feed-forward of each block")
    return compiled


def _leaves(slots: Sequence[range], mesh: Mesh, say: Say) -> Leaves:
    layout = mesh.layout
    # `cp` neighbors run the same slots, and each has a partial sum of every leaf's gradient
    runs = [slots[member // layout.cp] for member in range(layout.dp * layout.cp)]
    leaves = Leaves(slots[-1].stop, tuple(runs), layout.cp)
    say(
        f"gradients: summed as one tree over the {leaves.slots} micro-batches of a step, whatever the number of processes"
    )
    return leaves


def _shard(parts: Parts, mesh: Mesh, parallel: Parallel, leaves: Leaves | None, say: Say) -> dict[int, Gradients]:
    gradients: dict[int, Gradients] = {i: shard(part, mesh, parallel, leaves) for i, part in parts.items()}
    replicas = mesh.layout.dp_replicate
    across = f", and {replicas} replicas of that" * (replicas > 1)
    say(f"FSDP2: parameters, gradients and optimizer state over {mesh.axis('shard').size} processes{across}")
    return gradients


def _replicate(parts: Parts, mesh: Mesh, leaves: Leaves | None, say: Say) -> dict[int, Gradients]:
    axis = mesh.axis("batch")
    reducers = {index: GradientReducer(part.parameters(), axis, leaves) for index, part in parts.items()}
    if axis.size > 1:
        buckets = sum(map(len, reducers.values()))
        where = f"{buckets} bucket{'s' * (buckets > 1)}"
        if all(reducer.shares_memory for reducer in reducers.values()):
            where = "memory that they share"
        say(f"data parallel: gradients of {axis.size} processes summed in {where}")
    return {**reducers}


def _open_pipeline(runnable: Runnable, parallel: Parallel, train: Train, data: Data, model: LanguageModel) -> None:
    mesh = runnable.mesh
    mine = runnable.slots[mesh.dp_rank]

    @contextlib.contextmanager  # the pipeline enters it around the code that adds a micro-batch's gradients
    def around(stage: int, micro_batch: int) -> Iterator[None]:
        yield
        runnable.gradients[stage].after_backward(mine[micro_batch] if micro_batch < len(mine) else None)

    places = data.seq_len // mesh.layout.cp
    runnable.tied = model.shape.tie_embeddings
    runnable.pipeline = pipeline.Pipeline(
        runnable.parts,
        mesh.axis("pp"),
        parallel.pp_schedule,
        runnable.turns,
        mesh.device,
        (train.micro_batch, places // mesh.layout.tp, model.shape.dim),
        model.compute_dtype,
        runnable.loss_of,
        around,
        (train.micro_batch, places),
    )


_RECOMPUTED = {
    "full": "activation checkpointing: backward recomputes each block",
    "selective": "activation checkpointing: backward recomputes all but matrix products and attention",
    "budget": "activation checkpointing: the compiler keeps {budget:.0%} of the activations",
}


def wrap_blocks(part: LanguageModel, mesh: Mesh, train: Train, regions: dict[str, Region]) -> list[Compiled]:
    """
    Apply checkpointing, compilation and tensor parallel's collectives (never compiled). Return the compiled forwards.

    A block compiled as one graph is checkpointed inside that graph, where the compiler sees it. Context parallel causes
    graph breaks, and the compiler skips checkpointed code that contains a break: checkpointing then wraps the compiled block.
    """
    if train.compile:
        set_activation_budget(train.activation_budget if train.activation_checkpointing == "budget" else 1.0)
    again, bitwise = train.activation_checkpointing in ("full", "selective"), train.repro == "bitwise"
    compiled = []
    if mesh.layout.tp > 1:
        tensor.drop_row_biases(part)
        if train.compile:
            for _, module, style in list(tensor.styles(part)):
                if style == "gather_reduce_scatter":
                    compiled.append(compile_forward(module, whole=mesh.layout.cp == 1, bitwise=bitwise, again=again))
        tensor.connect(part, mesh.axis("tp"), regions)
    whole, in_parts = mesh.layout.tp == mesh.layout.cp == 1, mesh.layout.tp == 1 < mesh.layout.cp
    for block in part.blocks.values():
        if train.compile and in_parts:
            compiled.append(compile_forward(block, whole=False, bitwise=bitwise, again=again))
        if again:
            block.forward = checkpointed(block.forward, train.activation_checkpointing)
        if train.compile and whole:
            compiled.append(compile_forward(block, whole=True, bitwise=bitwise, again=again))
    return compiled


@torch.no_grad()
def hold(part: LanguageModel, regions: dict[str, Region], mesh: Mesh, weights: Fill, *, twin: bool) -> list[Shard]:
    """
    Fill a part, whose memory is allocated, with `weights`. Return this rank's shards of it.

    Each rank reads only the rows and columns it holds. `twin`: whether the part's embedding, if any, is a copy of
    the first stage's.
    """
    layout, cut_further = mesh.layout, mesh.axis("shard")
    copies = mesh.axis("dp_replicate" if layout.dp_shard > 1 else "batch")  # these ranks hold the same elements
    held = []
    for name, parameter in part.named_parameters():
        region, local = regions[name], parameter
        whole_in_tp = region.is_whole
        is_twin = twin and name == "embed.weight"
        # Of the ranks that hold the same elements, one counts them in the gradient's norm.
        counted = copies.rank == 0 and (mesh.axis("tp").rank == 0 or not whole_in_tp) and not is_twin
        if layout.dp_shard > 1:
            region = region.chunk(0, cut_further.rank, cut_further.size)
            local = parameter.to_local()  # type: ignore[attr-defined]
        weights(local, name, region.shape, region.slices)
        in_parts = layout.tp > 1 and whole_in_tp and tensor.has_part_of_gradient(part, name)
        held.append(Shard(name, region, local, parameter, counted, in_parts, is_twin))
    return held


def _loss(model: LanguageModel, mesh: Mesh) -> Loss:
    """Return the loss function: the vocabulary-parallel one if `tp` shards the family's vocabulary, else `own_loss`."""
    axis = mesh.axis("tp")
    if axis.size == 1 or "vocab_parallel" not in model.TENSOR_PARALLEL.values():
        return own_loss
    vocab_size = model.shape.vocab_size
    assert vocab_size is not None
    first = Region.whole((vocab_size,)).chunk(0, axis.rank, axis.size).offsets[0]
    rows = Region.whole((vocab_size,)).chunk(0, 0, axis.size).sizes[0]
    return lambda part, hidden, labels, scale, each: vocab_parallel_cross_entropy_sum(
        hidden, part.head_weight(), labels, scale, each, axis=axis, first=first, rows=rows
    )


def _cutter(mesh: Mesh, parallel: Parallel) -> Callable[[Batch], Batch]:
    axis = mesh.axis("cp")
    if axis.size == 1:
        return uncut
    return lambda batch: context.cut_batch(batch, axis, parallel.cp_method)
