"""AdamW over every parameter, each exactly once, decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from shoal.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """
    AdamW (Loshchilov and Hutter 2019) with its state already there, as zeros.

    The state is made here and not at the first step, so that a checkpoint is loaded into it in place and
    memory is known before training starts.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    for p in parameters:
        optimizer.state[p] = {
            # where the fused kernel of each device wants its counter
            "step": torch.zeros((), dtype=torch.float32, device=p.device if p.is_cuda else "cpu"),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
