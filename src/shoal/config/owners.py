"""Which rank orthogonalizes which matrix in a step of Muon (`optim/muon.py`). No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

# Elements of a round's matrices on a rank that are always allowed: small ones are then sent in few messages, whose latency
# would take longer than their products
SMALL: Final = 2**20


def assign_owners(shapes: Sequence[tuple[int, ...]], processes: int) -> list[dict[int, int]]:
    """
    Return rounds of matrix -> owning rank, the most expensive matrices first.

    A round assigns the remaining matrices by descending cost, each to the least loaded rank. It ends when that rank would
    have more work, or more memory, than the round's first matrix alone, and more than `SMALL` elements. So no rank waits long
    for another.
    """
    # multiplications of X X^T, up to a constant: the Gram matrix is of the shorter side
    cost = [rows * columns * min(rows, columns) for rows, columns in shapes]
    rounds: list[dict[int, int]] = []
    work, held = [0] * processes, [0] * processes
    most_work = most_held = -1
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        owner = min(range(processes), key=lambda rank: (work[rank], rank))
        size = math.prod(shapes[i])
        within = work[owner] + cost[i] <= most_work and held[owner] + size <= most_held
        if not rounds or not (within or held[owner] + size <= SMALL):
            rounds.append({})
            work, held = [0] * processes, [0] * processes
            owner, most_work, most_held = 0, cost[i], size
        rounds[-1][i] = owner
        work[owner] += cost[i]
        held[owner] += size
    return rounds
