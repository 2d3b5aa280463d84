"""Worlds of a few processes, each started once, when first asked for."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run beside each other's processes
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from collections.abc import Callable, Iterator

import pytest

from tests.world import World, Worlds


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(n)`: the n processes of this session."""
    worlds = Worlds()
    yield worlds.__getitem__
    worlds.close()
