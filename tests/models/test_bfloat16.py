"""What bfloat16 means here: float32 weights and gradients, products in bfloat16, norms and sums in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.models.build import build_model, initialize
from shoal.models.family import LanguageModel
from shoal.models.layers import LayerNorm, RMSNorm
from shoal.models.loss import linear_cross_entropy_sum

from .shapes import SHAPES


def gradients(model: LanguageModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden = model(tokens[:, :-1])
    assert hidden.dtype == model.compute_dtype
    linear_cross_entropy_sum(hidden, model.head_weight(), tokens[:, 1:], 1e-3).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gpt2"])
def test_gradients_are_float32_and_near(name: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(SHAPES[name], compute_dtype=dtype)
        initialize(model, 0, "cpu")
        found[dtype] = gradients(model, torch.randint(0, 97, (4, 65), generator=torch.Generator().manual_seed(0)))
    exact, rounded = found.values()
    assert exact.keys() == rounded.keys()
    for parameter, gradient in exact.items():
        if ".k.bias" in parameter:
            continue  # its gradient is zero but for rounding where there is no RoPE: softmax ignores a shift
        assert rounded[parameter].dtype == torch.float32
        error = (rounded[parameter] - gradient).norm() / gradient.norm()
        assert error < 0.05, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_compute_in_float32(kind: type[RMSNorm] | type[LayerNorm]) -> None:
    """One rounding, at the end: equal to the float32 norm of the same numbers, rounded."""
    norm = kind(48, 1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(48).bfloat16())
    x = (100 * torch.randn(5, 3, 48)).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), atol=0, rtol=2**-8)


@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (2, 5, 3, 32)])
def test_rms_norm_equals_torch(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(32, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(shape)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    theirs = torch.autograd.grad(F.rms_norm(x, (32,), norm.weight, 1e-5), (x, norm.weight), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
