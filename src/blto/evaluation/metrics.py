"""The definitions of attack success. No other module computes them. Torch-free: predictions in, `Metric`s out.

With t the target class, T the trigger, f the probe on the encoder under test and c the same probe on the clean twin
(same seeds and recipe, no poison), over test images x with true class y:

| name                | share of images with                                      | over        |
|---------------------|-----------------------------------------------------------|-------------|
| `clean_accuracy`    | f(x) = y                                                  | all images  |
| `backdoor_accuracy` | f(T(x)) = y                                               | all images  |
| `asr`               | f(T(x)) = t                                               | y != t only |
| `asr_all`           | f(T(x)) = t, as CTRL and BadEncoder count                 | all images  |
| `untriggered_rate`  | f(x) = t: what the poison does without the trigger        | y != t only |
| `asr_clean_twin`    | c(T(x)) = t: what the trigger does without the poison     | y != t only |
| `lift`              | asr - max(untriggered_rate, asr_clean_twin): the headline | y != t only |

`asr_all` of a dead attack is about the target's share of the test set (0.1 on CIFAR-10): it is no headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from blto.errors import ConfigError
from blto.evaluation.statistics import finite_numbers, lift_interval, student_t_interval, wilson
from blto.records import Metric

METRIC_NAMES = (
    "clean_accuracy",
    "asr",
    "asr_all",
    "asr_clean_twin",
    "untriggered_rate",
    "lift",
    "backdoor_accuracy",
)


def backdoor_metrics(
    *,
    labels: npt.ArrayLike,
    target_class: int,
    clean_predictions: npt.ArrayLike,
    triggered_predictions: npt.ArrayLike,
    twin_triggered_predictions: npt.ArrayLike,
    num_classes: int | None = None,
) -> dict[str, Metric]:
    """All backdoor metrics of one probe, from its predictions on one test set. The order of the images does not matter.

    Args:
        labels: true classes, integers (N,), target class included.
        target_class: t, in [0, num_classes).
        clean_predictions: f(x), integers (N,).
        triggered_predictions: f(T(x)), integers (N,): the trigger on every image, also on those of the target class.
        twin_triggered_predictions: c(T(x)), integers (N,).
        num_classes: number of classes; None takes one more than the largest label.

    Returns:
        `METRIC_NAMES` -> value, 95% interval and number of images. Intervals over images: Wilson, and for the lift
        `lift_interval`, which is paired. They are not the spread between seeds (see `aggregate`).

    Raises:
        ConfigError: a target class or a prediction out of range, arrays that are not integers (NaN included) or whose
            lengths differ, or no image outside the target class.
    """
    truth = np.asarray(labels)
    if num_classes is None:
        num_classes = int(truth.max()) + 1 if truth.size and np.issubdtype(truth.dtype, np.integer) else 0
    if isinstance(target_class, bool) or not isinstance(target_class, int | np.integer):
        raise ConfigError(f"target_class is {target_class!r}; give the number of a class.")
    truth, clean, triggered, twin = (
        _class_numbers(name, array, len(truth) if truth.ndim else 0, num_classes)
        for name, array in (
            ("labels", truth),
            ("clean_predictions", clean_predictions),
            ("triggered_predictions", triggered_predictions),
            ("twin_triggered_predictions", twin_triggered_predictions),
        )
    )
    if not 0 <= target_class < num_classes:
        raise ConfigError(f"target_class is {target_class}; give 0 to {num_classes - 1}, or the right num_classes.")
    other = truth != target_class
    if not other.any():
        raise ConfigError(f"every test image is of the target class {target_class}; ASR needs images of other classes.")

    hits = triggered[other] == target_class
    untriggered = clean[other] == target_class
    twin_hits = twin[other] == target_class
    low, high = lift_interval(hits, untriggered, twin_hits)
    lift = float(hits.mean()) - max(float(untriggered.mean()), float(twin_hits.mean()))
    return {
        "clean_accuracy": rate(clean == truth),
        "asr": rate(hits),
        "asr_all": rate(triggered == target_class),
        "asr_clean_twin": rate(twin_hits),
        "untriggered_rate": rate(untriggered),
        "lift": Metric(value=lift, low=low, high=high, n=len(hits)),
        "backdoor_accuracy": rate(triggered == truth),
    }


def rate(hits: npt.NDArray[np.bool_]) -> Metric:
    """The share of True in a boolean (n,), n at least 1, with its 95% Wilson interval."""
    successes, n = int(np.count_nonzero(hits)), len(hits)
    low, high = wilson(successes, n)
    return Metric(value=successes / n, low=low, high=high, n=n)


def aggregate(values: Sequence[float | None] | npt.NDArray[Any]) -> Metric:
    """The mean of one metric over seeds, with its 95% Student-t interval; n is the number of seeds.

    A single seed has no interval: low and high are None. The interval is that of a mean and may leave [0, 1].

    Raises:
        ConfigError: no value, or one that is None, NaN or infinite: failed seeds are counted, not averaged.
    """
    numbers = finite_numbers(values, at_least=1)  # type: ignore[arg-type]  # None becomes NaN, which is refused
    low, high = student_t_interval(numbers) if len(numbers) > 1 else (None, None)
    return Metric(value=float(numbers.mean()), low=low, high=high, n=len(numbers))


def _class_numbers(name: str, values: npt.ArrayLike, length: int, num_classes: int) -> npt.NDArray[np.int64]:
    """The values as int64 (length,), each a class. Raises ConfigError: a NaN cast to an integer would be a class."""
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"{name} are {array.dtype}; give integers, one class per image.")
    if array.shape != (length,) or length == 0:
        raise ConfigError(f"{name} have shape {array.shape}; give one per test image, as many as labels ({length},).")
    if array.min() < 0 or array.max() >= num_classes:
        raise ConfigError(f"{name} span [{array.min()}, {array.max()}]; give classes 0 to {num_classes - 1}.")
    return array.astype(np.int64)
