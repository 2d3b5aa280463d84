"""
Data parallel in plain torch: two processes train one model, and their losses are those of recipes/learn/03.

    torchrun --standalone --nproc-per-node=2 docs/learn/01_ddp_basics.py exported/start data/dummy-bytes-...

Every process holds the whole model. Each computes the gradients of its own rows, DistributedDataParallel sums them over
the processes, and all take the same optimizer step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain import SEQ_LEN, STEPS, build_optimizer, learning_rate, load_model, load_rows, shuffled
from torch.nn.parallel import DistributedDataParallel

GLOBAL_BATCH, MICRO_BATCH = 16, 2  # rows in an optimizer step over all processes; rows in one forward


def train(exported: Path, prepared: Path, steps: int = STEPS) -> list[float]:
    """Return the loss of each step, the same on every process."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = load_model(exported)  # the same on all processes, which read one file; DDP broadcasts rank 0's anyway
    ddp = DistributedDataParallel(model)
    optimizer = build_optimizer(model)
    rows = load_rows(prepared)
    losses = []
    for step in range(1, steps + 1):
        # All processes know the 16 rows of this step. Each takes a contiguous share: 8 rows, 4 micro-batches of 2.
        first = (step - 1) * GLOBAL_BATCH
        batch = rows[[shuffled(position, len(rows)) for position in range(first, first + GLOBAL_BATCH)]]
        micro_batches = batch.chunk(world_size)[rank].split(MICRO_BATCH)
        # Divide by the tokens of the WHOLE step, known before backward. A mean for each micro-batch would weigh tokens
        # differently if micro-batches had different numbers of them.
        total_tokens = GLOBAL_BATCH * SEQ_LEN
        optimizer.zero_grad()
        loss_sum = torch.zeros(())
        for index, micro_batch in enumerate(micro_batches):
            # DDP sends gradients as backward makes them. Only the last micro-batch needs that; earlier ones add up locally.
            ddp.require_backward_grad_sync = index == len(micro_batches) - 1
            logits = ddp(micro_batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), micro_batch[:, 1:].flatten(), reduction="sum") / total_tokens
            # DDP averages over processes, and the loss is already divided: undo the average to get the sum.
            (loss * world_size).backward()
            loss_sum += loss.detach()
        dist.all_reduce(loss_sum)  # the loss of all rows, for printing
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the same everywhere, because gradients are
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()  # the same update everywhere, so the weights stay equal without being sent
        losses.append(loss_sum.item())
        if rank == 0:
            print(f"step {step:2}/{STEPS}  loss {losses[-1]:.4f}  norm {norm:.2f}", flush=True)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")  # torchrun's variables give the number of processes and this process's rank
    train(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
