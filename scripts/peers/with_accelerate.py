"""accelerate: its training loop with transformers' Llama and torch's fused AdamW."""

from __future__ import annotations

from accelerate import Accelerator
from scripts.peers.contract import Recorder, Spec, adamw, answer, batches, steps
from scripts.peers.transformers_llama import llama, loss_of
from torch import nn
from torch.optim.lr_scheduler import ConstantLR


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if spec.dtype == "bfloat16" else "no")
    model = llama(spec)
    optimizer = adamw(model, spec)
    schedule = ConstantLR(optimizer, factor=1.0)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, batches(spec), schedule)
    for batch in steps(spec, recorder, loader):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), spec.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        recorder.step(loss.detach())
    trained: nn.Module = accelerator.unwrap_model(model)
    return trained


if __name__ == "__main__":
    answer(train, ["accelerate", "transformers"])
