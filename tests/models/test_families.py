"""Properties of both families beyond their arithmetic: documents, positions, bfloat16, compilation, tables of names."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor

from shoal.models.build import build_model, initialize
from shoal.models.family import LanguageModel
from shoal.models.loss import linear_cross_entropy_sum

from .hf_weights import random_pair
from .shapes import GPT2, LLAMA, SHAPES

LENGTHS = (9, 1, 14, 6)  # of the documents in a row


def tokens_of(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_equal_each_document_alone(name: str) -> None:
    model, _ = random_pair(SHAPES[name])
    documents = [tokens_of(length, seed=length) for length in LENGTHS]
    ids = torch.cat([torch.full((1, n), 7 * i) for i, n in enumerate(LENGTHS)], dim=1)
    positions = torch.cat([torch.arange(n).unsqueeze(0) for n in LENGTHS], dim=1)
    packed = model.logits(model(torch.cat(documents, dim=1), positions, ids))
    alone = torch.cat([model.logits(model(document)) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_positions_left_out_are_counted(name: str) -> None:
    model, _ = random_pair(SHAPES[name])
    tokens = tokens_of(12, batch=2)
    counted = torch.arange(12).expand(2, 12)
    torch.testing.assert_close(model(tokens), model(tokens, counted), atol=1e-6, rtol=0)
    assert (model(tokens) - model(tokens, counted * 2)).abs().max() > 1e-3  # positions have an effect


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_has_float32_gradients_near_those_of_float32(name: str) -> None:
    tokens = tokens_of(33, batch=2)
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(SHAPES[name], compute_dtype=dtype)
        initialize(model, 0, "cpu")
        hidden = model(tokens[:, :-1])
        assert hidden.dtype == dtype
        linear_cross_entropy_sum(hidden, model.head_weight(), tokens[:, 1:], 1 / 64).backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        gradients[dtype] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    wanted = gradients[torch.float32]
    assert (gradients[torch.bfloat16] - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", SHAPES)
def test_tables_of_names_hold_for_every_module(name: str) -> None:
    model = build_model(SHAPES[name], compute_dtype=torch.float32)
    for parameter_name, _ in model.named_parameters():
        module = parameter_name.rpartition(".")[0]
        fits = [pattern for pattern in model.TENSOR_PARALLEL if fnmatchcase(module, pattern)]
        assert fits, f"{module} has no place in the tensor-parallel table"
        assert len({model.TENSOR_PARALLEL[pattern] for pattern in fits}) == 1


def test_dropout_is_on_in_training_only() -> None:
    model = build_model(dataclasses.replace(GPT2, dropout=0.2), compute_dtype=torch.float32)
    initialize(model, 0, "cpu")
    tokens = tokens_of(12)
    torch.manual_seed(0)
    first = model(tokens)
    assert not torch.equal(first, model(tokens))
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def _gradient(model: LanguageModel, tokens: Tensor) -> Tensor:
    model.zero_grad()
    model(tokens).float().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _check_compiled(name: str, dtype: torch.dtype, backend: str) -> None:
    torch.compiler.reset()
    model = build_model(SHAPES[name], compute_dtype=dtype)
    initialize(model, 0, "cpu")
    eager = _gradient(model, tokens_of(16, batch=2))
    for block in model.blocks.values():
        block.compile(fullgraph=True, backend=backend)
    compiled = _gradient(model, tokens_of(16, batch=2))
    # Compiled code rounds a chain of operators to bfloat16 once, eager code at each operator.
    assert (eager - compiled).norm() < (1e-5 if dtype == torch.float32 else 5e-2) * eager.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_block_is_one_graph(name: str, dtype: torch.dtype) -> None:
    _check_compiled(name, dtype, "aot_eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_function_returns_a_tensor_that_two_operations_gave(dtype: torch.dtype) -> None:
    """
    Check the autograd functions of a block as the compiler traces them, which shows the fault with any torch.

    With torch 2.11, compiled gradients are zero if forward returns a tensor that two operations returned: see `multiplied`.
    """
    results: dict[str, list[str]] = {}  # by autograd function: the operations that returned its forward's result

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        for name, part in graph.named_modules():
            if name.startswith("fwd_body"):
                assert isinstance(part, torch.fx.GraphModule)
                [(outputs, _)] = list(part.graph.nodes)[-1].args
                returned = outputs[0].meta["example_value"]
                results[name] = [str(n.target) for n in part.graph.nodes if n.meta.get("example_value") is returned]
        return graph

    torch.compiler.reset()
    model = build_model(SHAPES["qwen3"], compute_dtype=dtype)
    initialize(model, 0, "cpu")
    torch.compile(model.blocks["0"].forward, fullgraph=True, backend=backend)(
        model.enter(tokens_of(16), torch.arange(16)), *model.context(torch.arange(16)), None, None
    )
    assert len(results) == 7  # four norms, two rotations, the product inside the feed-forward
    assert {name: operations for name, operations in results.items() if len(operations) != 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_block_compiles(name: str) -> None:
    _check_compiled(name, torch.float32, "inductor")


def test_logits_are_in_the_dtype_of_hidden() -> None:
    model = build_model(LLAMA, compute_dtype=torch.bfloat16)
    initialize(model, 0, "cpu")
    assert model.logits(model(tokens_of(4))).dtype == torch.bfloat16
