"""Logits and gradients of both families equal transformers' with the same weights, in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from shoal.models.loss import linear_cross_entropy_sum

from .hf_weights import hf_config, random_pair, to_hf
from .shapes import SHAPES


def seq_len(name: str) -> int:
    return 300 if name == "llama3" else 40  # far beyond rope_original_seq_len, where the scaling matters


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients(name: str) -> None:
    ours, theirs = random_pair(SHAPES[name])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (2, seq_len(name) + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    hidden = ours(inputs)
    expected = theirs(inputs).logits
    torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-5, rtol=0)

    linear_cross_entropy_sum(hidden, ours.head_weight(), labels, 1 / labels.numel()).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    gradients = to_hf(ours.shape, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    their_parameters = dict(theirs.named_parameters())
    assert gradients.keys() == their_parameters.keys()
    for parameter_name, gradient in gradients.items():
        theirs_grad = their_parameters[parameter_name].grad
        assert theirs_grad is not None
        error = (gradient - theirs_grad).norm() / theirs_grad.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{parameter_name}: {error:.1e}"


def test_rope_scaling_matters_at_this_length() -> None:
    """The Llama 3 case above would fail without the scaling."""
    ours, theirs = random_pair(SHAPES["llama3"])
    plain = hf_config(ours.shape)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    unscaled = transformers.AutoModelForCausalLM.from_config(plain).eval()
    unscaled.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    assert (ours.logits(ours(tokens)) - unscaled(tokens).logits).abs().max() > 1e-2


def test_mistral() -> None:
    ours, llama = random_pair(SHAPES["smollm2"])
    config = transformers.MistralConfig(**(llama.config.to_dict() | {"model_type": "mistral", "sliding_window": None}))
    mistral = transformers.AutoModelForCausalLM.from_config(config).eval()
    mistral.load_state_dict(llama.state_dict())
    tokens = torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(ours.logits(ours(tokens)), mistral(tokens).logits, atol=1e-5, rtol=0)
