"""
Pipeline parallel: each rank holds some of the model's blocks, and micro-batches pass through all stages.

    tokens -> stage 0 -> hidden [B, T, D] -> stage 1 -> ... -> last stage -> loss
              (embed)        gradient [B, T, D] goes back        (norm, head)

`torch.distributed.pipelining` runs the schedule; `config/schedules.py` explains the schedules and their requirements.
Every rank of the `pp` axis loads the same micro-batches: the first stage uses the tokens, the last stage the labels, and all
stages the positions and document ids.

Public parts of torch are used: `PipelineStage` (with its methods `backward_one_chunk` and `backward_weight_one_chunk`
overridden), the schedules and their `step`. Each stage is given the shapes of its inputs and outputs, so that torch needs
no trial run to infer them. One private method is overridden, for torch 2.11 only:
`PipelineStage._get_init_p2p_neighbors_ops`.
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

from shoal.config.schedules import SINGLE, V_SHAPED, Schedule, forward_slots, rank_stages, stage_blocks, stage_rank
from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis
from shoal.models.family import LanguageModel
from shoal.models.layers import Linear
from shoal.system.torch_private import minor, torch_version

SCHEDULES: dict[Schedule, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
# In torch 2.11 and 2.12 the weight part of a split backward fails at the graph node of a Python `Function`: torch reads an
# attribute that such a node does not have ("_input_metadata is invalid").
SPLITS_BACKWARD = minor(torch_version()) > (2, 12)
ENDING = ("norm", "head")  # modules after the blocks; all others come before them

Loss = Callable[[LanguageModel, Tensor, Tensor], Tensor]  # last stage, hidden [B, T, D], labels [B, T] -> scalar
Around = Callable[[int, int], AbstractContextManager[None]]  # stage, micro-batch


def cut(model: LanguageModel, axis: Axis, schedule: Schedule, stages: int) -> dict[int, LanguageModel]:
    """
    Return this rank's `stages` stages of a model on meta, by index. A stage's modules keep their names; others are removed.

    The first stage has all modules before the blocks, the last the norm and the head. If the head is tied to the
    embedding, the last stage has its own copy of `embed`: `sum_tied` keeps the two equal.
    """
    count = axis.size * stages
    blocks = stage_blocks(len(model.blocks), count)
    parts = {
        index: _take(model, blocks[index], begins=index == 0, ends=index == count - 1)
        for index in rank_stages(schedule, axis.size, stages, axis.rank)
    }
    for layer in (module for part in parts.values() for module in part.modules() if isinstance(module, Linear)):
        layer.splits_backward = schedule in V_SHAPED and SPLITS_BACKWARD
    return parts


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
    Set the gradients of both copies of a tied embedding, on the first and the last stage, to their sum, in place.

    Each rank passes the gradients of the copies it holds. In a V schedule, one rank holds both; otherwise each end of
    `axis` holds one, and the ends send each other one message. Both copies get the same bits, since a + b = b + a.
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
    Runs a step's micro-batches through this rank's stages. All ranks of `axis` construct a `Pipeline` and make the same
    calls.

    stages: this rank's stages, as `cut` returns them, with weights, and parallelized along the other axes.
    hidden_shape, dtype: shape and dtype of one micro-batch's hidden states between stages, on this rank.
    tokens_shape: shape of the first stage's input, if its length differs (tensor parallel splits the sequence between
        stages).
    loss: the loss function, called on the rank of the last stage; gradients are summed over micro-batches, never averaged.
    around: called with the stage's and the micro-batch's index; returns a context, entered around all code that adds the
        micro-batch's gradients to the stage. Each stage processes its micro-batches in order.
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
        # do not divide gradients by the number of micro-batches: the loss is already divided by the step's tokens
        self._schedule = SCHEDULES[schedule](
            parts[0] if schedule in SINGLE else parts,
            n_microbatches=micro_batches,
            loss_fn=self._last_loss,
            scale_grads=False,
        )

    def forward_backward(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """
        Add the gradients to `p.grad`. Return each micro-batch's loss, in order, on the last stage's rank, else None.

        Neighbors on `axis` exchange messages. FSDP2 reduces gradients over its own axis, once per stage and call.
        """
        if len(batches) != self._micro_batches:
            raise ValueError(f"the pipeline was built for {self._micro_batches} micro-batches, not {len(batches)}")
        # torch's `step` splits its arguments into equal micro-batches again: views of the concatenated rows
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
        Return each micro-batch's loss, in order, on the last stage's rank, else None; for any number of batches.

        Messages between neighbors on `axis`, in one `batch_isend_irecv` per slot of `forward_slots`. With NCCL, messages
        posted one by one run in order: one that arrives a round later would delay the messages posted after it.
        """
        losses: list[Tensor] = []
        arrivals: dict[tuple[int, int], tuple[Tensor, list[dist.Work]]] = {}
        sent: list[tuple[list[dist.P2POp], list[dist.Work]]] = []  # keeps buffers alive until their messages are done
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
                    module.reshard()  # backward would do it, but there is none
        return losses if self._has_last else None

    @property
    def _has_last(self) -> bool:
        return self._count - 1 in self._stages

    def _holder(self, index: int) -> int | None:
        """Return the rank along the axis that holds this stage; None after the last stage."""
        return stage_rank(self._schedule_name, self._axis.size, index) if index < self._count else None

    def _forward(self, index: int, batch: Batch, arrival: tuple[Tensor, list[dist.Work]] | None) -> Tensor:
        x = batch.tokens
        if arrival is not None:
            x, works = arrival
            _wait(works)
        out: Tensor = self._stages[index](x, **self._places([batch]))
        return out

    def _places(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Return each stage's further inputs, positions and document ids: [batches * B, T] each."""
        places = {"positions_BT": torch.cat([b.positions for b in batches])}
        ids = [b.document_ids for b in batches if b.document_ids is not None]
        return {**places, "document_ids_BT": torch.cat(ids)} if ids else places

    def _last_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self._loss(self._stages[self._count - 1], hidden, labels)

    def _stage(self, index: int, around: Around) -> PipelineStage:
        """Wrap a stage for torch's schedule. The first stage's input is token ids."""
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
    """Wait for each work only once: on a second wait, gloo would wait for another message."""
    while works:
        works.pop().wait()


class _WatchedStage(PipelineStage):
    """
    Enters `around` while a micro-batch's gradients are added: in backward or, if backward is split, in its weight part.

    A split backward (Qi et al. 2024, arXiv:2401.10241, section 2) looks up the module's parameters in the graph. After
    forward FSDP2 has resharded them, so torch finds the shards and silently skips their gradients. The parameters are
    therefore unsharded first, which backward needs anyway.

    If torch cannot split a backward, the first part runs all of it, and the second part does nothing.
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
        """Drop the messages that a rank would send to itself at the turn of a V schedule in torch 2.11: gloo fails on them."""
        ops: list[dist.P2POp] = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def _unshard(self) -> None:
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
