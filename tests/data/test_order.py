"""The order of samples: a permutation per epoch that looks random."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.data.order.order import sample_at


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097, 100_003])
def test_each_epoch_has_every_sample_once(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (123, 7), (2**64 + 3, 2)]:
        rows = sample_at(seed, np.arange(n) + epoch * n, n)
        np.testing.assert_array_equal(np.sort(rows), np.arange(n))


def test_one_position_at_a_time_is_the_same() -> None:
    together = sample_at(5, np.arange(250), 100)
    assert [int(sample_at(5, position, 100)) for position in range(250)] == together.tolist()
    np.testing.assert_array_equal(sample_at(5, np.arange(250).reshape(25, 10), 100), together.reshape(25, 10))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(sample_at(seed, np.arange(50) + e * 50, 50)) for seed in (0, 1, 2**64, 2**64 + 1) for e in range(5)}
    assert len(orders) == 20


def test_it_does_not_depend_on_the_platform() -> None:
    assert sample_at(0, np.arange(10), 10).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]


def test_small_permutations_are_about_equally_frequent() -> None:
    """Test the 24 orders of 4 samples: chi-squared with 23 degrees of freedom exceeds 60 once in 30,000 times."""
    orders = sample_at(11, np.arange(4 * 4800), 4).reshape(4800, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 60


def test_neighbours_are_not_correlated() -> None:
    rows = sample_at(3, np.arange(20_000), 20_000).astype(float)
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 0.03  # four standard deviations
    assert abs(np.corrcoef(rows, np.arange(20_000))[0, 1]) < 0.03


def test_very_large_data_needs_no_memory() -> None:
    n = 10**15 + 7
    rows = sample_at(1, np.array([0, n - 1, n, 3 * n - 1]), n)
    assert ((rows >= 0) & (rows < n)).all()
    assert len(set(rows.tolist())) == 4


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        sample_at(0, 0, 0)
    with pytest.raises(ValueError, match="negative"):
        sample_at(0, [3, -1], 5)
