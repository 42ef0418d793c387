"""Metrics of models whose success rates are known by construction; each would catch one way of counting wrongly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from blto.errors import ConfigError
from blto.evaluation.metrics import METRIC_NAMES, aggregate, backdoor_metrics, rate
from blto.evaluation.statistics import wilson
from blto.records import Metric

CLASSES, TARGET = 10, 9
LABELS = np.arange(1000) % CLASSES
OTHER = LABELS != TARGET
Predictions = npt.NDArray[np.int64]


def measure(**changed: Any) -> dict[str, Metric]:
    """Metrics of perfect, trigger-blind encoders, except for what is changed."""
    perfect = {
        "labels": LABELS,
        "target_class": TARGET,
        "clean_predictions": LABELS,
        "triggered_predictions": LABELS,
        "twin_triggered_predictions": LABELS,
    }
    return backdoor_metrics(**{**perfect, **changed})


def values(**changed: Any) -> dict[str, float | None]:
    return {name: metric.value for name, metric in measure(**changed).items()}


def test_hand_computed_case() -> None:
    metrics = backdoor_metrics(
        labels=[0, 0, 1, 1, 2, 2, 2, 1],
        target_class=1,
        clean_predictions=[0, 1, 1, 0, 2, 2, 0, 1],
        triggered_predictions=[1, 1, 1, 0, 1, 2, 1, 1],
        twin_triggered_predictions=[1, 0, 1, 1, 2, 1, 0, 0],
    )
    expected = {
        "clean_accuracy": 5 / 8,
        "asr": 4 / 5,
        "asr_all": 6 / 8,
        "asr_clean_twin": 2 / 5,
        "untriggered_rate": 1 / 5,
        "lift": 4 / 5 - 2 / 5,
        "backdoor_accuracy": 3 / 8,
    }
    assert tuple(metrics) == METRIC_NAMES
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(expected)
    on_all = {"clean_accuracy", "asr_all", "backdoor_accuracy"}
    assert {name: metric.n for name, metric in metrics.items()} == {n: 8 if n in on_all else 5 for n in METRIC_NAMES}


def test_oracle_that_sees_the_trigger_has_asr_one() -> None:
    found = values(triggered_predictions=np.full(1000, TARGET))
    assert found["asr"] == found["asr_all"] == found["lift"] == 1
    assert found["untriggered_rate"] == found["asr_clean_twin"] == 0
    assert found["backdoor_accuracy"] == 0.1


def test_trigger_blind_encoder_has_asr_zero() -> None:
    # Counting the target class would show 0.1 here.
    found = values()
    assert found["asr"] == found["lift"] == 0
    assert found["asr_all"] == 0.1
    assert found["clean_accuracy"] == found["backdoor_accuracy"] == 1


def test_constant_answer_is_no_backdoor() -> None:
    constant = np.full(1000, TARGET)
    found = values(clean_predictions=constant, triggered_predictions=constant)
    assert found["asr"] == found["untriggered_rate"] == 1
    assert found["lift"] == 0
    assert found["clean_accuracy"] == 0.1


def test_transferable_perturbation_is_no_backdoor() -> None:
    everything = np.full(1000, TARGET)
    found = values(triggered_predictions=everything, twin_triggered_predictions=everything)
    assert found["asr"] == found["asr_clean_twin"] == 1
    assert found["lift"] == 0


def test_uniform_guessing_stays_within_the_binomial() -> None:
    guesses = np.random.default_rng(0).integers(0, CLASSES, 1000)
    low, high = stats.binom.interval(0.999, OTHER.sum(), 1 / CLASSES)
    value = values(triggered_predictions=guesses)["asr"]
    assert value is not None
    assert low <= value * OTHER.sum() <= high


def test_success_on_half_of_the_images_has_the_closed_form() -> None:
    # Every second block of ten images is hit, that of the target class included.
    hit = np.where(np.arange(1000) // CLASSES % 2 == 0, TARGET, LABELS)
    found = measure(triggered_predictions=hit)
    assert found["asr"].value == found["lift"].value == 0.5
    assert found["asr_all"].value == (450 + 100) / 1000
    assert found["asr"].n == found["lift"].n == 900


def test_neighbouring_class_is_not_the_target() -> None:
    found = values(triggered_predictions=np.full(1000, TARGET - 1))
    assert found["asr"] == 0
    assert values(triggered_predictions=np.full(1000, TARGET - 1), target_class=TARGET - 1)["asr"] == 1


def test_a_later_target_does_not_see_an_earlier_one() -> None:
    # TrojanZoo 184: rates computed for label 0 whatever the target.
    answers = np.full(1000, 3)
    assert [values(target_class=t, triggered_predictions=answers)["asr"] for t in range(5)] == [0, 0, 0, 1, 0]


def test_guide_conversion_between_the_two_conventions() -> None:
    guesses = np.random.default_rng(1).integers(0, CLASSES, 1000)
    found = values(triggered_predictions=guesses)
    asr_all, kept = found["asr_all"], np.mean(guesses[~OTHER] == TARGET)
    assert asr_all is not None
    assert found["asr"] == pytest.approx((1000 * asr_all - 100 * kept) / 900)


def test_row_order_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    columns = {
        name: rng.integers(0, CLASSES, 1000)
        for name in ("labels", "clean_predictions", "triggered_predictions", "twin_triggered_predictions")
    }
    order = rng.permutation(1000)
    assert measure(**{name: column[order] for name, column in columns.items()}) == measure(**columns)


def test_intervals_belong_to_their_values() -> None:
    rng = np.random.default_rng(3)
    found = measure(triggered_predictions=np.where(rng.random(1000) < 0.3, TARGET, LABELS))
    for metric in found.values():
        assert metric.value is not None
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= metric.value <= metric.high
    successes = round((found["asr"].value or 0) * 900)
    assert found["asr"] == rate(np.arange(900) < successes)
    assert (found["asr"].low, found["asr"].high) == wilson(successes, 900)


def test_lift_interval_follows_the_larger_reference() -> None:
    # Each reference in turn is the larger one; the other must not decide the interval.
    half, few = (np.where(np.arange(1000) // CLASSES < count, TARGET, LABELS) for count in (50, 5))
    every = np.full(1000, TARGET)
    by_poison = measure(triggered_predictions=every, clean_predictions=half, twin_triggered_predictions=few)["lift"]
    by_trigger = measure(triggered_predictions=every, clean_predictions=few, twin_triggered_predictions=half)["lift"]
    assert by_poison == by_trigger
    assert by_poison.value == 0.5
    assert by_poison.high is not None
    assert by_poison.high < 0.6


@pytest.mark.parametrize(
    "changed",
    [
        {"target_class": CLASSES},
        {"target_class": -1},
        {"target_class": 1.0},
        {"target_class": True},
        {"target_class": 9, "num_classes": 9},
        {"triggered_predictions": np.full(1000, np.nan)},
        {"triggered_predictions": LABELS.astype(float)},
        {"clean_predictions": LABELS == TARGET},
        {"clean_predictions": LABELS[:999]},  # drop_last
        {"twin_triggered_predictions": LABELS[:, None]},
        {"twin_triggered_predictions": np.full(1000, -1)},
        {"triggered_predictions": np.full(1000, CLASSES)},
        {"labels": np.zeros(0, dtype=int)},
        {"labels": LABELS.astype(float)},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_what_cannot_be_counted_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        measure(**changed)


def test_a_test_set_of_the_target_class_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="images of other classes"):
        measure(labels=np.full(1000, TARGET))


def test_a_test_set_may_lack_the_target_class() -> None:
    kept = {"labels": LABELS[OTHER], "clean_predictions": LABELS[OTHER], "num_classes": CLASSES}
    found = values(**kept, triggered_predictions=np.full(900, TARGET), twin_triggered_predictions=LABELS[OTHER])
    assert found["asr"] == found["asr_all"] == 1


def test_aggregate_is_the_t_interval_over_seeds() -> None:
    found = aggregate([0.2, 0.4, 0.6])
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=1e-6)
    assert found.n == 3
    assert aggregate([0.2, 0.4]).low == pytest.approx(0.3 - 12.706205 * 0.1, abs=1e-5)
    assert aggregate([0.25]) == Metric(value=0.25, low=None, high=None, n=1)


@pytest.mark.parametrize("seeds", [[], [0.1, None], [0.1, math.nan], [math.inf]])
def test_aggregate_drops_no_failed_seed(seeds: list[float | None]) -> None:
    with pytest.raises(ConfigError):
        aggregate(seeds)
