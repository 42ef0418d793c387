"""The plan: how many images, of which class, the same ones each time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blto.errors import ConfigError
from blto.poisoning import PoisonPlan, plan_replacement

LABELS: npt.NDArray[np.int64] = np.random.default_rng(0).permutation(np.arange(1000, dtype=np.int64) % 10)


def plan(rate: float, *, target: int = 3, seed: int = 0, labels: npt.NDArray[np.int64] | None = LABELS) -> PoisonPlan:
    return plan_replacement(labels, num_classes=10, target_class=target, poison_rate=rate, seed=seed)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 100), st.integers(0, 9), st.integers(0, 2**31))
def test_round_of_rate_times_n_images_of_the_target_class(count: int, target: int, seed: int) -> None:
    made = plan(count / 1000, target=target, seed=seed)
    assert len(made.indices) == count
    assert made.poison_rate == count / 1000
    assert (LABELS[made.indices] == target).all()
    assert (np.diff(made.indices) > 0).all()


def test_count_rounds_to_the_nearest() -> None:
    assert len(plan(0.0104).indices) == 10
    assert len(plan(0.0106).indices) == 11


def test_same_seed_same_images_other_seed_other_images() -> None:
    assert np.array_equal(plan(0.05).indices, plan(0.05).indices)
    assert not np.array_equal(plan(0.05).indices, plan(0.05, seed=1).indices)


def test_a_lower_rate_poisons_a_part_of_a_higher_one_s_images() -> None:
    assert set(plan(0.02).indices) < set(plan(0.05).indices)


def test_every_image_of_the_class_has_the_same_chance() -> None:
    members = np.flatnonzero(LABELS == 3)
    counts = np.zeros(1000)
    for seed in range(400):
        counts[plan(0.05, seed=seed).indices] += 1
    # 400 draws of half of the class: mean 200, standard deviation 10.
    assert counts[members].min() > 155
    assert counts[members].max() < 245


def test_rate_0_is_the_clean_control() -> None:
    made = plan(0.0)
    assert made.indices.shape == (0,)
    assert made.poison_rate == 0


def test_the_whole_class_can_be_poisoned() -> None:
    assert np.array_equal(plan(0.1).indices, np.flatnonzero(LABELS == 3))


def test_more_than_the_class_has_is_refused_with_the_largest_rate() -> None:
    with pytest.raises(ConfigError, match=r"asks for 101 images, but class 3 has 100 of 1000.*at most 0\.1\."):
        plan(0.101)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_fraction_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="fraction from 0 to 1"):
        plan(rate)


def test_a_positive_rate_that_poisons_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rounds to none; give 0 .* at least 0\.001"):
        plan(0.0004)


@pytest.mark.parametrize("target", [-1, 10])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ConfigError, match="class from 0 to 9"):
        plan(0.01, target=target)


@pytest.mark.parametrize("labels", [None, LABELS[:0]])
def test_labels_are_needed(labels: npt.NDArray[np.int64] | None) -> None:
    with pytest.raises(ConfigError, match="no labels"):
        plan(0.01, labels=labels)


@pytest.mark.parametrize(
    ("indices", "target"),
    [([2, 1], 0), ([1, 1], 0), ([-1, 2], 0), ([0, 5], 0), ([0, 1], -1)],
    ids=["unsorted", "twice", "negative", "too large", "negative target"],
)
def test_a_plan_that_cannot_be_is_refused(indices: list[int], target: int) -> None:
    with pytest.raises(ConfigError, match="poison plan"):
        PoisonPlan(np.array(indices, dtype=np.int64), target, 5)


def test_indices_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigError, match="int64"):
        PoisonPlan(np.array([0.0, 1.0]), 0, 5)
