"""The choices of attention kernels, including those for CUDA as far as a CPU can test them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.models.attention import (
    KERNELS,
    attend,
    decoding_kernels,
    describe_kernel,
    document_mask,
    groups_fused,
    not_deterministic,
    repeat_heads,
    take_deterministic_kernels,
)
from shoal.models.generate import generate
from shoal.training import assemble as assembling
from tests.parallel.layouts import config_of
from tests.rehearsal import Rehearsal

from .hf_weights import random_pair
from .shapes import LLAMA


@pytest.mark.parametrize(
    ("dtype", "masked", "fused"),
    [
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.float16, False, False),
    ],
)
def test_which_grouped_heads_a_gpu_takes_as_they_are(dtype: torch.dtype, masked: bool, fused: bool) -> None:
    assert groups_fused(dtype, masked=masked) is fused


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_are_grouped_heads(masked: bool) -> None:
    """Output and gradients equal those of torch's own grouping."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, heads, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    mask = document_mask(torch.arange(32).expand(2, -1) // 9) if masked else None
    grouped = attend(q, k, v, mask)
    repeated = attend(q, repeat_heads(k, 3), repeat_heads(v, 3), mask)
    torch.testing.assert_close(repeated, grouped)
    for ours, theirs in zip(
        torch.autograd.grad(repeated.square().sum(), (q, k, v)),
        torch.autograd.grad(grouped.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Compute attention by its definition in float64, one query head at a time."""
    q, k, v, each = q.double(), k.double(), v.double(), q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // each].transpose(1, 2) / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, :, head // each])
    return torch.cat(heads, -1)


@pytest.mark.parametrize(
    ("dtype", "masked", "key_heads"),
    [(torch.bfloat16, True, 6), (torch.float32, True, 6), (torch.float32, False, 6), (torch.bfloat16, False, 2)],
)
def test_on_cuda_grouped_heads_are_repeated_where_no_fused_kernel_takes_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, key_heads: int
) -> None:
    """Check the arguments that `attend` passes to torch on a simulated CUDA device, and the result."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, heads, 8, generator=generator).to(dtype) for heads in (6, 2, 2))
    mask = document_mask(torch.arange(32).expand(2, -1) // 9) if masked else None
    given: list[Any] = []
    torchs = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"], q.dtype))
        return torchs(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with Rehearsal():
        out = attend(q, k, v, mask)
    assert given == [(6, key_heads, key_heads, key_heads != 6, dtype)]
    seen = torch.ones(32, 32, dtype=torch.bool).tril() if mask is None else mask[:, 0]
    within = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), written_out(q, k, v, seen), rtol=within, atol=within)


@pytest.mark.parametrize(("dropout", "kernel"), [(0.0, SDPBackend.FLASH_ATTENTION), (0.1, SDPBackend.MATH)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_named(masked: bool, dropout: float, kernel: SDPBackend) -> None:
    said = describe_kernel(
        heads=6, kv_heads=2, head_dim=16, seq_len=64, masked=masked, dropout=dropout, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert said == f"attention: the {KERNELS[kernel.value]} kernel"
    q, k, v = (torch.randn(1, heads, 64, 16) for heads in (6, 2, 2))
    mask = torch.ones(64, 64, dtype=torch.bool) if masked else None
    with sdpa_kernel(kernel):  # torch raises if the kernel is unavailable
        F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, enable_gqa=True)


def test_without_torchs_answer_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert (
        describe_kernel(
            heads=1, kv_heads=1, head_dim=8, seq_len=8, masked=False, dropout=0.0, dtype=torch.float32,
            device=torch.device("cpu"),
        )
        is None
    )  # fmt: skip


def test_a_bitwise_run_is_strict_and_what_cannot_is_named() -> None:
    try:
        take_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        # with warn_only, the backward of flash and memory-efficient attention would add in any order
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
        assert not_deterministic(raised.value) == "put_"
        with decoding_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not_deterministic(RuntimeError("out of memory")) == ""


# torch's message if cuBLAS runs without its variable; a CPU build cannot produce it.
CUBLAS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS and "
    "you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment variable before "
    "running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8. For more "
    "information, go to https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"
)


def test_cublas_without_its_variable_is_named() -> None:
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in not_deterministic(RuntimeError(CUBLAS))


@pytest.mark.parametrize(
    ("device", "repro", "strict"), [("cuda", "bitwise", True), ("cuda", "fast", False), ("cpu", "bitwise", False)]
)
def test_a_run_asks_for_strict_determinism_on_cuda_where_it_is_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, repro: str, strict: bool
) -> None:
    """Determinism is set before the model is built, so before any of it runs."""
    seen = []

    class Enough(Exception):
        """Raised instead of building the model, whose device may be missing."""

    def look(*_: Any, **__: Any) -> None:
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        raise Enough

    monkeypatch.setattr(assembling, "build_model", look)
    config = config_of(tmp_path, "strict", train__repro=repro)
    try:
        with pytest.raises(Enough):
            assembling.assemble(config, Mesh(Place(), torch.device(device)), lambda text: None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(strict, False)]


def test_decoding_plans_for_no_length() -> None:
    """cuDNN attention is off while tokens are generated, and on again afterwards, also after an error."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    model, seen = random_pair(LLAMA)[0].eval(), []

    def look(place: int, token: int) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    generate(model, [[5, 17]], max_new_tokens=3, on_token=look)
    assert seen == [False] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError), decoding_kernels():
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled()
