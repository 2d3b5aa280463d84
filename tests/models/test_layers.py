"""Norms compute in float32 and round once; they equal PyTorch's. Both libraries' products are right."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.config.options import Model
from shoal.models import layers
from shoal.models.layers import LayerNorm, Linear, RMSNorm, _RMSNorm
from shoal.models.llama import Block, _SwiGLU
from shoal.models.rope import rope_tables
from shoal.parallel.recompute import checkpointed


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


HAS_ONEDNN = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


class Products(TorchDispatchMode):
    """Counts oneDNN's products."""

    by_onednn: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_onednn += int("_linear_pointwise" in str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every float32 product be oneDNN's, on any CPU."""
    monkeypatch.setattr(layers, "ONEDNN", True)
    monkeypatch.setattr(layers, "ONEDNN_FROM", 0)


@HAS_ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("onednn")
def test_onednns_product_and_gradients_equal_those_in_float64(bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Linear(256, 384, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn((2, 100, 256), generator=generator, requires_grad=True)
    grad = torch.randn((2, 384, 100), generator=generator).transpose(1, 2)  # not contiguous
    with Products() as products:
        out = layer(x)
        found = [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]
    assert products.by_onednn == 2

    wide = Linear(256, 384, bias=bias).double()
    wide.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    out64 = wide(x64)
    expected = [out64, *torch.autograd.grad(out64, [x64, *wide.parameters()], grad.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # A sum of up to 384 products of size 1 is itself about 20, and each addition rounds it by 2^-24 of that.
        torch.testing.assert_close(a.double(), b, atol=384 * 20 * 2**-24, rtol=0)


@HAS_ONEDNN
@pytest.mark.parametrize(("mode", "products"), [("none", 14), ("selective", 14), ("full", 21)])
@pytest.mark.usefixtures("onednn")
def test_selective_recomputation_keeps_onednns_products(
    mode: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block has seven products, each with a backward; their gradients are those of MKL's."""
    shape = Model(dim=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=128, max_seq_len=32)
    torch.manual_seed(2)
    block = Block(shape)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    x = torch.randn(2, 32, 64, requires_grad=True)
    rest = rope_tables(shape, torch.arange(32), torch.float32), None, None
    run = block.forward if mode == "none" else checkpointed(block.forward, mode)
    with Products() as counted:
        found = torch.autograd.grad(run(x, *rest).sum(), [x, *block.parameters()])
    assert counted.by_onednn == products
    monkeypatch.setattr(layers, "ONEDNN", False)
    for a, b in zip(found, torch.autograd.grad(block(x, *rest).sum(), [x, *block.parameters()]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@HAS_ONEDNN
def test_onednn_multiplies_only_what_it_speeds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "ONEDNN", True)

    def count(x: torch.Tensor, *, splits_backward: bool = False) -> int:
        layer = Linear(2**8, 2**8).to(x.dtype)
        layer.splits_backward = splits_backward
        with Products() as products:
            layer(x)
        return int(products.by_onednn)

    large, small = torch.ones(2**8, 2**8), torch.ones(2**7, 2**8)
    assert count(large) == 1
    assert count(small) == 0
    assert count(large.bfloat16()) == 0
    assert count(large, splits_backward=True) == 0
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert count(large) == 0
