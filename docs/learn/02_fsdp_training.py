"""
Sharding in plain torch: each process keeps half of every tensor, and the losses are those of recipes/learn/04.

    torchrun --standalone --nproc-per-node=2 docs/learn/02_fsdp_training.py exported/start data/dummy-bytes-...

The batch is shared as in 01_ddp_basics.py. New: no process holds the whole model. FSDP2 (`fully_shard`) gathers a block's
weights just before the block runs, frees them after it, and sums gradients so that each process gets its half of the sum.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain import SEQ_LEN, STEPS, build_optimizer, learning_rate, load_model, load_rows, shuffled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

GLOBAL_BATCH = 16  # rows in an optimizer step; each process computes its half in one forward


def shard(exported: Path) -> torch.nn.Module:
    """Return the model with each tensor split by rows over the processes."""
    model = load_model(exported)  # whole, to keep this short; a large model is built on meta and filled shard by shard
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)  # the unit of all-gathering: only one block is whole at a time
    fully_shard(model, mesh=mesh)  # the remaining parameters: embedding, last norm, head
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP2 averages over processes by default. The loss is already divided, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def train(exported: Path, prepared: Path, steps: int = STEPS) -> list[float]:
    """Return the loss of each step, the same on every process."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = shard(exported)
    optimizer = build_optimizer(model)  # over the shards, so AdamW's two averages take half the memory too
    rows = load_rows(prepared)
    losses = []
    for step in range(1, steps + 1):
        first = (step - 1) * GLOBAL_BATCH
        batch = rows[[shuffled(position, len(rows)) for position in range(first, first + GLOBAL_BATCH)]]
        mine = batch.chunk(world_size)[rank]
        optimizer.zero_grad()
        logits = model(mine[:, :-1])  # all-gather, block by block
        loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / (GLOBAL_BATCH * SEQ_LEN)
        loss.backward()  # all-gather again, from the last block to the first, and a reduce-scatter of each gradient
        loss_sum = loss.detach()
        dist.all_reduce(loss_sum)
        # A shard's norm is not the gradient's: clip_grad_norm_ sums the squares over processes, since these are DTensors.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()  # on this process's half of each parameter
        losses.append(loss_sum.item())
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # a collective: on every rank
        if rank == 0:
            print(f"step {step:2}/{STEPS}  loss {losses[-1]:.4f}  norm {whole_norm:.2f}", flush=True)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
