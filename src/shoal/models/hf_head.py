"""
Logits and loss from hidden states, as the model's class in transformers computes them.

The class's forward runs with its decoder replaced by one that returns the given hidden states. So everything that the
class does after the decoder (a bias, a scale, a soft cap) is applied. If the class only multiplies by its output layer,
the loss is `linear_cross_entropy_sum`, which saves memory. This is tested once, with a small output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.models.loss import CHUNK_BYTES, IGNORED, linear_cross_entropy_sum


class Head:
    """The part of a causal language model after its decoder."""

    def __init__(self, causal_lm: Any, decoder: nn.Module) -> None:
        self._causal_lm, self._decoder = causal_lm, decoder
        self.layer: Any = causal_lm.get_output_embeddings()  # usually a Linear
        self.plain = _is_plain(self.layer) and self._only_multiplies()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] from [..., D], in the dtype that the class returns."""
        out: Tensor = self._run(hidden.reshape(1, -1, hidden.shape[-1]))
        return out.view(*hidden.shape[:-1], -1)

    def loss(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        scale: Tensor | float,
        each_BT: Tensor | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Tensor:
        """
        Return scale * the cross-entropy summed over labels that are not -100; float32, 0-d.

        each_BT: a float32 buffer that gets each token's term of the sum, without a gradient.
        """
        if self.plain:
            weight = self.layer.weight
            return linear_cross_entropy_sum(hidden_BTD, weight, labels_BT, scale, each_BT, chunk_bytes=chunk_bytes)
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
        rows = max(1, chunk_bytes // (4 * self.layer.weight.shape[0]))
        total = torch.zeros((), device=hidden_ND.device)
        for start in range(0, len(labels_N), rows):
            each_C = None if each_BT is None else each_BT.view(-1)[start : start + rows]
            piece = (hidden_ND[start : start + rows], labels_N[start : start + rows], scale, each_C)
            # backward recomputes each chunk's logits, so that only one chunk's exist at a time
            total = total + checkpoint(self._chunk_loss, *piece, use_reentrant=False)
        return total

    def _chunk_loss(self, hidden_CD: Tensor, labels_C: Tensor, scale: Tensor | float, each_C: Tensor | None) -> Tensor:
        log_p = torch.log_softmax(self.logits(hidden_CD), dim=-1, dtype=torch.float32)
        weight_C = ((labels_C != IGNORED) * scale).float()
        gained_C = log_p.gather(1, labels_C.clamp(min=0).unsqueeze(1)).squeeze(1) * weight_C
        if each_C is not None:
            each_C.copy_(-gained_C.detach())
        return -gained_C.sum()

    def _run(self, hidden_BTD: Tensor) -> Tensor:
        """Run the class's forward as if its decoder had returned `hidden_BTD`."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        forward = self._decoder.forward
        self._decoder.forward = lambda *_, **__: Output(last_hidden_state=hidden_BTD)
        try:
            out: Tensor = self._causal_lm.forward(inputs_embeds=hidden_BTD, use_cache=False).logits
        finally:
            self._decoder.forward = forward
        return out

    def _only_multiplies(self) -> bool:
        """Return whether logits are a product with the output layer; tested with a weight of 8 rows, on small and large inputs."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, self.layer.in_features, generator=generator)
        hidden = torch.randn(1, 4, self.layer.in_features, generator=generator)
        hidden[:, 2:] *= 100.0  # a soft cap shows only on large logits
        forward: Callable[[Tensor], Tensor] = self.layer.forward
        self.layer.forward = lambda x: F.linear(x, weight)
        try:
            with torch.no_grad():
                return torch.equal(self._run(hidden), F.linear(hidden, weight))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False  # the class has further layers, whose weights are still on meta
        finally:
            self.layer.forward = forward


def _is_plain(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) and layer.bias is None
