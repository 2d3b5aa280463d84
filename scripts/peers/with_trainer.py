"""transformers.Trainer: `Trainer.train` with transformers' Llama."""

from __future__ import annotations

import tempfile
from typing import Any

from scripts.peers.contract import Recorder, Rows, Spec, answer
from scripts.peers.transformers_llama import llama
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments


class Peer(Trainer):
    """A Trainer that keeps the last micro-batch's loss."""

    last_loss: Tensor

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        self.last_loss = loss.detach()
        return loss


class Clock(TrainerCallback):
    """Records each step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: Peer | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.recorder.step(self.trainer.last_loss)


class ShiftedRows(Rows):
    """Rows whose labels are shifted already, under the name that says so to transformers."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "shift_labels": row["labels"]}


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    model, clock = llama(spec), Clock(recorder)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            bf16=spec.dtype == "bfloat16",
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            adam_beta1=spec.beta1,
            adam_beta2=spec.beta2,
            adam_epsilon=spec.eps,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.clip_norm,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        clock.trainer = Peer(model=model, args=arguments, train_dataset=ShiftedRows(spec), callbacks=[clock])
        clock.trainer.train()
    return model


if __name__ == "__main__":
    answer(train, ["transformers", "accelerate"])
