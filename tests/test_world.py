"""The worlds of processes that tests share: a hang, failure or death fails only one test; the next has a new world."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.mesh.mesh import Mesh
from tests.world import Worlds


def ranks(mesh: Mesh) -> tuple[int, float]:
    """Return this process's id, and the sum of all ranks."""
    total = torch.tensor(float(mesh.place.rank))
    torch.distributed.all_reduce(total)
    return os.getpid(), float(total)


def hang(mesh: Mesh) -> None:
    if mesh.place.rank == 1:
        signal.pause()
    torch.distributed.barrier()


def fail_alone(mesh: Mesh) -> None:
    assert mesh.place.rank == 0, "planted"
    torch.distributed.barrier()


def die(mesh: Mesh) -> None:
    if mesh.place.rank == 1:
        os._exit(7)


@pytest.mark.parametrize(
    ("trouble", "error", "text"),
    [
        (hang, TimeoutError, r"\[0, 1\] gave no answer"),
        (fail_alone, AssertionError, "planted"),
        (die, AssertionError, "died"),
    ],
)
def test_the_next_test_has_a_new_world(
    worlds: Worlds, trouble: Callable[..., Any], error: type[Exception], text: str
) -> None:
    before = worlds[2].run(ranks)
    assert worlds[2].run(ranks) == before, "without trouble it is kept"
    worlds[2].patience_seconds = 1.0
    with pytest.raises(error, match=text):
        worlds[2].run(trouble)
    after = worlds[2].run(ranks)
    assert [total for _, total in after] == [1.0, 1.0]
    assert not {pid for pid, _ in before} & {pid for pid, _ in after}
