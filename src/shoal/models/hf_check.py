"""
Whether a model of transformers sees what it should: nothing that comes later, and nothing of another document.

Which family reads positions, makes a mask of them or keeps a state from one document to the next is not written down
anywhere. So it is tried out, on the run's own weights, in its layout, with rows of its length, before the first step:
what a place gives must not change when what it may not see is changed. A few forwards of one micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.family import LanguageModel

# Relative norm of the difference. The same kernel on what must be the same: bits, mostly. A document at another place
# in a row goes through other kernels, which round otherwise.
SAME, SAME_ELSEWHERE = 1e-4, {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.no_grad()
def check_sight(model: LanguageModel, *, batch: int, seq_len: int, documents: bool, device: torch.device) -> None:
    """
    Raises `ModelError` where a token sees later ones or, with `documents`, those of another document.

    All processes that hold a part of the model take part: its forward may be a collective.
    """
    if seq_len < 2:
        return
    half = seq_len // 2
    assert model.shape.vocab_size is not None
    tokens = torch.randint(0, model.shape.vocab_size, (3, batch, half), generator=torch.Generator().manual_seed(0))
    first, second, third = tokens.to(device)
    training = model.training
    model.train(False)
    try:
        alone = _first_forward(model, torch.cat([second, first], 1))[:, :half]
        if _differ(alone, model(torch.cat([second, third], 1))[:, :half]) > SAME:
            raise ModelError(
                f"{model.shape.from_} is not causal: what a token gives depends on later ones; it cannot be trained to "
                "predict them"
            )
        if documents:
            _check_documents(model, first, second, third, alone)
    finally:
        model.train(training)


def _first_forward(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Raises `ModelError` where the family's code mixes float32 of its own with the compute dtype."""
    try:
        hidden: Tensor = model(tokens)
    except RuntimeError as error:
        if "dtype" not in str(error) or model.compute_dtype == torch.float32:
            raise
        raise ModelError(
            f"the code of {model.shape.from_} does not run in {model.compute_dtype} ({error}); set train.dtype to float32"
        ) from error
    return hidden


def _check_documents(model: LanguageModel, first: Tensor, second: Tensor, third: Tensor, alone: Tensor) -> None:
    half = first.shape[1]
    places = torch.arange(half, device=first.device).repeat(2).expand(len(first), -1)
    ids = torch.arange(2, device=first.device).repeat_interleave(half).expand(len(first), -1)
    behind, other = (model(torch.cat([x, second], 1), places, ids)[:, half:] for x in (first, third))
    if _differ(behind, other) > SAME or _differ(behind, alone) > SAME_ELSEWHERE[model.compute_dtype]:
        raise ModelError(
            f"{model.shape.from_} does not keep documents of a row apart, and data.document_mask is true; set "
            "data.document_mask to false"
        )


def _differ(one: Tensor, other: Tensor) -> float:
    """Relative norm of the difference; infinite where there is a nan."""
    error = (one.float() - other.float()).norm() / one.float().norm().clamp(min=1e-12)
    return float(error.nan_to_num(nan=float("inf")))
