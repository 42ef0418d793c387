"""Detection statistics against scikit-learn, hand-computed cases, and their own promises: coverage, validity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from blto.errors import ConfigError
from blto.evaluation import detection
from blto.evaluation.detection import (
    auroc,
    average_precision,
    bonferroni,
    expected_average_precision,
    precision_at,
    rank_p_value,
    smallest_p_value,
    tpr_at_lowest_fpr,
)
from blto.evaluation.statistics import wilson

# Few distinct values, so that most cases hold ties.
groups = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def pooled(positives: list[int], negatives: list[int]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    return np.array(positives + negatives), np.arange(len(positives) + len(negatives)) < len(positives)


def share_of_pairs(positives: npt.NDArray[Any], negatives: npt.NDArray[Any], axis: int = -1) -> npt.NDArray[Any]:
    """AUROC by its definition, the way `scipy.stats.bootstrap` calls a statistic."""
    assert axis == -1
    x, y = positives[..., :, None], negatives[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1))  # type: ignore[no-any-return]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(groups, groups)
def test_auroc_equals_scikit_learn_and_lies_within_its_interval(positives: list[int], negatives: list[int]) -> None:
    scores, is_positive = pooled(positives, negatives)
    metric = auroc(positives, negatives)
    assert metric.value == pytest.approx(roc_auc_score(is_positive, scores), abs=1e-12)
    assert metric.n == len(scores)
    assert metric.value is not None
    assert metric.low is not None
    assert metric.high is not None
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    assert metric.low < metric.high


def test_auroc_depends_on_the_order_of_scores_alone() -> None:
    positives, negatives = np.random.default_rng(0).normal([[0.8], [0.0]], 1, (2, 15))
    expected = auroc(positives, negatives)
    assert auroc(positives[::-1], np.sort(negatives)) == auroc(np.exp(positives), np.exp(negatives)) == expected
    mirrored = auroc(-positives, -negatives)
    assert mirrored.value == pytest.approx(1 - (expected.value or 0), abs=1e-12)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - (expected.high or 0), 1 - (expected.low or 0)), abs=0.02)


@pytest.mark.parametrize("block", [detection.BLOCK, 100, 1])
def test_auroc_bootstrap_equals_scipys(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "BLOCK", block)
    rng = np.random.default_rng(1)
    positives, negatives = rng.normal(0.7, 1, 30).round(1), rng.normal(0, 1, 60).round(1)
    found = auroc(positives, negatives)
    given = {"n_resamples": 4000, "method": "percentile", "vectorized": True, "batch": 500, "rng": rng}
    expected = stats.bootstrap((positives, negatives), share_of_pairs, **given).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.012)


@pytest.mark.parametrize(("many", "few"), [(40, 10), (1000, 20), (1, 1), (7, 7)])
def test_auroc_of_complete_separation_is_bounded_as_the_smaller_group_is(many: int, few: int) -> None:
    low = stats.binomtest(few, few).proportion_ci(method="exact").low
    above, below = np.arange(few) + 5000.0, np.arange(many)
    for positives, negatives in ((above, below), (below + 9000, above)):
        high, mirrored = auroc(positives, negatives), auroc(negatives, positives)
        assert (high.value, high.low, high.high) == pytest.approx((1, low, 1))
        assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((0, 0, 1 - low))


def test_auroc_of_nearly_complete_separation_promises_no_more_than_of_a_complete_one() -> None:
    # One of 400 pairs is wrong. A bootstrap would say [0.985, 1], where complete separation has [0.69, 1].
    positives = np.array([38.5, *range(40, 49)])
    nearly, complete = auroc(positives, range(40)), auroc(positives + 1, range(40))
    assert nearly.value == 1 - 1 / 400
    assert complete.value == 1
    assert 0.6 < (nearly.low or 0) < (complete.low or 0) < 0.7


def test_auroc_of_equal_scores_knows_nothing() -> None:
    metric = auroc([1.0] * 4, [1.0] * 9)
    assert metric.value == 0.5
    assert (metric.low or 0) < 0.1
    assert (metric.high or 0) > 0.9


@pytest.mark.parametrize(
    ("kind", "positives", "negatives", "truth"),
    [
        ("shifted", 10, 40, 0.8),
        ("shifted", 40, 40, 0.9),
        ("shifted", 20, 20, 0.97),
        ("some far above", 10, 40, 0.9),
        ("some far above", 40, 20, 0.8),
    ],
)
def test_auroc_interval_covers_what_it_promises(kind: str, positives: int, negatives: int, truth: float) -> None:
    rng, draws, held, width = np.random.default_rng(2), 120, 0, 0.0
    for _ in range(draws):
        noise, clean = rng.normal(size=positives), rng.normal(size=negatives)
        far = 100 * (rng.random(positives) < 2 * truth - 1)
        metric = auroc(noise + (math.sqrt(2) * stats.norm.ppf(truth) if kind == "shifted" else far), clean)
        assert metric.low is not None
        assert metric.high is not None
        held += metric.low <= truth <= metric.high
        width += (metric.high - metric.low) / draws
    assert held / draws >= 0.9
    assert width < 0.5


@settings(deadline=None, derandomize=True)
@given(groups, groups, st.floats(0.001, 0.999))
def test_average_precision_equals_scikit_learn(positives: list[int], negatives: list[int], prevalence: float) -> None:
    scores, is_positive = pooled(positives, negatives)
    assert average_precision(scores, is_positive) == pytest.approx(average_precision_score(is_positive, scores))
    weights = np.where(is_positive, prevalence / len(positives), (1 - prevalence) / len(negatives))
    expected = average_precision_score(is_positive, scores, sample_weight=weights)
    assert expected_average_precision(positives, negatives, prevalence) == pytest.approx(expected)


def test_average_precision_equals_hand_computed_case() -> None:
    # Ranked +, -, (+ -): precision 1 at the first positive, 2/4 at the second.
    assert average_precision([9, 8, 7, 7], [True, False, True, False]) == pytest.approx((1 + 2 / 4) / 2)
    # With one positive in 101: 1 at the first, and 0.01 / (0.01 + 1) (in parts of 1/1.01) where all are flagged.
    assert expected_average_precision([9, 7], [8, 7], 1 / 101) == pytest.approx((1 + 1 / 101) / 2)


def test_average_precision_at_another_prevalence_is_that_of_repeated_negatives() -> None:
    rng = np.random.default_rng(3)
    positives, negatives = rng.normal(1, 1, 20), rng.normal(0, 1, 50)
    repeated = np.concatenate([positives, np.repeat(negatives, 40)])
    assert expected_average_precision(positives, negatives, 20 / 2020) == pytest.approx(
        average_precision(repeated, np.arange(2020) < 20)
    )


def test_tpr_at_lowest_fpr_equals_hand_computed_case() -> None:
    # The threshold is 5: a score of 5 is not above it. The largest negative, 9, has no say in it.
    fpr, tpr = tpr_at_lowest_fpr([5, 6, 7, 8], [1, 5, 3], [0, 2, 4, 5, 9])
    assert (fpr.value, fpr.low, fpr.high, fpr.n) == (0.2, *wilson(1, 5), 5)
    assert (tpr.value, tpr.low, tpr.high, tpr.n) == (0.75, *wilson(3, 4), 4)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=6), st.data())
def test_precision_at_is_the_mean_over_all_orders_of_equal_scores(
    marked: list[tuple[int, bool]], data: st.DataObject
) -> None:
    scores, is_positive = [score for score, _ in marked], [positive for _, positive in marked]
    is_positive[:2] = [True, False]
    count = data.draw(st.integers(1, len(marked)))
    orders = [sorted(order, key=lambda i: -scores[i]) for order in itertools.permutations(range(len(marked)))]
    expected = np.mean([[is_positive[i] for i in order[:count]] for order in orders])
    assert precision_at(scores, is_positive, count) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("score", "one_sided", "two_sided"),
    [(5, 1 / 6, 2 / 6), (4, 2 / 6, 4 / 6), (2, 5 / 6, 1.0), (0, 1.0, 2 / 6), (1, 1.0, 4 / 6), (3, 4 / 6, 1.0)],
)
def test_rank_p_value_equals_hand_computed_cases(score: float, one_sided: float, two_sided: float) -> None:
    null = [1, 2, 3, 3, 4]
    assert rank_p_value(score, null) == pytest.approx(one_sided)
    assert rank_p_value(score, null, sides=2) == pytest.approx(two_sided)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=20), st.sampled_from([1, 2]))
def test_rank_p_value_is_valid_also_with_ties(scores: list[int], sides: int) -> None:
    # Whichever of n + 1 interchangeable scores is the suspect: the share of them with p <= alpha is at most alpha.
    p = np.array([rank_p_value(s, scores[:i] + scores[i + 1 :], sides=sides) for i, s in enumerate(scores)])
    assert all(np.mean(p <= alpha) <= alpha + 1e-12 for alpha in p)
    assert p.min() >= smallest_p_value(len(scores) - 1, sides)


@pytest.mark.parametrize(("n", "sides", "p"), [(19, 1, 0.05), (39, 2, 0.05), (20, 1, 1 / 21), (1, 2, 1.0)])
def test_smallest_p_value_is_that_of_a_score_beyond_all(n: int, sides: int, p: float) -> None:
    assert smallest_p_value(n, sides) == rank_p_value(n, range(n), sides=sides) == p


def test_bonferroni_equals_hand_computed_case() -> None:
    assert bonferroni([0.01, 0.2, 0.5]) == pytest.approx([0.03, 0.6, 1.0])


def test_nothing_given_is_changed() -> None:
    scores, is_positive = np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])
    before = scores.copy(), is_positive.copy()
    auroc(scores[:2], scores[2:])
    average_precision(scores, is_positive)
    precision_at(scores, is_positive, 3)
    tpr_at_lowest_fpr(scores, scores, scores)
    rank_p_value(2.0, scores)
    bonferroni(scores / 4)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(is_positive, before[1])


BAD_SCORES: list[Any] = [[], [1.0, math.nan], [math.inf], [None], ["a"], [[1.0], [2.0]], np.ones((3, 2))]
GIVEN: list[tuple[str, Callable[[Any], object]]] = [
    ("positives", lambda bad: auroc(bad, [1.0])),
    ("negatives", lambda bad: auroc([1.0], bad)),
    ("scores", lambda bad: average_precision(bad, [True, False])),
    ("positives", lambda bad: expected_average_precision(bad, [1.0], 0.5)),
    ("negatives", lambda bad: expected_average_precision([1.0], bad, 0.5)),
    ("positives", lambda bad: tpr_at_lowest_fpr(bad, [1.0], [1.0])),
    ("thresholds_from", lambda bad: tpr_at_lowest_fpr([1.0], bad, [1.0])),
    ("negatives", lambda bad: tpr_at_lowest_fpr([1.0], [1.0], bad)),
    ("scores", lambda bad: precision_at(bad, [True, False], 1)),
    ("null", lambda bad: rank_p_value(1.0, bad)),
    ("score", lambda bad: rank_p_value(bad, [1.0])),
    ("p_values", bonferroni),
]


@pytest.mark.parametrize(("name", "function"), GIVEN)
def test_what_is_no_list_of_finite_numbers_is_refused_by_name(name: str, function: Callable[[Any], object]) -> None:
    for bad in BAD_SCORES:
        with pytest.raises(ConfigError, match=rf"^{name}: [^\n]+ at least one number, none NaN or infinite\.$"):
            function(bad)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda: average_precision([1, 2], [True, True]), "2 of 2 scores are positives"),
        (lambda: precision_at([1, 2], [False, False], 1), "0 of 2 scores are positives"),
        (lambda: average_precision([1, 2], [True]), r"is_positive is bool \(1,\)"),
        (lambda: average_precision([1, 2], [1, 0]), "is_positive is int64"),
        (lambda: precision_at([1, 2], [True, False], 0), "count 0 of 2"),
        (lambda: precision_at([1, 2], [True, False], 3), "count 3 of 2"),
        (lambda: expected_average_precision([1], [2], 0.0), "prevalence 0.0"),
        (lambda: expected_average_precision([1], [2], math.nan), "prevalence nan"),
        (lambda: expected_average_precision([1], [2], 1.0), "prevalence 1.0"),
        (lambda: rank_p_value(1.0, [1.0], sides=3), "3 sides"),
        (lambda: smallest_p_value(0), "0 clean scores"),
        (lambda: bonferroni([0.5, 1.1]), "1.1"),
        (lambda: bonferroni([-0.1]), "-0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(function: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        function()
