"""Norms compute in float32 and round once; they equal PyTorch's. Both libraries' products are right."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from shoal.models import layers
from shoal.models.layers import LayerNorm, Linear, RMSNorm, _RMSNorm
from shoal.models.llama import _SwiGLU


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("function", [_SwiGLU, _RMSNorm], ids=lambda function: function.__name__)
def test_what_a_function_returns_is_written_in_place_by_eager_alone(
    function: type[torch.autograd.Function], compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code compiled by torch 2.11 loses gradients if forward writes its result in place. `_version` counts in-place writes."""
    x, other = torch.ones(2, 8), torch.ones(8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiles)
    out = function.forward(Mock(), *((x, x) if function is _SwiGLU else (x, other, 1e-5)))
    assert (out._version == 0) == compiles


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_compute_in_float32(kind: type[RMSNorm] | type[LayerNorm]) -> None:
    """In bfloat16 a norm is the float32 norm of the same numbers, rounded at the end."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(48, 1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(48, generator=generator).bfloat16())
    x = (100 * torch.randn((5, 3, 48), generator=generator)).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), atol=0, rtol=2**-8)


@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (2, 5, 3, 32)], ids=str)
def test_rms_norm_equals_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(32, 1e-5)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(shape, generator=generator).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    ours = norm(x)
    theirs = F.rms_norm(x, (32,), norm.weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    our_gradients = torch.autograd.grad(ours, (x, norm.weight), upstream)
    their_gradients = torch.autograd.grad(theirs, (x, norm.weight), upstream)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_float64s(onednn: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of a sum of n float32 products stays below n epsilon of the sum of their sizes."""
    monkeypatch.setattr(layers, "ONEDNN", onednn)
    generator = torch.Generator().manual_seed(1)
    layer = Linear(256, 384, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn((2, 100, 256), generator=generator, requires_grad=True)
    assert x.numel() * 384 >= layers.ONEDNN_FROM
    grad = torch.randn((2, 384, 100), generator=generator).transpose(1, 2)  # not contiguous
    out = layer(x)
    assert (type(out.grad_fn).__name__ == "_OneDnnLinearBackward") == onednn
    found = [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]

    wide = Linear(256, 384, bias=bias).double()
    wide.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    out64 = wide(x64)
    expected = [out64, *torch.autograd.grad(out64, [x64, *wide.parameters()], grad.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=384 * 2**-24 * 20, rtol=0)


def test_onednn_multiplies_only_what_it_speeds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = torch.ones(1)
    monkeypatch.setattr(layers, "ONEDNN", True)
    monkeypatch.setattr(layers._OneDnnLinear, "apply", lambda *_: taken)
    large, small = torch.ones(2**8, 2**8), torch.ones(2**7, 2**8)
    assert layers.linear(large, large) is taken
    assert layers.linear(small, large) is not taken
    assert layers.linear(large.bfloat16(), large.bfloat16()) is not taken
    with torch.no_grad():
        assert layers.linear(large, large) is not taken
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layers.linear(large, large) is not taken
