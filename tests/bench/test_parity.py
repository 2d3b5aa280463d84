"""`shoal verify`: PASS for a correct layout; FAIL for a planted bug, naming the parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from shoal.bench.parity import Certificate, certify
from shoal.config.options import Config
from shoal.data.dataset import open_data
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Shard
from shoal.models.build import initial_weights
from shoal.parallel import apply, runnable
from shoal.parallel.randomness import Randomness
from shoal.parallel.reduce import GradientReducer
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.training.finish_config import finish_config
from tests.parallel.layouts import config_of, mesh_for
from tests.world import World

FORGOTTEN = "blocks.1.ffn_norm.weight"


def certified(mesh: Mesh, config: Config, bug: str) -> Certificate:
    """Return, in a worker, the certificate of this config with this bug planted in parallel layouts."""
    mesh = mesh_for(mesh, config.parallel)
    console = Console(speaks=False)
    dataset = open_data(config.data, console)
    folder = RunFolder.of(config).path
    config = finish_config(config, RunFolder(folder / "none"), dataset, mesh)
    with BUGS[bug]():
        return certify(config, mesh, dataset, folder, console)


@contextmanager
def no_bug() -> Iterator[None]:
    yield


@contextmanager
def a_forgotten_reduction_of_data_parallel() -> Iterator[None]:
    """Skip one parameter in the buckets: each replica keeps its local gradient of it."""
    plain, model_of = GradientReducer.__init__, apply.parallelize

    def parallelize(model: Any, mesh: Mesh, **rest: Any) -> Any:
        def forgetful(self: GradientReducer, parameters: Iterable[torch.nn.Parameter], *more: Any) -> None:
            left_out = model.get_parameter(FORGOTTEN)
            plain(self, [p for p in parameters if mesh.world_size == 1 or p is not left_out], *more)

        with patch.object(GradientReducer, "__init__", forgetful):
            return model_of(model, mesh, **rest)

    with patch("shoal.training.assemble.parallelize", parallelize):
        yield


@contextmanager
def a_forgotten_reduction_of_tensor_parallel() -> Iterator[None]:
    """Skip the all-reduce of a norm weight's gradient, which covers only one rank's part of the sequence."""
    plain = runnable.sum_replicated

    def forgetful(shards: list[Shard], mesh: Mesh) -> None:
        plain([s for s in shards if s.name != FORGOTTEN], mesh)

    with patch.object(runnable, "sum_replicated", forgetful):
        yield


@contextmanager
def a_loss_divided_by_the_local_token_count() -> Iterator[None]:
    """Return the mean of the ranks' means, a common mistake."""

    def local(self: runnable.Runnable, batches: Any) -> torch.Tensor:
        own = sum(b.valid_tokens for b in batches)
        return torch.tensor(float(own * self.mesh.layout.dp))

    with patch.object(runnable.Runnable, "_count", local):
        yield


@contextmanager
def a_wrong_ranks_dropout() -> Iterator[None]:
    """Draw the same dropout on every rank."""
    plain = Randomness.begin

    def same_everywhere(self: Randomness, step: int, first_slot: int) -> None:
        plain(self, step, 0)

    with patch.object(Randomness, "begin", same_everywhere):
        yield


@contextmanager
def a_wrong_ranks_initial_weights() -> Iterator[None]:
    """Draw different initial weights on every rank but 0, without a broadcast."""
    plain = apply.hold

    def own(part: Any, regions: Any, mesh: Mesh, weights: Any, **rest: Any) -> list[Shard]:
        return plain(part, regions, mesh, initial_weights(part, mesh.place.rank), **rest)

    with patch.object(apply, "hold", own):
        yield


BUGS: dict[str, Callable[[], Any]] = {
    bug.__name__: bug
    for bug in (
        no_bug,
        a_forgotten_reduction_of_data_parallel,
        a_forgotten_reduction_of_tensor_parallel,
        a_loss_divided_by_the_local_token_count,
        a_wrong_ranks_dropout,
        a_wrong_ranks_initial_weights,
    )
}


def _certify(world: Callable[[int], World], config: Config, processes: int, bug: str) -> Certificate:
    first: Certificate
    first, *others = world(processes).run(certified, config, bug)
    assert all(other.passed == first.passed for other in others)
    return first


def _worst(certificate: Certificate, what: str) -> tuple[str, bool]:
    [found] = [f for f in certificate.findings["float32"] if f.what == what]
    return found.name, found.holds


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, {"dp_shard": 2}),
        (3, {}),
        (4, {"tp": 2, "pp": 2}),
        pytest.param(4, {"dp_shard": 2, "cp": 2}, marks=pytest.mark.ci),
    ],
    ids=["fsdp", "ddp 3", "tp pp", "fsdp cp"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.ci)])
def test_a_right_layout_passes(
    world: Callable[[int], World], tmp_path: Path, processes: int, options: dict[str, Any], dtype: str
) -> None:
    options = {f"parallel__{key}": value for key, value in options.items()}
    certificate = _certify(world, config_of(tmp_path, "right", train__dtype=dtype, **options), processes, "no_bug")
    assert certificate.passed, certificate
    assert certificate.findings.keys() == {"float32", dtype}
    assert not list((tmp_path / "runs" / "right").glob("checkpoints"))  # its temporary checkpoint is removed


def test_bitwise_is_held_to_the_bit(world: Callable[[int], World], tmp_path: Path) -> None:
    config = config_of(tmp_path, "bitwise", train__repro="bitwise", parallel__dp_shard=3, train__dtype="bfloat16")
    certificate = _certify(world, config, 3, "no_bug")
    assert certificate.passed
    assert all(f.allowed == f.difference == 0.0 for found in certificate.findings.values() for f in found)


@pytest.mark.parametrize(
    ("bug", "processes", "options"),
    [
        ("a_forgotten_reduction_of_data_parallel", 2, {}),
        ("a_forgotten_reduction_of_tensor_parallel", 2, {"parallel__tp": 2}),
    ],
)
def test_a_forgotten_reduction_fails_by_the_parameters_name(
    world: Callable[[int], World], tmp_path: Path, bug: str, processes: int, options: dict[str, Any]
) -> None:
    certificate = _certify(world, config_of(tmp_path, "bug", **options), processes, bug)
    assert not certificate.passed
    assert _worst(certificate, "gradient") == (FORGOTTEN, False)
    assert _worst(certificate, "update") == (FORGOTTEN, False)


@pytest.mark.parametrize(
    ("bug", "options"),
    [
        ("a_loss_divided_by_the_local_token_count", {}),
        ("a_loss_divided_by_the_local_token_count", {"optim__clip_norm": 1.0}),
        ("a_wrong_ranks_dropout", {"family": "gpt2", "model__dropout": 0.1}),
        ("a_wrong_ranks_initial_weights", {}),
    ],
)
def test_a_bug_of_all_parameters_fails_and_names_the_worst(
    world: Callable[[int], World], tmp_path: Path, bug: str, options: dict[str, Any]
) -> None:
    """Three processes share eight micro-batches unequally, so a mean of means is not the mean."""
    config = config_of(tmp_path, "bug", **options)
    certificate = _certify(world, config, 3, bug)
    assert not certificate.passed
    name, holds = _worst(certificate, "gradient")
    assert not holds
    assert "." in name
    if options:  # without options, test_a_right_layout_passes covers this
        right = _certify(world, config, 3, "no_bug")
        assert right.passed, right
