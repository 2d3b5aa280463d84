"""One rank's step, rehearsed: a model parallelized as by `parallel/apply.py`, and the phases of `parallel/runnable.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from shoal.config.layout import Layout
from shoal.config.options import Config
from shoal.config.schedules import V_SHAPED, Schedule, rank_stages, stage_blocks, stages_per_rank
from shoal.plan.rehearse.collectives import Along
from shoal.plan.rehearse.families import Around, Part, Shape, Sizes, block_forward, document_mask, enter, leave, rope
from shoal.plan.rehearse.layers import FLOAT32, INT64, Kernels, Layers
from shoal.plan.rehearse.muon import orthogonalize
from shoal.plan.rehearse.pipeline import Sent, actions
from shoal.plan.rehearse.sharding import Group, Shared
from shoal.plan.rehearse.tape import Memory, Peak, Space, Tensor
from shoal.plan.rehearse.vocab_loss import vocab_parallel_loss
from shoal.plan.rehearse.work import Op, Work

SHARED_BYTES = 2**20  # of gradients from which processes on CPUs add them in memory that they share


@dataclass(frozen=True)
class Rehearsal:
    """
    What one step of a rank needs.

    peaks: the most memory, by phase. buffers: of these, a pipeline's bytes for each micro-batch. sent: the bytes that each
    further micro-batch leaves behind until the step ends. work: what it computes and sends.
    """

    peaks: Mapping[str, Peak]
    buffers: int
    sent: int
    work: Work

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.total)


@dataclass(frozen=True)
class Stage:
    """A run of blocks, with what comes before the first and after the last."""

    blocks: range
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Case:
    """What a rehearsal takes of a config, but its layout. stages: per rank of a pipeline."""

    sizes: Sizes
    micro_batch: int
    seq_len: int
    document_mask: bool
    checkpointing: str
    resharded: bool
    cp_method: str
    schedule: Schedule
    stages: int
    muon: bool

    @classmethod
    def of(cls, config: Config) -> Case:
        """Return the case of a config with a resolved shape and a known vocabulary size."""
        train, parallel = config.train, config.parallel
        return cls(
            Sizes.of(config.model), train.micro_batch, config.data.seq_len, config.data.document_mask,
            train.activation_checkpointing, parallel.reshard_after_forward != "never", parallel.cp_method,
            parallel.pp_schedule, stages_per_rank(parallel.pp_schedule, parallel.pp_stages), config.optim.name == "muon",
        )  # fmt: skip


def rehearse(
    case: Case, layout: Layout, kernels: Kernels, micro_batches: int, *, pp_rank: int = 0, granule: int = 1
) -> Rehearsal:
    """
    Rehearse a step of the first rank along each axis but `pp`.

    micro_batches: of a step on this rank. granule: the allocator's unit in bytes.
    """
    memory = Memory(granule)
    rank = Rank(case, layout, Layers(memory, kernels), pp_rank)
    rank.hold(micro_batches)
    rank.layers.work.once[Op("step")] += 1
    memory.begin("idle")
    if layout.pp == 1:
        rank.take_turns(micro_batches)
    else:
        rank.follow_schedule(micro_batches)
    memory.begin("optimizer")
    if case.muon:
        orthogonalize(rank.layers, layout, rank.matrices())
    return Rehearsal(memory.peaks, rank.buffers(), rank.left_behind(), rank.layers.work)


class Rank:
    """A rank's part of the model while its step is rehearsed."""

    def __init__(self, case: Case, layout: Layout, layers: Layers, pp_rank: int) -> None:
        self.case, self.layout, self.layers, self.pp_rank = case, layout, layers, pp_rank
        self.sizes = case.sizes
        along = {name: Along(layers, name, size) for name in ("tp", "cp") if (size := getattr(layout, name)) > 1}
        self.part = Part(
            case.micro_batch, case.seq_len // layout.cp, along.get("tp"), along.get("cp"), case.cp_method
        )  # fmt: skip
        self.stages = self._stages()
        self.shared: list[Shared] = []  # by stage, with FSDP2
        self.groups: list[dict[str, Group]] = []  # by stage: its blocks by number, and "" for all else
        self.weights: list[dict[str, dict[str, Tensor]]] = []
        self.held: list[Space] = []
        self.sent = Sent(case.schedule, waits=layers.kernels.cuda)

    def _stages(self) -> list[Stage]:
        case, count = self.case, self.layout.pp
        if count == 1:
            return [Stage(range(self.sizes.num_layers), True, True)]
        blocks = stage_blocks(self.sizes.num_layers, count * case.stages)
        mine = rank_stages(case.schedule, count, case.stages, self.pp_rank)
        return [Stage(blocks[n], n == 0, n == count * case.stages - 1) for n in mine]

    # --- what it holds between steps

    def hold(self, micro_batches: int) -> None:
        """Allocate parameters, moments, gradients that stay, and a pipeline's buffers."""
        for stage in self.stages:
            shapes = {str(n): self._split(self.sizes.block()) for n in stage.blocks} | {
                "": self._split(self._around(stage))
            }
            if self.layout.dp_shard > 1:
                self._hold_sharded(shapes)
            else:
                self._hold_whole(shapes)
        self.held.append(Space(self.layers.tape.memory, "messages", self.buffers() * micro_batches))

    def buffers(self) -> int:
        """Return the bytes that a pipeline keeps for each micro-batch: what comes in, and tokens, labels and places."""
        if self.layout.pp == 1:
            return 0
        integers = 1 + self.case.document_mask + sum(stage.begins + stage.ends for stage in self.stages)
        return self._borders() * self._hidden() + INT64 * integers * self.part.tokens

    def left_behind(self) -> int:
        """Return the bytes of each micro-batch that a pipeline keeps after it has sent them, until the step ends."""
        return self._borders() * self._hidden() if self.layout.pp > 1 and self.sent.keeps_all else 0

    def _borders(self) -> int:
        """Return how often a micro-batch enters a stage from another one or leaves it for another one, on this rank."""
        return sum((not stage.begins) + (not stage.ends) for stage in self.stages)

    def _around(self, stage: Stage) -> dict[str, Shape]:
        before = self.sizes.before()
        if not stage.begins:  # the last stage's copy of a tied embedding
            before = {"embed.weight": before["embed.weight"]} if stage.ends and self.sizes.tied else {}
        return before | (self.sizes.after() if stage.ends else {})

    def _hold_sharded(self, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
        layout = self.layout
        shared = Shared(
            self.layers, layout.dp_shard * layout.cp, layout.dp_replicate, self.case.resharded, stays=layout.pp > 1
        )  # fmt: skip
        groups: dict[str, Group] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        for name, own in shapes.items():
            weights[name] = {}
            if not own:  # outside the blocks of a stage between the first and the last: FSDP2 makes no group
                continue
            width = self.layers.kernels.width if name else FLOAT32
            group = groups[name] = Group(shared, own, width, is_root=not name)
            for rows, row in own.values():
                self._keep(f"parameters {self._moments(name, row)}", -(-rows // shared.ranks) * row)
            weights[name] = {
                key: self._weight(rows * row, width, partial(group.accumulate, key)) for key, (rows, row) in own.items()
            }
        self.shared.append(shared)
        self.groups.append(groups)
        self.weights.append(weights)

    def _hold_whole(self, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
        summed = self.layout.dp_replicate * self.layout.cp > 1
        for name, own in shapes.items():
            for rows, row in own.values():
                self._keep(f"parameters {self._moments(name, row)}" + " gradients" * summed, rows * row)
        self.groups.append({})
        if summed:
            size = FLOAT32 * sum(rows * row for own in shapes.values() for rows, row in own.values())
            shares = self.layers.kernels.copies and size >= SHARED_BYTES
            self.layers.work.messages["shared_sum" if shares else "all_reduce", "batch", size] += 1
        self.weights.append(
            {
                name: {
                    key: self._weight(rows * row, FLOAT32, self._add_in_place if summed else self._take_first())
                    for key, (rows, row) in own.items()
                }
                for name, own in shapes.items()
            }
        )

    def _moments(self, name: str, row: int) -> str:
        """Return the averages of a parameter's gradient that its optimizer keeps. name: of its block, empty outside."""
        return "moments" if self.case.muon and name and row > 1 else "moments moments"

    def _add_in_place(self, grad: Space) -> None:
        """Add a gradient to its bucket."""
        self.layers.work.op("sum", grad.size // FLOAT32)

    def _take_first(self) -> Callable[[Space], None]:
        """Return what keeps a parameter's first gradient of a step, and adds the others to it."""
        kept: list[Space] = []

        def accumulate(grad: Space) -> None:
            if kept:
                self._add_in_place(grad)
            else:
                grad.move("gradients")
                kept.append(grad)

        return accumulate

    def _keep(self, parts: str, count: int) -> None:
        """Hold a parameter, or this rank's shard of it, and what belongs to it."""
        self.layers.work.once[Op("update", (count,))] += 1
        self.held += [Space(self.layers.tape.memory, part, FLOAT32 * count) for part in parts.split()]

    def _weight(self, count: int, width: int, accumulate: Callable[[Space], None]) -> Tensor:
        """Return a parameter, whose memory is counted apart."""
        return self.layers.tape.leaf(Tensor(Space(self.layers.tape.memory, "parameters", 0), count, width), accumulate)

    def _split(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes that tensor parallel leaves to its first rank."""
        part, found = self.part, {}
        for name, (rows, row) in shapes.items():
            layer, _, kind = name.rpartition(".")
            if layer.endswith(("norm", "position")):
                found[name] = rows, row
            elif layer.endswith((".o", ".down")):
                found[name] = (rows, part.split(row)) if kind == "weight" else (rows, row)
            else:
                found[name] = part.split(rows), row
        return found

    def matrices(self) -> list[Shape]:
        """Return the shapes of the matrices that Muon updates, undivided."""
        block = [shape for shape in self.sizes.block().values() if shape[1] > 1]
        return block * sum(len(stage.blocks) for stage in self.stages)

    def _hidden(self) -> int:
        """Return the bytes of a micro-batch's hidden states between stages."""
        return self.part.split(self.part.tokens) * self.sizes.dim * self.layers.kernels.width

    # --- its step

    def take_turns(self, micro_batches: int) -> None:
        """Run forward and backward of each micro-batch in turn."""
        memory = self.layers.tape.memory
        for number in range(micro_batches):
            self.layers.work.op("turn")
            memory.begin("forward")
            loss = self._loss(0, self._forward(0))
            memory.begin("backward")
            self._backward(0, loss, last=number == micro_batches - 1)
            del loss

    def follow_schedule(self, micro_batches: int) -> None:
        """Run the forwards and backwards of a pipeline's schedule."""
        memory = self.layers.tape.memory
        outs: dict[
            tuple[int, int], tuple[Tensor, Space]
        ] = {}  # where backward begins, and what the schedule keeps until then
        for forward, index, number in actions(
            self.case.schedule, self.layout.pp, len(self.stages), self.pp_rank, micro_batches
        ):
            memory.begin("forward" if forward else "backward")
            self.layers.work.op("turn", times=forward)
            stage = self.stages[index]
            if forward:
                out = self._forward(index)
                self.sent.forward(out.space, leaves=not stage.ends)
                outs[index, number] = self._loss(index, out) if stage.ends else out, out.space
                del out
            else:
                self.sent.backward()
                root, kept = outs.pop((index, number))
                self._backward(index, root, last=number == micro_batches - 1)
                del root, kept
            goes_on = not (stage.ends if forward else stage.begins)
            self.layers.work.messages["send", "pp", self._hidden()] += goes_on

    def _forward(self, index: int) -> Tensor:
        """Run one stage on a micro-batch; return the hidden states for the next stage, or for the loss."""
        layers, sizes, part, stage = self.layers, self.sizes, self.part, self.stages[index]
        root, outer = self.weights[index][""], self.groups[index].get("")
        if outer is not None:
            outer.gather(forward=True)
        shared = Around(rope(layers, sizes, part), document_mask(layers, part) if self.case.document_mask else None)
        x = enter(layers, sizes, part, root) if stage.begins else self._arrival()
        for number in stage.blocks:
            x = self._block(index, str(number), x, shared)
            x = layers.notify(x, partial(layers.tape.memory.begin, self._phase(stage, number)))
        if stage.ends:
            layers.tape.memory.begin("loss")
            x = leave(layers, sizes, root, x)
        del shared
        if self.shared:
            self.shared[index].held = None
        return x

    def _loss(self, index: int, x: Tensor) -> Tensor:
        """Return the loss of the last stage's hidden states."""
        layers, sizes, part, root = self.layers, self.sizes, self.part, self.weights[index][""]
        head = root["embed.weight" if sizes.tied else "head.weight"]
        if part.tp is not None:
            return vocab_parallel_loss(layers, part.tp, x, head, part.split(sizes.vocab_size), sizes.dim)
        return layers.linear_cross_entropy(x, head, sizes.vocab_size, sizes.dim)

    @staticmethod
    def _phase(stage: Stage, number: int) -> str:
        """Return the name of a block's backward. Memory changes evenly from block to block, so it peaks in the first or last."""
        places = {stage.blocks[-1]: "last", stage.blocks[0]: "first"}
        return f"backward, {places.get(number, 'middle')} block"

    def _arrival(self) -> Tensor:
        """Hidden states in one of the pipeline's buffers; their gradient is sent."""
        count = self.part.split(self.part.tokens) * self.sizes.dim
        return self._weight(count, self.layers.kernels.width, self.sent.gradient)

    def _block(self, index: int, name: str, x: Tensor, around: Around) -> Tensor:
        group, weights = self.groups[index].get(name), self.weights[index][name]
        forward = partial(self._checkpointed, partial(block_forward, self.layers, self.sizes, self.part, weights))
        if group is None:
            return forward(x, around)
        group.gather(forward=True)
        x = self.layers.notify(x, group.after_backward)
        x = forward(x, around)
        group.after_forward()
        return self.layers.notify(x, group.before_backward)

    def _checkpointed(self, forward: Callable[[Tensor, Around], Tensor], x: Tensor, around: Around) -> Tensor:
        mode = self.case.checkpointing
        if mode == "none":
            return forward(x, around)
        work, tape = self.layers.work, self.layers.tape

        def run() -> Tensor:
            if tape.again:
                work.op("again")
            return forward(x, around) if mode == "full" else self._decided(forward, x, around)

        return tape.checkpoint(run, keeps=mode != "full")

    def _decided(self, forward: Callable[[Tensor, Around], Tensor], x: Tensor, around: Around) -> Tensor:
        """Run a block whose every kernel selective checkpointing decides about."""
        work = self.layers.work
        before = work.done.total()
        try:
            return forward(x, around)
        finally:
            work.op("dispatch", times=work.done.total() - before)

    def _backward(self, index: int, out: Tensor, *, last: bool) -> None:
        pipelined = self.layout.pp > 1
        if self.shared:
            self.shared[index].sync = last and not pipelined
        self.layers.tape.backward(out, split=self.case.schedule in V_SHAPED and pipelined)
        if self.shared:
            groups = self.groups[index]
            self.layers.tape.memory.begin("gradients outside the blocks")
            if "" in groups:
                groups[""].after_backward()
            if pipelined and last:
                self.shared[index].sync = True
                for name in sorted(groups, key=bool):  # the root, then the blocks in order
                    groups[name].after_backward()
            if last:
                self.shared[index].sent = None
