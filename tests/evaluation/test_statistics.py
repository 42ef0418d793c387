"""Intervals against hand-computed cases, independent implementations, and their own promise: coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blto.errors import ConfigError
from blto.evaluation.statistics import (
    lift_interval,
    paired_difference_interval,
    sign_flip_test,
    student_t_interval,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_table(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe, Statistics in Medicine 1998, vol. 17, p. 857, table I, method 3.
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None, derandomize=True)
@given(counts, st.floats(0.5, 0.999))
def test_wilson_equals_scipy_and_holds_the_estimate(case: tuple[int, int], level: float) -> None:
    successes, n = case
    low, high = wilson(successes, n, level)
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == n)


def test_wilson_covers_what_it_promises() -> None:
    # Exact, not simulated: the coverage at p is the probability of the counts whose interval holds p.
    n = 1000
    limits = np.array([wilson(k, n) for k in range(n + 1)])
    for p in (0.02, 0.1, 0.37, 0.5, 0.93):
        held = (limits[:, 0] <= p) & (p <= limits[:, 1])
        assert 0.94 <= stats.binom.pmf(np.arange(n + 1), n, p)[held].sum() <= 0.96


@pytest.mark.parametrize(("successes", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int, level: float) -> None:
    with pytest.raises(ConfigError):
        wilson(successes, n, level)


def test_student_t_equals_hand_computed_case() -> None:
    # Mean 2, deviation 1, t(0.975, 2 degrees of freedom) = 4.302653.
    half = 4.302653 / math.sqrt(3)
    assert student_t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-6)


def test_student_t_covers_what_it_promises() -> None:
    draws = np.random.default_rng(0).normal(0.3, 2.0, (2000, 3))
    limits = np.array([student_t_interval(row) for row in draws])
    assert 0.93 <= np.mean((limits[:, 0] <= 0.3) & (limits[:, 1] >= 0.3)) <= 0.97


@pytest.mark.parametrize("values", [[1.0], [], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]], [1.0, None], ["a", "b"]])
def test_student_t_refuses_missing_values(values: list[float]) -> None:
    with pytest.raises(ConfigError):
        student_t_interval(values)


def test_paired_interval_equals_hand_computed_case() -> None:
    # 1 and 7 discordant pairs of 21 (the airway data of Fagerland, Lydersen and Laake, Stat. Med. 2014): with one added
    # to each, (2 - 8) / 23 -+ 1.959964 sqrt((10 / 23 - (6 / 23)^2) / 23).
    assert paired_difference_interval(1, 7, 21) == pytest.approx((-0.508359, -0.013380), abs=1e-6)


@settings(deadline=None, derandomize=True)
@given(counts.flatmap(lambda case: st.tuples(st.integers(0, case[0]), st.just(case[0]), st.just(case[1]))))
def test_paired_interval_holds_the_estimate_and_mirrors(case: tuple[int, int, int]) -> None:
    gained, discordant, n = case
    lost = discordant - gained
    low, high = paired_difference_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    assert paired_difference_interval(lost, gained, n) == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize(("p_gained", "p_lost"), [(0.3, 0.3), (0.05, 0.02), (0.8, 0.01), (0.5, 0.0), (0.01, 0.0)])
def test_paired_interval_covers_what_it_promises(p_gained: float, p_lost: float) -> None:
    n, draws = 500, 2000
    cells = np.random.default_rng(1).multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], draws)
    limits = np.array([paired_difference_interval(int(gained), int(lost), n) for gained, lost, _ in cells])
    truth = p_gained - p_lost
    assert 0.93 <= np.mean((limits[:, 0] <= truth) & (truth <= limits[:, 1])) <= 0.975


@pytest.mark.parametrize(("gained", "lost", "n"), [(-1, 0, 3), (2, 2, 3), (0, 0, 0)])
def test_paired_interval_refuses_impossible_counts(gained: int, lost: int, n: int) -> None:
    with pytest.raises(ConfigError):
        paired_difference_interval(gained, lost, n)


@pytest.mark.parametrize(
    ("asr", "twin", "untriggered"),
    [(0.6, 0.3, 0.02), (0.6, 0.3, 0.3), (0.6, 0.3, 0.29), (0.1, 0.1, 0.1), (0.02, 0.02, 0.01), (0.95, 0.05, 0.05)],
)
def test_lift_interval_covers_what_it_promises(asr: float, twin: float, untriggered: float) -> None:
    # One latent difficulty per image couples its three answers. Tied references are the hard case.
    rng = np.random.default_rng(2)
    latent = rng.normal(size=(50_000, 1)) + 0.7 * rng.normal(size=(50_000, 3))
    answers = latent < stats.norm.ppf([asr, twin, untriggered], scale=math.hypot(1, 0.7))
    patterns, counts = np.unique(answers, axis=0, return_counts=True)
    rates = counts @ patterns / 50_000
    truth, n, draws = rates[0] - max(rates[1:]), 1500, 2000
    covered = 0
    for sample in rng.multinomial(n, counts / 50_000, draws):
        hits, first, second = np.repeat(patterns, sample, axis=0).T
        low, high = lift_interval(hits, first, second)
        assert low <= hits.mean() - max(first.mean(), second.mean()) <= high
        covered += low <= truth <= high
    assert 0.94 <= covered / draws <= 0.98


def test_lift_interval_is_paired() -> None:
    # The same images are hit with and without poison: no image speaks against equality, however many are hit.
    hits = np.arange(400) % 2 == 0
    shuffled = np.random.default_rng(0).permutation(hits)
    width, unpaired = (high - low for low, high in (lift_interval(hits, other, other) for other in (hits, shuffled)))
    assert width < unpaired / 5


def test_lift_interval_does_not_depend_on_the_order_of_images_or_references() -> None:
    rng = np.random.default_rng(3)
    hits, first, second = rng.random((3, 50)) < 0.4
    order = rng.permutation(50)
    expected = lift_interval(hits, first, second)
    assert lift_interval(hits[order], second[order], first[order]) == expected


def test_lift_interval_refuses_what_is_not_one_set_of_images() -> None:
    hits = np.ones(4, dtype=bool)
    none = hits[:0]
    for arrays in ((hits, hits, hits[:3]), (hits, hits.astype(int), hits), (none, none, none)):
        with pytest.raises(ConfigError):
            lift_interval(*arrays)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0], 1.0),
        ([1.0, 2.0, 3.0], 2 / 8),
        ([1.0, 2.0, -3.0], 1.0),
        ([3.0, 2.0, -1.0], 4 / 8),  # |sums| 4, 6, 2, 0 with both signs: 4 and 6 reach 4
        ([0.1, 0.2, -0.3, 0.3], 12 / 16),  # ties that rounding would pull apart
        ([0.0, 0.0], 1.0),
        ([1.0] * 6, 2 / 64),
    ],
)
def test_sign_flip_equals_hand_computed_cases(differences: list[float], p: float) -> None:
    assert sign_flip_test(differences) == p


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_sign_flip_equals_scipys_permutation_test(differences: list[float]) -> None:
    values = np.round(differences, 3)
    expected = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(values) == pytest.approx(expected.pvalue)


def test_sign_flip_p_is_uniform_under_the_null() -> None:
    # With 8 continuous differences p takes each multiple of 2/256 equally often; spread within the step, it is uniform.
    rng = np.random.default_rng(4)
    p = np.array([sign_flip_test(row) for row in rng.normal(size=(2000, 8))])
    assert stats.kstest(p - rng.random(2000) * 2 / 256, "uniform").pvalue > 0.01


def test_sign_flip_does_not_depend_on_order_or_direction() -> None:
    values = np.random.default_rng(5).normal(0.4, 1, 9)
    assert sign_flip_test(values[::-1]) == sign_flip_test(values) == sign_flip_test(-values)


@pytest.mark.parametrize("differences", [[], [math.nan, 1.0], [1.0] * 25])
def test_sign_flip_refuses_what_it_cannot_enumerate(differences: list[float]) -> None:
    with pytest.raises(ConfigError):
        sign_flip_test(differences)
