"""The memory of a process, against what psutil and the tensors themselves say."""

from __future__ import annotations

import mmap

import psutil
import pytest
import torch

from shoal.metrics.memory import memory_of

MIB = 2**20


def test_it_is_the_resident_memory_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    before = memory_of(cpu)
    assert before.used == pytest.approx(psutil.Process().memory_info().rss, abs=4 * MIB)
    # not from the heap, which may hold free memory of earlier tests
    block = torch.frombuffer(mmap.mmap(-1, 64 * MIB), dtype=torch.float32).fill_(1)
    during = memory_of(cpu)
    assert during.used - before.used == pytest.approx(block.nbytes, abs=8 * MIB)
    assert during.peak_used >= during.used
    assert (during.reserved, during.peak_reserved) == (0, 0)
    del block
    assert memory_of(cpu).peak_used >= during.peak_used - 4 * MIB
