"""The order of a blend: quotas, its inverse and its stages, against counting position by position."""

from __future__ import annotations

import random
from fractions import Fraction
from math import inf

import numpy as np
import pytest

from shoal.config.data_options import BlendSource, Data
from shoal.data.dataset import continued_stages, planned_stages
from shoal.data.order.blend import MAX_PERIOD, Blend, Stage, shares_of
from shoal.data.order.order import position_of, sample_at


def test_the_inverse_of_the_order_finds_every_sample() -> None:
    for n in (1, 2, 3, 17, 64, 1000):
        positions = np.arange(3 * n)
        samples = sample_at(2**70 + 1, positions, n, source=3)
        np.testing.assert_array_equal(position_of(2**70 + 1, samples, positions // n, n, source=3), positions)
    assert int(position_of(0, int(sample_at(0, 10**15, 10**12)), 1000, 10**12)) == 10**15
    with pytest.raises(ValueError, match="range"):
        position_of(0, 5, 0, 5)


def test_sources_of_equal_size_have_different_orders() -> None:
    assert sample_at(0, np.arange(50), 50).tolist() != sample_at(0, np.arange(50), 50, source=1).tolist()


def test_weights_become_exact_shares_or_nearly() -> None:
    assert shares_of([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert shares_of([3, 1.5, 0]) == (2, 1, 0)
    assert shares_of([1e-9, 1, 1]) == (1, 32768, 32767)
    weights = [9_035_582_198, 4_434_897, 123_456_789.5]
    found = shares_of(weights)
    assert sum(found) == MAX_PERIOD
    assert all(abs(f / MAX_PERIOD - w / sum(weights)) < 1 / MAX_PERIOD for f, w in zip(found, weights, strict=True))
    for bad in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights"):
            shares_of(bad)


def drawn(draw: random.Random) -> Blend:
    """Draw a blend of up to six sources, with stages, sources that some skip, and limits."""
    count = draw.randint(1, 6)
    stages, first = [], 0
    for _ in range(draw.randint(1, 4)):
        weights = [round(draw.choice([draw.random(), 0.3, 1, 7, 0.001, 0]), draw.randint(1, 3)) for _ in range(count)]
        stages.append(Stage(first, shares_of(weights if sum(weights) else [1.0] * count)))
        first += draw.randint(1, 300)
    limits = [draw.choice([inf, inf, 1, 2.5]) for _ in range(count)]
    return Blend(draw.randint(0, 9), [draw.randint(1, 40) for _ in range(count)], stages, limits)


@pytest.mark.parametrize("seed", range(12))
def test_quotas_epochs_and_the_inverse_agree_with_counting(seed: int) -> None:
    blend = drawn(random.Random(seed))
    last = int(min(blend.end, 500))
    rows = blend.rows_at(np.arange(last))
    sources = blend.sources_of(rows)
    taken = [0] * len(blend.sizes)
    quota = [Fraction(0)] * len(blend.sizes)
    segments = {segment.first: segment for segment in blend._segments}
    here = None
    for position, source in enumerate(sources.tolist()):
        if position in segments:  # the quotas continue from what each source was owed
            here = segments[position]
            quota = [t + owed for t, owed in zip(taken, here.owed, strict=True)]
        assert here is not None
        assert blend.taken_at(position)[0].tolist() == taken
        taken[source] += 1
        for i, share in enumerate(here.shares):
            quota[i] += Fraction(share, here.period)
            assert not share or abs(quota[i] - taken[i]) < 1, (position, i)
    for source, size in enumerate(blend.sizes):
        own = rows[sources == source] - blend.first_row(source)
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size)), "each row once per epoch"
        assert len(own) <= np.ceil(size * blend.max_epochs[source])
    at: dict[int, list[int]] = {row: [] for row in range(blend.num_rows)}
    for position, row in enumerate(rows.tolist()):
        at[row].append(position)
    for source, size in enumerate(blend.sizes):
        own = np.arange(size) + blend.first_row(source)
        found: dict[int, list[int]] = {row: [] for row in own.tolist()}
        for index, position in zip(*blend.positions_of(own, last), strict=True):
            found[int(own[index])].append(int(position))
        assert found == {row: at[row] for row in own.tolist()}


def test_stages_keep_every_prefix_within_a_sample_of_its_quota_over_all_stages() -> None:
    stages = [Stage(0, (7, 2, 1)), Stage(103, (1, 1, 1)), Stage(155, (2, 30, 5))]
    blend = Blend(0, [50, 60, 70], stages)
    quota = np.zeros(3)
    for position in range(600):
        shares = np.array([s.shares for s in stages if s.first <= position][-1])
        quota += shares / shares.sum()
        assert (abs(blend.taken_at(position + 1)[0] - quota) < 1 + 1e-9).all()


def test_without_weights_all_rows_are_one_shuffle() -> None:
    blend = Blend(4, [10, 20, 5])
    rows = blend.rows_at(np.arange(70))
    assert rows.tolist() == sample_at(4, np.arange(70), 35).tolist()
    assert blend.positions_of(12, 70)[1].tolist() == np.flatnonzero(rows == 12).tolist()


def test_a_blend_ends_where_no_source_may_be_read_again() -> None:
    blend = Blend(0, [3, 5], [Stage(0, (1, 1))], [2, 1])
    assert blend.end == 11
    with pytest.raises(ValueError, match="from position 11 on"):
        blend.rows_at(11)


def test_stages_are_places_of_a_run_and_a_resume_keeps_what_was_drawn() -> None:
    sources = {"web": BlendSource(corpus="dummy", weight=0.7), "code": BlendSource(corpus="dummy", weight=0.3)}
    data = Data(sources=sources, stages={"10 steps": {"code": 1}, "5120 tokens": {"web": 1, "code": 1}}, seq_len=64)
    # 5,120 tokens are 10 steps of 8 x 64 tokens: the later of two stages at one place holds
    assert planned_stages(data, 8) == [Stage(0, (7, 3)), Stage(80, (1, 1))]
    again = Data(
        sources={**sources, "code": BlendSource(corpus="dummy", weight=0.1)},
        stages={"10 steps": {"code": 1}},
        seq_len=64,
    )
    planned = planned_stages(again, 16, step=9, position=72)
    assert planned == [Stage(72, (7, 1)), Stage(88, (0, 1))]
    before = [Stage(0, (7, 3)), Stage(80, (1, 1))]
    assert continued_stages(before, planned, 72) == [Stage(0, (7, 3)), Stage(72, (7, 1)), Stage(88, (0, 1))]
    assert continued_stages(before, planned_stages(data, 8, 9, 72), 72) == before
    assert continued_stages(before, planned_stages(data, 8, 30, 240), 240) == before
