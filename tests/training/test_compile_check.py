"""Compiled code that differs from eager code is found and named; the comparison changes nothing in the run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from shoal.errors import CompileError
from shoal.mesh.mesh import Mesh
from shoal.models.llama import FeedForward
from shoal.training.compile_check import judge
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.cli.commands import Place
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for, whole
from tests.world import World

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"parallel__dp_shard": 2}),
    "tp": (2, {"parallel__tp": 2}),
    "cp": (2, {"parallel__cp": 2}),
    "pp": (2, {"parallel__pp": 2}),
    "bitwise": (2, {"train__repro": "bitwise"}),
}


def faithful(forward: Callable[..., Any], **_: object) -> Callable[..., Any]:
    """Stand in for the compiler: return a function that calls `forward`, so that only the comparison could change a run."""
    return lambda *args, **kwargs: forward(*args, **kwargs)


class Careless:
    """A fake compiler that loses the gradient of a matrix in the third feed-forward: it is zero, or missing."""

    def __init__(self, *, zeros: bool) -> None:
        self._zeros, self._seen = zeros, itertools.count()

    def __call__(self, forward: Callable[..., Any], **_: object) -> Callable[..., Any]:
        owner = forward.__self__  # type: ignore[attr-defined]
        ffn = owner if isinstance(owner, FeedForward) else getattr(owner, "ffn", None)
        if ffn is None or next(self._seen) != 2:
            return faithful(forward)

        def lost(x: torch.Tensor) -> torch.Tensor:
            weight = ffn.gate.weight
            return F.linear(x, (weight * 0 + weight.detach() if self._zeros else weight.detach()).to(x.dtype))

        def compiled(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(ffn.gate, "forward", lost):
                return forward(*args, **kwargs)

        return compiled


def found(mesh: Mesh, config: Any, *, zeros: bool) -> str:
    """Return the error of a run with a faulty compiler."""
    with mock.patch.object(torch, "compile", Careless(zeros=zeros)):
        run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
        try:
            complete(run)
        except CompileError as error:
            return str(error)
        finally:
            run.close()
    return "nothing"


def found_zeros(mesh: Mesh, config: Any) -> str:
    return found(mesh, config, zeros=True)


def found_nothing(mesh: Mesh, config: Any) -> str:
    return found(mesh, config, zeros=False)


def everywhere(world: Callable[[int], World], size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return [function(ALONE, *args)] if size == 1 else world(size).run(function, *args)


@pytest.mark.parametrize(
    ("layout", "function", "dtype"),
    [
        ("alone", found_zeros, "float32"),
        ("ddp", found_nothing, "float32"),
        ("fsdp", found_zeros, "bfloat16"),
        ("fsdp", found_nothing, "float32"),
        *(pytest.param(name, found_zeros, "bfloat16", marks=pytest.mark.ci) for name in ("tp", "cp", "bitwise")),
    ],
)
def test_a_lost_gradient_is_named(
    world: Callable[[int], World], tmp_path: Path, layout: str, function: Callable[[Mesh, Any], str], dtype: str
) -> None:
    size, options = LAYOUTS[layout]
    config = config_of(tmp_path, "lost", train__compile=True, train__dtype=dtype, train__device="cpu", **options)
    for text in everywhere(world, size, function, config):
        assert "train.compile:" in text
        assert "blocks.2.ffn.gate.weight" in text
        assert "1.0e+00" in text  # the relative error: the whole gradient is missing


def trained(mesh: Mesh, config: Any) -> dict[str, Any]:
    with mock.patch.object(torch, "compile", faithful):
        run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
        try:
            complete(run)
        finally:
            run.close()
    return {s.name: (s.region, s.tensor.detach().clone()) for s in run.runnable.shards}


@pytest.mark.parametrize(
    ("layout", "family", "dtype"),
    [
        ("alone", "gpt2", "bfloat16"),
        ("fsdp", "llama", "bfloat16"),
        *(pytest.param(name, "llama", "bfloat16", marks=pytest.mark.ci) for name in LAYOUTS if name not in ("alone", "fsdp")),
    ],
)  # fmt: skip
def test_a_run_has_the_same_bits_with_and_without_the_comparison(
    world: Callable[[int], World], tmp_path: Path, layout: str, family: str, dtype: str
) -> None:
    """One case is GPT-2 with dropout, whose masks a comparison could shift."""
    size, options = LAYOUTS[layout]
    weights = []
    for check in (True, False):
        config = config_of(
            tmp_path, f"check-{check}", family, train__compile=True, train__compile_check=check, train__dtype=dtype,
            train__device="cpu", train__steps=2, checkpoint__background=False, **options,
        )  # fmt: skip
        if family == "gpt2":
            config = config.replace("model", dropout=0.1)
        weights.append(whole(everywhere(world, size, trained, config)))
    assert [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])] == []


PLANT = """
import torch
from unittest import mock
def compile(forward, **_):
    ffn = forward.__self__.ffn
    def compiled(*args, **kwargs):
        weight = ffn.up.weight
        lost = lambda x: torch.nn.functional.linear(x, (weight * 0 + weight.detach()).to(x.dtype))
        with mock.patch.object(ffn.up, "forward", lost):
            return forward(*args, **kwargs)
    return compiled
