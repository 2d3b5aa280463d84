"""The rule for stragglers, on invented step times."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.fault.stragglers import IN_A_ROW, LEAST_SECONDS, LEAST_SHARE, WARM_UP, Change, Stragglers

FEW = 3 * IN_A_ROW


def warm(peers: list[list[int]], factor: float = 1.3) -> Stragglers:
    """Return a `Stragglers` past its warmup."""
    found = Stragglers(factor, peers, 2)
    for step in range(WARM_UP):
        assert not found.look(step, np.full((sum(map(len, peers)), 2), 9.0 * (step + 1)))
    return found


def seen(ranks: Stragglers, steps: list[list[tuple[float, float]]], first: int = 10) -> list[Change]:
    return [change for number, step in enumerate(steps, first) for change in ranks.look(number, np.array(step))]


def test_a_rank_is_named_once_with_its_phase_its_seconds_and_the_median_of_the_others() -> None:
    ranks = warm([[0, 1, 2, 3]])
    steps = [[(1.0, 2.0), (1.1, 2.0), (1.2, 2.0), (1.9, 2.0)]] * FEW
    [change] = seen(ranks, steps)
    assert change == Change(3, 0, True, change.seconds, change.others, (10, 9 + IN_A_ROW))
    assert (change.seconds, change.others) == pytest.approx((1.9, 1.1))
    assert ranks.slow.tolist() == [[False] * 2] * 3 + [[True, False]]


def test_it_is_said_again_when_it_is_over() -> None:
    ranks = warm([[0, 1, 2]])
    seen(ranks, [[(1.0, 1.0), (1.0, 1.0), (1.0, 2.0)]] * FEW)
    near = [[(1.0, 1.0), (1.0, 1.0), (1.0, 1.2)]] * FEW  # neither slow enough to be reported nor fast enough to recover
    assert seen(ranks, near) == []
    [over] = seen(ranks, [[(1.0, 1.0), (1.0, 1.0), (1.0, 1.1)]] * FEW)
    assert (over.rank, over.phase, over.is_slow) == (2, 1, False)
    assert over.seconds == pytest.approx(1.1)
    [again] = seen(ranks, [[(1.0, 1.0), (1.0, 1.0), (1.0, 1.5)]] * FEW)
    assert again.is_slow


def test_all_are_equally_slow_and_nobody_is_named() -> None:
    for peers in ([[0, 1]], [[0, 1, 2, 3, 4]]):
        ranks, size = warm(peers), len(peers[0])
        assert not seen(ranks, [[(1.0, 1.0)] * size] * FEW + [[(5.0, 9.0)] * size] * FEW)


def test_moments_are_no_slowness() -> None:
    """Each rank is late at times, but none `IN_A_ROW` times in a row."""
    draw = np.random.default_rng(0)
    ranks = warm([[0, 1, 2, 3]])
    for step in range(500):
        seconds = np.ones((4, 2))
        seconds[draw.integers(4)] = 3.0
        seconds[1] = 3.0 if step % IN_A_ROW else 1.0
        assert not ranks.look(step, seconds)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_the_slow_one_is_found_among_any_number(size: int) -> None:
    for slow in range(size):
        steps = [[(1.5 if rank == slow else 1.0, 0.5) for rank in range(size)]] * FEW
        assert [c.rank for c in seen(warm([list(range(size))]), steps)] == [slow]


def test_each_is_compared_with_those_that_do_the_same_work() -> None:
    """The last pipeline stage has the head: twice the work, on both its ranks."""
    ranks = warm([[0, 1], [2, 3]])
    assert not seen(ranks, [[(1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 1.0)]] * FEW)
    [found] = seen(ranks, [[(1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (2.0, 1.0)]] * FEW)
    assert found.rank == 1
    assert not seen(warm([[0], [1]]), [[(1.0, 1.0), (3.0, 1.0)]] * FEW)  # no peers


def test_the_worst_comes_first() -> None:
    found = seen(warm([[0, 1, 2]]), [[(1.0, 1.0), (1.0, 1.0), (2.0, 5.0)]] * FEW)
    assert [c.phase for c in found] == [1, 0]


def test_little_is_nothing() -> None:
    short = LEAST_SECONDS / 2
    assert not seen(warm([[0, 1]]), [[(short, short), (2.9 * short, short)]] * FEW)
    small = LEAST_SHARE / 2
    assert not seen(warm([[0, 1]]), [[(small, 1.0), (2.9 * small, 1.0)]] * FEW)


def test_what_was_not_measured_shows_nothing() -> None:
    slow = [(1.0, 0.0), (1.0, 0.0), (2.0, 0.0)]
    gap = [(0.0, 0.0)] * 3
    found = seen(warm([[0, 1, 2]]), [slow, gap] * (IN_A_ROW - 1) + [slow])
    assert [(c.rank, c.steps) for c in found] == [(2, (10, 10 + 2 * (IN_A_ROW - 1)))]
