"""
Choice of the attention kernel, attention masks, and the KV cache.

Attention is softmax(q k^T / sqrt(d)) v per head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1), computed by
`torch.nn.functional.scaled_dot_product_attention`. It selects a fused kernel: cuDNN, flash or memory-efficient on CUDA,
flash on CPUs. The CPU's flash also supports boolean masks (3% slower) and grouped heads. Dropout is the only case in which
a CPU uses plain math, which holds all scores [B, H, T, T] in memory.

On CUDA this module overrides torch in three cases (torch 2.11, `aten/src/ATen/native/transformers/cuda`):

| case | torch's choice | here |
| --- | --- | --- |
| grouped heads with a mask, or not in bfloat16 | flash supports neither masks nor float32, memory-efficient no grouped heads: plain math, unless cuDNN is preferred (sm90, sm100) | repeat keys and values for each query head, which memory-efficient supports: memory is linear in the sequence length |
| bitwise | with `warn_only`, the backward of flash and memory-efficient adds in any order, and cuDNN is allowed | strict determinism: both add in one order, cuDNN is skipped |
| decoding | cuDNN, if preferred, builds a plan for each length, and each token makes a new length | disable cuDNN |

On a CPU without matrix tiles (AMX), bfloat16 attention is computed in float32: this takes half the time, including the
casts, and probabilities are not rounded. (Forward and backward of [12, 6, 256, 64] on AVX-512 with bf16: 79 ms in
bfloat16, 39 ms in float32.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

from shoal.system.cpu import has_tiles

CPU_HAS_TILES: bool = has_tiles()

KERNELS = {
    SDPBackend.MATH.value: "plain math (memory grows with the square of data.seq_len)",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
}


class Attend(Protocol):
    """The function a block's attention calls; context parallel replaces it by one that spans several ranks."""

    def __call__(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor: ...


def attend(
    q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """
    Return the attention of H query heads to K key heads (H a multiple of K), [B, T, H * d].

    Without a mask: causal if T = S; a single query (T = 1) sees every key. In a mask, True means visible.
    """
    if q_BTHd.shape[1] == 1:
        return _attend_one(q_BTHd, k_BSKd, v_BSKd, mask_B1TS, dropout)
    dtype = q_BTHd.dtype
    q_BTHd, k_BSHd, v_BSHd = _for_a_fused_kernel(q_BTHd, k_BSKd, v_BSKd, mask_B1TS)
    out_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSHd.transpose(1, 2),
        v_BSHd.transpose(1, 2),
        attn_mask=mask_B1TS,
        dropout_p=dropout,
        is_causal=mask_B1TS is None and q_BTHd.shape[1] > 1,
        enable_gqa=q_BTHd.shape[2] != k_BSHd.shape[2],
    )
    return out_BHTd.transpose(1, 2).flatten(2).to(dtype)


def _for_a_fused_kernel(
    q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B1TS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values in a dtype and with a number of heads that a fused kernel supports."""
    if q_BTHd.device.type == "cpu" and not CPU_HAS_TILES:
        return q_BTHd.float(), k_BSKd.float(), v_BSKd.float()
    times = q_BTHd.shape[2] // k_BSKd.shape[2]
    if times > 1 and q_BTHd.is_cuda:
        masked = mask_B1TS is not None and not isinstance(mask_B1TS, CausalBias)
        if not groups_fused(q_BTHd.dtype, masked=masked):
            return q_BTHd, repeat_heads(k_BSKd, times), repeat_heads(v_BSKd, times)
    return q_BTHd, k_BSKd, v_BSKd


def groups_fused(dtype: torch.dtype, *, masked: bool) -> bool:
    """
    Return whether flash supports grouped heads in this case: it does in bfloat16 without a mask.

    Flash is the only fused kernel on CUDA that always supports grouped heads. Devices before sm80 have neither flash nor
    bfloat16. Float16 is meant for these devices, so heads are repeated in float16 too. cuDNN supports
    grouped heads, but is not used in bitwise mode or for decoding.
    """
    return dtype == torch.bfloat16 and not masked


def repeat_heads(x_BSKd: Tensor, times: int) -> Tensor:
    """Repeat each key head `times` times in a row, matching the groups of query heads: [B, S, K * times, d]."""
    return x_BSKd.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def take_deterministic_kernels() -> None:
    """
    Make all CUDA operators deterministic for the rest of this process; operators without a deterministic kernel raise RuntimeError.

    With `warn_only`, attention's backward would keep its faster, unordered sums (`_flash_attention_backward` and
    `_efficient_attention_backward` in `attention_backward.cu`), and cuDNN would not be skipped
    (`check_cudnn_deterministic` in `sdp_utils.cpp`).
    """
    torch.use_deterministic_algorithms(True)


def not_deterministic(error: RuntimeError) -> str:
    """
    Return the operator that raised `error` because of `take_deterministic_kernels`; "" for any other error.

    cuBLAS raises another message. It is deterministic only if its workspace has a fixed size, which it reads once, from
    CUBLAS_WORKSPACE_CONFIG in the environment. shoal's launcher sets this variable; another launcher may not.
    """
    name, found, _ = str(error).partition(" does not have a deterministic implementation")
    if found:
        return name
    if str(error).startswith("Deterministic behavior was enabled") and "CUBLAS_WORKSPACE_CONFIG" in str(error):
        return "cuBLAS without CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
    return ""


@contextlib.contextmanager
def decoding_kernels() -> Iterator[None]:
    """
    Select kernels for growing sequences: on CUDA, disable cuDNN, which plans for each length. On CPUs nothing changes.

    Strict determinism is suspended meanwhile: sampling needs a cumulative sum, for which CUDA has no deterministic
    operator.
    """
    cudnn: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    if strict:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if strict:
            torch.use_deterministic_algorithms(True, warn_only=warns)


def describe_kernel(
    *, heads: int, kv_heads: int, head_dim: int, seq_len: int, masked: bool, dropout: float, dtype: torch.dtype,
    device: torch.device,
) -> str | None:  # fmt: skip
    """Return a line on the kernel that torch selects for training at this shape; None if this torch cannot tell."""
    ask = getattr(torch, "_fused_sdp_choice", None)
    if ask is None:
        return None

    def one(count: int) -> Tensor:  # all positions share one vector of memory
        return torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device, requires_grad=True).expand(
            1, seq_len, count, -1
        )

    mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, seq_len, seq_len) if masked else None
    groups = heads // kv_heads
    q, k, v = _for_a_fused_kernel(one(groups), one(1), one(1), mask)
    choice = ask(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout, mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    name = KERNELS.get(choice, f"number {choice}")
    repeated = f", keys and values repeated {groups} times" if k.shape[2] > 1 else ""
    return f"attention: the {name} kernel{repeated}"


def _attend_one(q_B1Hd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask_B11S: Tensor | None, dropout: float) -> Tensor:
    """
    Attend from a single query per row, as in decoding: the H / K heads that share a key head become its T = H / K queries.

    Each key and value is then read once instead of H / K times (half the time with three heads per key head), and never
    cast, which would be most of the work here.
    """
    group_BKGd = q_B1Hd.view(len(q_B1Hd), k_BSKd.shape[2], -1, q_B1Hd.shape[-1])
    out_BKGd = F.scaled_dot_product_attention(
        group_BKGd, k_BSKd.transpose(1, 2), v_BSKd.transpose(1, 2), attn_mask=mask_B11S, dropout_p=dropout
    )
    return out_BKGd.flatten(1).unsqueeze(1)


def document_mask(documents_BT: Tensor, keys_BS: Tensor | None = None, first: int = 0) -> Tensor:
    """
    Return the causal mask within documents, [B, 1, T, S]; True means visible.

    `keys_BS`: document ids of all keys, if the queries are only the positions from `first` on. Every query sees its own
    position, so no row of the softmax is empty, which would give NaN.
    """
    keys_BS = documents_BT if keys_BS is None else keys_BS
    last = torch.arange(first, first + documents_BT.shape[1], device=documents_BT.device)
    causal_TS = torch.arange(keys_BS.shape[1], device=keys_BS.device) <= last.unsqueeze(1)
    same_BTS = documents_BT.unsqueeze(2) == keys_BS.unsqueeze(1)
    return (same_BTS & causal_TS).unsqueeze(1)


@dataclass
class LayerCache:
    """One block's keys and values [B, capacity, K, d]; the positions before `start` are filled."""

    keys: Tensor
    values: Tensor
    start: int = 0

    def append(self, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Append the newest positions; return all that are filled."""
        end = self.start + k_BTKd.shape[1]
        self.keys[:, self.start : end] = k_BTKd
        self.values[:, self.start : end] = v_BTKd
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """KV cache: keys and values of all blocks for up to `capacity` positions, allocated once; for decoding only."""

    def __init__(
        self, *, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (batch, capacity, num_kv_heads, head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]
        self.capacity = capacity
        self.length = 0
        self._documents_BS = torch.zeros((batch, capacity), dtype=torch.long, device=device)
        self.masked = False  # whether rows hold several documents: every call must then pass their ids

    def extend(self, num_tokens: int, documents_BT: Tensor | None) -> Tensor | None:
        """
        Reserve `num_tokens` more positions, and return their mask [B, 1, T, S].

        `documents_BT`: ids that separate documents, or padding from text; once passed, required in every call. None means
        one document, and no mask if `attend` needs none.
        """
        start, end = self.length, self.length + num_tokens
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        if documents_BT is None and self.masked:
            raise ValueError("this cache holds several documents: pass documents_BT")
        for layer in self.layers:
            layer.start = start
        self.length = end
        if documents_BT is None and (start == 0 or num_tokens == 1):
            return None
        if documents_BT is not None:
            self.masked = True
            self._documents_BS[:, start:end] = documents_BT
        return document_mask(self._documents_BS[:, start:end], self._documents_BS[:, :end], start)