torch.compile = compile
"""


@pytest.mark.ci
def test_the_command_ends_with_2_and_says_it_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(PLANT, encoding="utf-8")
    output = place.refused("train", "recipe.yaml", "--name", "lost", "--train.compile", PYTHONPATH=str(tmp_path))
    assert output.count("blocks.0.ffn.up.weight") == 1
    assert place.events("lost") == ["started"]  # no step, and no retry


def compiled_ffn(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """Compute the feed-forward; compiled code loses the gradient of the gate."""
    weight = self.gate.weight.detach() if torch.compiler.is_compiling() else self.gate.weight
    return self.down(F.silu(F.linear(x, weight)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.ci
def test_with_the_compiler_itself(tmp_path: Path) -> None:
    """Use a backend of the compiler that generates no code, because generating code would be slow."""
    config = config_of(tmp_path, "real", train__compile=True, train__device="cpu", train__steps=1)
    config = config.replace("model", num_layers=1)
    torch.compiler.reset()
    graphs = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(FeedForward, "forward", compiled_ffn), mock.patch.object(torch, "compile", graphs):
        run = Run.open(config, ALONE, NeverStop())
        try:
            with pytest.raises(CompileError, match=r"blocks\.0\.ffn\.gate\.weight"):
                complete(run)
        finally:
            run.close()
    torch.compiler.reset()


def rows(*values: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOSS = (1e-7, 1e-7, 6.0, 6.0)


@pytest.mark.parametrize(
    ("a", "b", "name", "wrong"),
    [
        ((9e-6, 1e-6, 1.0, 1.0), (1e-6, 1e-6, 1.0, 1.0), "a", 0),
        ((1.2e-5, 1e-6, 1.0, 1.0), (1e-6, 1e-6, 1.0, 1.0), "a", 1),
        ((1e-6, 1e-6, 1.0, 1.0), (math.nan, 1e-6, 1.0, math.nan), "b", 1),
        # rounding would allow a difference of the gradient's size, but the compiled gradient is zero
        ((0.1, 0.3, 1.0, 1.0), (1.0, 0.3, 1.0, 0.0), "b", 1),
        # a gradient that is only rounding noise has no size to compare with
        ((1e-6, 1e-6, 1.0, 1.0), (2e-9, 1e-9, 1e-9, 1e-9), "a", 0),
    ],
)
def test_what_is_too_far(a: tuple[float, ...], b: tuple[float, ...], name: str, wrong: int) -> None:
    found = judge(["the loss", "a", "b"], rows(LOSS, a, b))  # type: ignore[arg-type]
    assert (found.name, found.wrong) == (name, wrong)


def test_the_loss_counts_and_what_is_no_number_is_not_compared() -> None:
    fine = (1e-6, 1e-6, 1.0, 1.0)
    assert judge(["the loss", "a", "b"], rows((0.01, 1e-7, 6.0, 6.0), fine, fine)).name == "the loss"
    assert not judge(["the loss", "a", "b"], rows(LOSS, (0.0, 0.0, math.inf, 1.0), fine)).comparable
