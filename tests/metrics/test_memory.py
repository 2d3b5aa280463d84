"""The memory of a process, against what psutil and the tensors themselves say."""

from __future__ import annotations

import psutil
import pytest
import torch

from shoal.metrics.memory import memory_of

MIB = 2**20


def test_it_is_the_resident_memory_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert memory_of(cpu).used == pytest.approx(psutil.Process().memory_info().rss, abs=4 * MIB)
    block = torch.ones(64 * MIB // 4)  # perhaps in memory that earlier tests have left to this process
    during = memory_of(cpu)
    assert during.used == pytest.approx(psutil.Process().memory_info().rss, abs=4 * MIB)
    assert during.used > block.nbytes
    assert during.peak_used >= during.used
    assert (during.reserved, during.peak_reserved) == (0, 0)
    del block
    assert memory_of(cpu).peak_used >= during.peak_used - 4 * MIB
