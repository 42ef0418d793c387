"""The order of an epoch: a true permutation of any size, uniform as far as a test can see, without memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blto.data.order import Rows, permuted

KEYS = np.random.default_rng(0).integers(0, 2**63, 20_000)


def whole(size: int, key: int) -> Rows:
    return permuted(0, size, size=size, key=key)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**63 - 1))
def test_it_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=st.integers(1, 500), key=st.integers(0, 2**63 - 1), data=st.data())
def test_any_part_is_that_part_of_the_whole(size: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert np.array_equal(permuted(start, stop, size=size, key=key), whole(size, key)[start:stop])


@pytest.mark.parametrize("size", [3, 5, 9, 10, 37])
def test_positions_and_neighbours_are_uniform_over_keys(size: int) -> None:
    """Where each element lands, and which elements follow each other; six rounds instead of sixteen do not pass."""
    orders = np.array([whole(size, int(key)) for key in KEYS])
    landed = np.array([np.bincount(column, minlength=size) for column in orders.T])
    followed = np.bincount((orders * size + np.roll(orders, -1, axis=1)).ravel(), minlength=size**2).reshape(size, size)
    pairs = followed[~np.eye(size, dtype=bool)]
    assert stats.chisquare(landed.ravel(), ddof=2 * size - 2).pvalue > 1e-3
    if size > 3:  # of three elements in a circle every one has both others beside it
        assert stats.chisquare(pairs).pvalue > 1e-3


def test_neighbours_of_a_large_set_are_as_far_apart_as_chance_has_them() -> None:
    """Spearman's rank correlation of successive elements, and of positions with elements, is that of noise."""
    size = 2_000_000
    rows = permuted(0, 20_000, size=size, key=7)
    assert stats.kstest(rows / size, "uniform").pvalue > 0.01
    assert stats.spearmanr(rows[:-1], rows[1:]).pvalue > 0.01
    assert stats.spearmanr(rows, np.arange(20_000)).pvalue > 0.01


def test_keys_give_orders_that_have_nothing_in_common() -> None:
    first, second = whole(5000, 1), whole(5000, 2)
    assert np.count_nonzero(first == second) < 10
    assert stats.spearmanr(first, second).pvalue > 0.01


def test_a_batch_of_ten_million_images_takes_the_memory_of_a_batch() -> None:
    permuted(0, 256, size=10**7, key=0)  # compiles
    tracemalloc.start()
    rows = permuted(10**7 - 256, 10**7, size=10**7, key=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= rows.min() <= rows.max() < 10**7
    assert peak < 10_000


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (5, 9)])
def test_elements_outside_of_the_set_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of 8 were asked for"):
        permuted(start, stop, size=8, key=0)


def test_the_order_stays_the_same_from_version_to_version() -> None:
    assert whole(10, 0).tolist() == [1, 0, 4, 9, 3, 2, 7, 6, 5, 8]
