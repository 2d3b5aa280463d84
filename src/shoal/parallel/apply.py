"""
The one place that says in which order a model is made parallel, and what comes of it: a `Runnable`.

    pipeline -> tensor and sequence -> context -> checkpointing -> compile -> shard -> initialise -> reduce

The model stays single-device code with its own names; everything here is done to it from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.config.layout import split_slots
from shoal.config.options import Data, Parallel, Train
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
from shoal.parallel.tree import Leaves
from shoal.parallel.vocab_loss import vocab_parallel_cross_entropy_sum
from shoal.run.phases import Phases
from shoal.system.torch_private import require, torch_version

Loss = Callable[[LanguageModel, Tensor, Tensor, Tensor | float], Tensor]  # (part, hidden, labels, scale) -> 0-d


@dataclass
class Runnable:
    """A model ready to train: its parts, what this process holds of it, and one callable for a whole step's batches."""

    parts: dict[int, LanguageModel]  # this process's pipeline stages; {0: the model} without a pipeline
    shards: list[Shard]
    shapes: dict[str, torch.Size]  # of every parameter of the whole model
    gradients: dict[int, Gradients]  # of each part
    mesh: Mesh
    slots: tuple[range, ...]  # of a step, by data-parallel rank
    randomness: Randomness
    loss: Loss
    cut_batch: Callable[[Batch], Batch]
    bitwise: bool  # sums are taken in one order, whatever the layout
    turns: int  # forwards that every process of a step takes, some perhaps of nothing that counts
    compiled: list[Compiled]
    pipeline: pipeline.Pipeline | None = None
    tied: bool = False  # over a pipeline: the last stage's head is the first one's embedding
    scale: Tensor | float = 1.0  # of the loss, in the step that runs

    def forward_backward(
        self, batches: Sequence[Batch], step: int, phases: Phases, loss_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """
        Gradients of the mean loss over the step's valid tokens (times `loss_scale`), in each shard's `tensor.grad`.

        Returns what each slot added to that mean, [slots * cp], zero where another process has it, so that the sum
        over the world is exact; and the step's number of valid tokens, 0-d. Collectives over all axes.
        """
        mesh, mine = self.mesh, self.slots[self.mesh.dp_rank]
        tokens = self._count(batches)
        self.scale = loss_scale / tokens.clamp(min=1.0)
        losses = torch.zeros(self.slots[-1].stop, mesh.layout.cp, device=mesh.device)
        self.forget_gradients()
        self.randomness.begin(step, mine.start)
        padded = [*batches, *(batches[-1].ignored() for _ in range(self.turns - len(batches)))]
        found = self._pipelined(padded, phases) if self.pipeline else self._in_turns(padded, phases)
        for slot, loss in zip(mine, found, strict=False):
            losses[slot, mesh.axis("cp").rank] = loss
        with phases("reduce"):
            for gradients in self.gradients.values():
                gradients.finish()
            self._publish()
        return losses.flatten() / loss_scale, tokens

    def forget_gradients(self) -> None:
        """Free or zero those of the last step. A shard's plain tensor refers to them too."""
        for gradients in self.gradients.values():
            gradients.zero()
        for held in self.shards:
            if held.tensor is not held.parameter:
                held.tensor.grad = None

    def _in_turns(self, batches: Sequence[Batch], phases: Phases) -> list[Tensor]:
        [model], [gradients] = self.parts.values(), self.gradients.values()
        mine = self.slots[self.mesh.dp_rank]
        losses = []
        for turn, batch in enumerate(batches):
            slot = mine[turn] if turn < len(mine) else None
            gradients.before_backward(slot, turn == len(batches) - 1)
            with phases("forward"):
                loss = self._loss_of(model, batch)
            with phases("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.after_backward(slot)
            losses.append(loss.detach())
        return losses if self.mesh.axis("tp").rank == 0 else []

    def _pipelined(self, batches: Sequence[Batch], phases: Phases) -> list[Tensor]:
        assert self.pipeline is not None
        with phases("forward"):  # and backward: they take turns
            losses = self.pipeline.forward_backward([self.cut_batch(b.to(self.mesh.device)) for b in batches])
        return losses if losses is not None and self.mesh.axis("tp").rank == 0 else []

    def _loss_of(self, model: LanguageModel, batch: Batch) -> Tensor:
        batch = self.cut_batch(batch.to(self.mesh.device))
        hidden = model(batch.tokens, batch.positions, batch.document_ids)
        return self.loss(model, hidden, batch.labels, self.scale)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """
        The loss summed over the valid tokens of these batches, 0-d float64; zero where another process has it.

        Every process must bring equally many. Collectives over all axes but those of data parallel.
        """
        self.scale = 1.0
        if self.pipeline is not None:
            losses = self.pipeline.evaluate([self.cut_batch(b.to(self.mesh.device)) for b in batches]) or []
        else:
            losses = [self._loss_of(self.parts[0], batch) for batch in batches]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.axis("tp").rank == 0:
            for loss in losses:
                total += loss
        return total

    def train(self, on: bool = True) -> None:
        """Dropout on or off."""
        for part in self.parts.values():
            part.train(on)

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Valid tokens of the step, on every process. Neighbours along pp, cp and tp have the same batches."""
        places = self.mesh.coordinates
        counts = places["pp"] == places["cp"] == places["tp"] == 0
        own = float(sum(b.valid_tokens for b in batches)) if counts else 0.0
        return self.mesh.sum(
            torch.full((), own, device=self.mesh.device)
        )  # filled there: a copy would wait for the device

    def _publish(self) -> None:
        """Each shard's gradient as the optimizer takes it: plain, and whole sums."""
        with torch.no_grad():
            for held in self.shards:
                if held.tensor is not held.parameter:
                    grad = held.parameter.grad
                    held.tensor.grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]
            sum_replicated(self.shards, self.mesh)
            if self.pipeline is not None and self.tied:
                grads = {s.twin: s.tensor.grad for s in self.shards if s.name == "embed.weight"}
                pipeline.sum_tied(grads.get(False), grads.get(True), self.mesh.axis("pp"))


def sum_replicated(shards: Sequence[Shard], mesh: Mesh) -> None:
    """
    What tensor parallel leaves whole has a part of its gradient on each process (its part of the sequence).

    A collective over `tp`.
    """
    axis = mesh.axis("tp")
    if axis.size == 1:
        return
    grads = [s.tensor.grad for s in shards if s.summed_over_tp and s.tensor.grad is not None]
    if not grads:
        return
    flat = axis.sum(torch.cat([g.flatten() for g in grads]))
    for grad, total in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def parallelize(
    model: LanguageModel, mesh: Mesh, *, parallel: Parallel, train: Train, data: Data, weights: Fill,
    say: Callable[[str], None],
) -> Runnable:  # fmt: skip
    """
    Make `model` (on meta) a `Runnable` on `mesh`, with `weights`; `say` gets one line for each thing applied.
    """
    require("train")
    layout = mesh.layout
    shapes = {name: p.shape for name, p in model.named_parameters()}
    slots = tuple(split_slots(train.global_batch // train.micro_batch, layout.dp))
    sharded = layout.dp_shard > 1
    turns = max(map(len, slots)) if sharded else len(slots[mesh.dp_rank])

    parts = {0: model}
    if layout.pp > 1:
        stages = stages_per_rank(parallel.pp_schedule, parallel.pp_stages)
        parts = pipeline.cut(model, mesh.axis("pp"), parallel.pp_schedule, stages)
        joint = parallel.pp_schedule in V_SHAPED and not pipeline.SPLITS_BACKWARD
        say(
            f"pipeline parallel: {layout.pp * stages} stages on {layout.pp} processes, {parallel.pp_schedule}"
            + f"; torch {torch_version()} cannot split a backward, so processes are idle longer" * joint
        )

    regions: dict[int, dict[str, Region]] = {}
    for index, part in parts.items():
        regions[index] = {name: Region.whole(p.shape) for name, p in part.named_parameters()}
        if layout.tp > 1:
            regions[index] = tensor.cut(part, mesh.axis("tp"))
    if layout.tp > 1:
        also = ", sequences between them, and the loss" if "partial" in model.TENSOR_PARALLEL.values() else ""
        say(f"tensor parallel: matrices{also} over {layout.tp} processes")

    if layout.cp > 1:
        for part in parts.values():
            context.apply_context(part, mesh.axis("cp"), parallel.cp_method)
        say(f"context parallel: each sequence over {layout.cp} processes, {parallel.cp_method}")

    randomness = Randomness(parts, train.seed)
    compiled: list[Compiled] = []
    for index, part in parts.items():
        compiled += wrap_blocks(part, mesh, train, regions[index])
    if train.activation_checkpointing != "none":
        say(_RECOMPUTED[train.activation_checkpointing].format(budget=train.activation_budget))
    if train.compile:
        say("compile: each block" if layout.tp == 1 else "compile: attention and feed-forward of each block")
    randomness.wrap()

    leaves = None
    if train.repro == "bitwise":
        runs = [slots[member // layout.cp] for member in range(layout.dp * layout.cp)]
        leaves = Leaves(slots[-1].stop, tuple(runs), layout.cp)
        say(f"sums: one tree over the {leaves.slots} micro-batches of a step, whatever the number of processes")
    gradients: dict[int, Gradients] = {}
    if sharded:
        gradients |= {index: shard(part, mesh, parallel, leaves) for index, part in parts.items()}
        across = f", and {layout.dp_replicate} replicas of that" * (layout.dp_replicate > 1)
        say(f"FSDP2: parameters, gradients and optimizer state over {mesh.axis('shard').size} processes{across}")

    offload = parallel.cpu_offload and sharded
    shards = []
    for index, part in parts.items():
        part.to_empty(device="cpu" if offload else mesh.device)
        shards += hold(part, regions[index], mesh, weights, twin=not part.begins)

    if not sharded:
        axis = mesh.axis("batch")
        reducers = {index: GradientReducer(part.parameters(), axis, leaves) for index, part in parts.items()}
        gradients |= reducers
        if axis.size > 1:
            buckets = sum(map(len, reducers.values()))
            say(f"data parallel: gradients of {axis.size} processes summed in {buckets} bucket{'s' * (buckets > 1)}")

    runnable = Runnable(
        parts, shards, shapes, gradients, mesh, slots, randomness, _loss(model, mesh), _cutter(mesh, parallel),
        leaves is not None, turns, compiled,
    )  # fmt: skip
    if layout.pp > 1:
        _open_pipeline(runnable, parallel, train, data, model)
    return runnable


def _open_pipeline(runnable: Runnable, parallel: Parallel, train: Train, data: Data, model: LanguageModel) -> None:
    mesh = runnable.mesh
    mine = runnable.slots[mesh.dp_rank]

    @contextlib.contextmanager
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
        lambda part, out, labels: runnable.loss(part, out, labels, runnable.scale),
        around,
        (train.micro_batch, places),
    )


_RECOMPUTED = {
    "full": "activation checkpointing: each block is computed again in backward",
    "selective": "activation checkpointing: in backward all but products and attention are computed again",
    "budget": "activation checkpointing: the compiler keeps {budget:.0%} of the activations",
}


def wrap_blocks(part: LanguageModel, mesh: Mesh, train: Train, regions: dict[str, Region]) -> list[Compiled]:
    """
    Checkpointing, compilation, and tensor parallel's exchanges, which stay out of what is compiled. Returns that.

    A block that is compiled whole has its checkpointing inside, so that the compiler sees it. Context parallel breaks a
    block's graph, and the compiler leaves alone what breaks inside of checkpointing: there that goes around.
    """
    if train.compile:
        set_activation_budget(train.activation_budget if train.activation_checkpointing == "budget" else 1.0)
    again, bitwise = train.activation_checkpointing in ("full", "selective"), train.repro == "bitwise"
    compiled = []
    if mesh.layout.tp > 1:
        tensor.drop_row_biases(part)
        if train.compile:
            for _, module, style in list(tensor.styles(part)):
                if style == "partial":
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


def hold(part: LanguageModel, regions: dict[str, Region], mesh: Mesh, weights: Fill, *, twin: bool) -> list[Shard]:
    """
    What this process holds of a part that has its memory by now, filled with its `weights`.

    Each process asks for the rows and columns it holds, no more. `twin`: an embedding here is the copy of another stage's.
    """
    layout, places, cut_further = mesh.layout, mesh.coordinates, mesh.axis("shard")
    held = []
    for name, parameter in part.named_parameters():
        region, local = regions[name], parameter
        whole_in_tp = region.is_whole
        counted = places["dp_replicate"] == 0 and (places["tp"] == 0 or not whole_in_tp)
        is_twin = twin and name == "embed.weight"
        counted = counted and not is_twin
        if layout.dp_shard > 1:
            region = region.chunk(0, cut_further.rank, cut_further.size)
            with torch.no_grad():
                local = parameter.to_local()  # type: ignore[attr-defined]
        else:
            counted = counted and places["cp"] == 0
        with torch.no_grad():
            weights(local, name, region.shape, region.slices)
        in_parts = layout.tp > 1 and whole_in_tp and tensor.has_part_of_gradient(part, name)
        held.append(Shard(name, region, local, parameter, counted, in_parts, is_twin))
    return held


def _loss(model: LanguageModel, mesh: Mesh) -> Loss:
    """A part's own, of its whole vocabulary; or of this process's rows of it, where the family's table cuts them."""
    axis = mesh.axis("tp")
    if axis.size == 1 or "vocab" not in model.TENSOR_PARALLEL.values():
        return lambda part, hidden, labels, scale: part.loss(hidden, labels, scale)
    vocab_size = model.shape.vocab_size
    assert vocab_size is not None
    first = Region.whole((vocab_size,)).chunk(0, axis.rank, axis.size).offsets[0]
    rows = Region.whole((vocab_size,)).chunk(0, 0, axis.size).sizes[0]
    return lambda part, hidden, labels, scale: vocab_parallel_cross_entropy_sum(
        hidden, part.head_weight(), labels, scale, axis=axis, first=first, rows=rows
    )


def _cutter(mesh: Mesh, parallel: Parallel) -> Callable[[Batch], Batch]:
    axis = mesh.axis("cp")
    if axis.size == 1:
        return lambda batch: batch
    return lambda batch: context.cut_batch(batch, axis, parallel.cp_method)
