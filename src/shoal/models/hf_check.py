"""
Check that tokens of a transformers model see neither later tokens nor other documents.

No metadata tells which families read positions, build masks from them, or carry state from one document to the next. So
this is tested before the first step, with the run's weights, layout and row length: a position's output must not change
when tokens that it may not see are replaced. Costs a few forwards of one micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.family import LanguageModel

# Bounds on the relative norm of the difference. SAME: the same kernels see the same inputs, so most bits agree.
# SAME_ELSEWHERE: a document at another position of a row uses other kernels, which round differently.
SAME, SAME_ELSEWHERE = 1e-4, {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.no_grad()
def check_sight(model: LanguageModel, *, batch: int, seq_len: int, documents: bool, device: torch.device) -> None:
    """
    Raise `ModelError` if a token sees later tokens or, with `documents`, tokens of another document.

    All ranks that hold a part of the model must call it: forward may run collectives.
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
                f"{model.shape.from_} is not causal: a token's output depends on later tokens, so it cannot be trained to "
                "predict them"
            )
        if documents:
            _check_documents(model, first, second, third, alone)
    finally:
        model.train(training)


def _first_forward(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Run a forward. Raises `ModelError` if the family's code mixes float32 with the compute dtype."""
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
            f"{model.shape.from_} does not separate the documents of a row, but data.document_mask is true; set "
            "data.document_mask to false"
        )


def _differ(one: Tensor, other: Tensor) -> float:
    """Return the relative norm of the difference; infinity if there is a NaN."""
    error = (one.float() - other.float()).norm() / one.float().norm().clamp(min=1e-12)
    return float(error.nan_to_num(nan=float("inf")))
