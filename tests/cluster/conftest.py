"""The cluster that the tests of this folder share: started once, healed after each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import Bed, lacking


@pytest.fixture(scope="session")
def _bed() -> Iterator[Bed]:
    if why := lacking():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="shoal-bed-"))  # pytest's own folders have paths too long for a socket
    with Bed(folder) as bed:
        yield bed
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bed(_bed: Bed) -> Iterator[Bed]:
    """Return a cluster of four idle nodes. Whatever the test did to it is undone after."""
    yield _bed
    _bed.heal()
