"""
Pipeline parallel: each process holds some of the model's blocks, and micro-batches flow through all of them.

    tokens -> stage 0 -> hidden [B, T, D] -> stage 1 -> ... -> last stage -> loss
              (embed)        gradient [B, T, D] goes back        (norm, head)

`torch.distributed.pipelining` orders and carries out the work; the schedules and what they ask for are explained in
`shoal/pipeline_plan.py`. Every process of the `pp` axis loads the same micro-batches: tokens are used by the first
stage, labels by the last, positions and document ids by all.

Public parts of torch are used: `PipelineStage` (with its methods `backward_one_chunk` and `backward_weight_one_chunk`
overridden), the schedules and their `step`. They are fed with the shapes of what flows, so that no trial run is made at
the start. One private method is overridden, for torch 2.11 alone: `PipelineStage._get_init_p2p_neighbors_ops`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from shoal.config.schedules import SINGLE, Schedule, forward_slots, rank_stages, stage_blocks, stage_rank
from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis
from shoal.models.family import LanguageModel
from shoal.system.torch_private import minor, torch_version

SCHEDULES: dict[Schedule, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
# torch 2.11 and 2.12 cannot compute the weights' part of a split backward behind a Python `Function`: they ask its node for
# what it does not have ("_input_metadata is invalid").
SPLITS_BACKWARD = minor(torch_version()) > (2, 12)
ENDING = ("norm", "head")  # what a model has behind its blocks; all else stands before them

Loss = Callable[[LanguageModel, Tensor, Tensor], Tensor]  # last stage, hidden [B, T, D], labels [B, T] -> scalar
Around = Callable[[int, int], AbstractContextManager[None]]  # stage, micro-batch


def cut(model: LanguageModel, axis: Axis, schedule: Schedule, stages: int) -> dict[int, LanguageModel]:
    """
    This process's `stages` stages of a model on meta, by index; what a stage lacks is gone, what it has keeps its name.

    The first stage has all that stands before the blocks, the last the norm and the head. Where the head is tied to
    the embedding, the last stage has an `embed` of its own: `sum_tied` keeps the two alike.
    """
    count = axis.size * stages
    blocks = stage_blocks(len(model.blocks), count)
    return {
        index: _take(model, blocks[index], begins=index == 0, ends=index == count - 1)
        for index in rank_stages(schedule, axis.size, stages, axis.rank)
    }


def _take(model: LanguageModel, blocks: range, *, begins: bool, ends: bool) -> LanguageModel:
    stage = copy.deepcopy(model)
    stage.begins, stage.ends = begins, ends
    for name, _ in list(stage.named_children()):
        tied = ends and name == "embed" and stage.head is None
        if name != "blocks" and not (ends if name in ENDING else begins or tied):
            setattr(stage, name, None)
    for place, key in enumerate(list(stage.blocks)):
        if place not in blocks:
            del stage.blocks[key]
    return stage


def sum_tied(first: Tensor | None, last: Tensor | None, axis: Axis) -> None:
    """
    Give the first and the last stage's copy of a tied embedding the sum of both gradients, in place.

    Each process passes the gradients of the copies it holds: both in a V, one at either end of `axis`, none between.
    Equal bits for both, since a + b = b + a. A message each way between the ends of `axis`.
    """
    if first is not None and last is not None:
        first += last
        last.copy_(first)
        return
    mine = first if first is not None else last
    if mine is None:
        return
    theirs, peer = torch.empty_like(mine), axis.size - 1 - axis.rank
    ways = [
        dist.P2POp(dist.isend, mine.contiguous(), group=axis.group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=axis.group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(ways):
        work.wait()
    mine += theirs


class Pipeline:
    """
    A step's micro-batches through this process's stages. All processes of `axis` make one and call it alike.

    stages: as `cut` made them, with weights, and otherwise parallelized.
    hidden_shape, dtype: of what goes from stage to stage on this process, for one micro-batch; tokens_shape: of what
        enters the first stage, where that has another length (the sequence's parts of tensor parallel).
    loss: called by the process of the last stage; its result is summed over micro-batches, never divided.
    around: entered (with the stage's index and the micro-batch's) around all that adds to a stage's gradients for
        one micro-batch; each stage comes to its micro-batches in order.
    """

    def __init__(
        self,
        stages: dict[int, LanguageModel],
        axis: Axis,
        schedule: Schedule,
        micro_batches: int,
        device: torch.device,
        hidden_shape: tuple[int, int, int],
        dtype: torch.dtype,
        loss: Loss,
        around: Around = lambda stage, micro_batch: nullcontext(),
        tokens_shape: tuple[int, int] | None = None,
    ) -> None:
        self._stages, self._axis, self._schedule_name, self._loss = stages, axis, schedule, loss
        self._micro_batches, self._count = micro_batches, axis.size * len(stages)
        self._hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
        self._tokens_shape, self._device = tokens_shape or hidden_shape[:2], device
        parts = [self._stage(index, around) for index in stages]
        # gradients are summed: the loss is already divided by the tokens of the whole step
        self._schedule = SCHEDULES[schedule](
            parts[0] if schedule in SINGLE else parts,
            n_microbatches=micro_batches,
            loss_fn=self._last_loss,
            scale_grads=False,
        )

    def forward_backward(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """
        Each micro-batch's loss, in order, on the process of the last stage (else None); gradients add to `p.grad`.

        Messages between neighbours on `axis`; FSDP2's collectives over its own axis at each stage's last micro-batch.
        """
        if len(batches) != self._micro_batches:
            raise ValueError(f"the pipeline was made for {self._micro_batches} micro-batches, not {len(batches)}")
        # torch's `step` cuts the whole again into equal parts: views of the joined rows
        losses: list[Tensor] = []
        self._schedule.step(
            *([torch.cat([b.tokens for b in batches])] if 0 in self._stages else []),
            target=torch.cat([b.labels for b in batches]) if self._has_last else None,
            losses=losses,
            return_outputs=False,
            **self._places(batches),
        )
        return [loss.detach() for loss in losses] if self._has_last else None

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """
        Each micro-batch's loss, in order, on the process of the last stage (else None); as many as there are.

        Messages between neighbours on `axis`, those of a slot of `forward_slots` as one batch: with NCCL a single message
        waits in line with all others of its process, and one that comes a lap later would hold up those behind it.
        """
        losses: list[Tensor] = []
        arrivals: dict[tuple[int, int], tuple[Tensor, list[dist.Work]]] = {}
        sent: list[tuple[list[dist.P2POp], list[dist.Work]]] = []  # what is under way stays in memory
        for slot in forward_slots(self._axis.size, len(self._stages), len(batches)):
            ways: list[dist.P2POp] = []
            works: list[dist.Work] = []
            for index, number in slot:
                here, there = self._holder(index), self._holder(index + 1)
                if here == self._axis.rank:
                    out = self._forward(index, batches[number], arrivals.pop((index, number), None))
                    if there is None:
                        losses.append(self._last_loss(out, batches[number].labels))
                    elif there == here:
                        arrivals[index + 1, number] = out, []
                    else:
                        ways.append(dist.P2POp(dist.isend, out, group=self._axis.group, group_peer=there))
                elif there == self._axis.rank:
                    buffer = torch.empty_like(self._hidden, device=self._device, requires_grad=False)
                    ways.append(dist.P2POp(dist.irecv, buffer, group=self._axis.group, group_peer=here))
                    arrivals[index + 1, number] = buffer, works
            works += dist.batch_isend_irecv(ways) if ways else []
            sent.append((ways, works))
        for _, works in sent:
            _wait(works)
        for stage in self._stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # no backward comes that would
        return losses if self._has_last else None

    @property
    def _has_last(self) -> bool:
        return self._count - 1 in self._stages

    def _holder(self, index: int) -> int | None:
        """The rank along the axis of the process with this stage; None behind the last one."""
        return stage_rank(self._schedule_name, self._axis.size, index) if index < self._count else None

    def _forward(self, index: int, batch: Batch, arrival: tuple[Tensor, list[dist.Work]] | None) -> Tensor:
        x = batch.tokens
        if arrival is not None:
            x, works = arrival
            _wait(works)
        out: Tensor = self._stages[index](x, **self._places([batch]))
        return out

    def _places(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """What each stage gets beside the hidden states: [batches * B, T] each."""
        places = {"positions_BT": torch.cat([b.positions for b in batches])}
        ids = [b.document_ids for b in batches if b.document_ids is not None]
        return {**places, "document_ids_BT": torch.cat(ids)} if ids else places

    def _last_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self._loss(self._stages[self._count - 1], hidden, labels)

    def _stage(self, index: int, around: Around) -> PipelineStage:
        """Torch's view of a stage. On the first, what comes in are token ids."""
        tokens = torch.empty(self._tokens_shape, dtype=torch.int64, device="meta")
        return _WatchedStage(
            around,
            self._stages[index],
            index,
            self._count,
            self._device,
            input_args=self._hidden if index else tokens,
            output_args=self._hidden,
            group=self._axis.group,
        )


def _wait(works: list[dist.Work]) -> None:
    """Each once: gloo would wait for a second message."""
    while works:
        works.pop().wait()


class _WatchedStage(PipelineStage):
    """
    Says when the gradients of a micro-batch are added: in backward, or apart from it in schedules that split it.

    A split backward finds weights in the graph by asking the module for its parameters. FSDP2 answers with the shards
    while they are sharded, as they are after forward, and torch then leaves the gradients out without a word. So they
    are unsharded first, as backward needs them anyway.

    Where torch cannot split a backward, all of it is done in the first part, and nothing in the second.
    """

    def __init__(self, around: Around, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._around = around

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        full_backward = full_backward or not SPLITS_BACKWARD
        if not full_backward:
            self._unshard()
        with self._around(self.stage_index, bwd_chunk_id) if full_backward else nullcontext():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not SPLITS_BACKWARD:
            return
        self._unshard()
        with self._around(self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Torch 2.11's first messages between neighbours, without those of a V's lowest process to itself: gloo fails."""
        ops: list[dist.P2POp] = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def _unshard(self) -> None:
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
