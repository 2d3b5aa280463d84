"""lightning-fabric: its training loop with transformers' Llama and torch's fused AdamW."""

from __future__ import annotations

from lightning_fabric import Fabric
from scripts.peers.contract import Recorder, Spec, adamw, answer, batches, steps
from scripts.peers.transformers_llama import llama, loss_of
from torch import nn


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if spec.dtype == "bfloat16" else "32-true")
    fabric.launch()
    module = llama(spec)
    model, optimizer = fabric.setup(module, adamw(module, spec))
    loader = fabric.setup_dataloaders(batches(spec))
    for batch in steps(spec, recorder, loader):
        loss = loss_of(model, batch)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=spec.clip_norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss.detach())
    return module


if __name__ == "__main__":
    answer(train, ["lightning-fabric", "transformers"])
