"""How well scores tell the suspicious from the clean, and how surprising one score is.

Scores are larger for what is more suspicious; positives are those that should be found. The unit is whatever has a
score: an encoder, or an image (an interval over the images of one encoder says nothing about other encoders). Every
function raises ConfigError for an empty group and for a score that is missing, NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from blto.errors import ConfigError
from blto.evaluation.metrics import rate
from blto.evaluation.statistics import Interval, finite_numbers
from blto.files.text import show
from blto.records import Metric
from blto.runtime.seeds import numpy_generator

Numbers: TypeAlias = Sequence[float] | npt.NDArray[Any]
Counts = npt.NDArray[np.int64]

RESAMPLES = 2000
BLOCK = 2**15  # scores drawn at a time: they stay in the cache


def auroc(positives: Numbers, negatives: Numbers) -> Metric:
    """The chance that a positive scores above a negative, ties counting half, and its 95% interval.

    The interval, for groups of independent members, is that of a stratified bootstrap: percentiles of 2,000 resamples,
    always the same. But a bootstrap takes what it has not seen for impossible, and would make [1, 1] of complete
    separation. So where the wrong pairs, or the right ones, weigh less than one member of the smaller group does, or
    where all scores are equal, it is the interval of Clopper and Pearson (Biometrika 1934, vol. 26, p. 404) for this
    share of m trials, m the size of the smaller group. At 0 and 1 that holds for any two distributions: m pairs with no
    member in common are independent, so complete separation has a chance of at most AUROC^m. Ten victims above all
    clean encoders give [0.025^(1/10), 1] = [0.69, 1]. In between, all pairs together vary no more than m such pairs do.

    In simulations (3 to 100 positives, 20 to 1,000 negatives, AUROC 0.5 to 0.995) 90% to 100% held the truth.

    Returns:
        n is the number of all scores, of both groups.
    """
    found, clean = _merged(*_counts(_scores("positives", positives), _scores("negatives", negatives)))
    smaller, total = int(min(found.sum(), clean.sum())), 2 * int(found.sum()) * int(clean.sum())
    wins = int(_wins(found, clean))
    area = wins / total
    if len(found) == 1 or min(wins, total - wins) * smaller < total:
        low, high = _clopper_pearson(area, smaller)
    else:
        low, high = _bootstrap(found, clean)
    return Metric(value=area, low=min(low, area), high=max(high, area), n=int(found.sum() + clean.sum()))


def average_precision(scores: Numbers, is_positive: npt.ArrayLike) -> float:
    """The area under the curve of precision against recall: the mean precision at the rank of each positive.

    Equal scores share one rank. Precision depends on the share of positives: see `expected_average_precision`.

    Raises:
        ConfigError: no positive, no negative, or lengths that differ.
    """
    numbers, mask = _marked(scores, is_positive)
    return expected_average_precision(numbers[mask], numbers[~mask], float(mask.mean()))


def expected_average_precision(positives: Numbers, negatives: Numbers, prevalence: float) -> float:
    """The average precision where a share `prevalence` is positive, from groups drawn in any other proportion.

    Each positive weighs prevalence / their number, each negative (1 - prevalence) / theirs. It flatters where negatives
    are few: n of them cannot show false alarms rarer than 1/n, which decide at a low prevalence. Give at least some
    ten times 1 / prevalence.

    Raises:
        ConfigError: a prevalence outside (0, 1).
    """
    if not 0 < prevalence < 1:
        raise ConfigError(f"prevalence {prevalence}: give the share of positives, strictly between 0 and 1.")
    counts = _counts(_scores("positives", positives), _scores("negatives", negatives))
    hits, alarms = (np.cumsum(group[::-1]) / group.sum() for group in counts)
    precision = prevalence * hits / (prevalence * hits + (1 - prevalence) * alarms)
    return float(np.sum(np.diff(hits, prepend=0) * precision))


def tpr_at_lowest_fpr(positives: Numbers, thresholds_from: Numbers, negatives: Numbers) -> tuple[Metric, Metric]:
    """False alarms and hits where the threshold is the largest score of some clean ones; to flag is to score above it.

    Args:
        positives: should be flagged.
        thresholds_from: clean, one half; n of them promise a false alarm rate of 1 / (n + 1) on average, not each time.
        negatives: clean, the other half, which the threshold has not seen.

    Returns:
        The rates among negatives and among positives, with Wilson intervals, which take the threshold for given.
    """
    threshold = _scores("thresholds_from", thresholds_from).max()
    clean, found = _scores("negatives", negatives), _scores("positives", positives)
    return rate(clean > threshold), rate(found > threshold)


def precision_at(scores: Numbers, is_positive: npt.ArrayLike, count: int) -> float:
    """The share of positives among the `count` highest scores; of equal ones at the border, what a fair draw gives.

    Raises:
        ConfigError: no positive, no negative, lengths that differ, or a count that is not 1 to their number.
    """
    numbers, mask = _marked(scores, is_positive)
    if not 1 <= count <= len(numbers):
        raise ConfigError(f"count {count} of {len(numbers)} scores: give 1 to {len(numbers)}.")
    border = np.sort(numbers)[-count]
    above, level = numbers > border, numbers == border
    places = count - np.count_nonzero(above)
    return float((np.count_nonzero(mask & above) + places * mask[level].mean()) / count)


def rank_p_value(score: float, null: Numbers, *, sides: int = 1) -> float:
    """How likely a score at least this large is among clean ones: (1 + #{null >= score}) / (1 + n). Equal ones count.

    Exact where the suspect, if clean, could as well have been any one of the n (Phipson and Smyth, SAGMB 2010, vol. 9,
    article 39): same family, data and recipe. It goes no lower than `smallest_p_value`.

    Args:
        sides: 1, or 2, which doubles the smaller tail, for scores that may be suspiciously small as well.
    """
    (value,), clean = _scores("score", [score]), _scores("null", null)
    smallest_p_value(len(clean), sides)  # refuses other sides
    tails = [np.count_nonzero(clean >= value), np.count_nonzero(clean <= value)]
    return min(1.0, sides * (1 + int(min(tails[:sides]))) / (1 + len(clean)))


def smallest_p_value(n: int, sides: int = 1) -> float:
    """What `rank_p_value` returns for a score beyond all n clean ones. Raises ConfigError for no n, or wrong sides."""
    if n < 1 or sides not in (1, 2):
        raise ConfigError(f"{n} clean scores, {sides} sides: give at least 1 score, and 1 or 2 sides.")
    return sides / (1 + n)


def bonferroni(p_values: Numbers) -> npt.NDArray[np.float64]:
    """Each p-value times their number, at most 1. Raises ConfigError for one outside [0, 1]."""
    numbers = _scores("p_values", p_values)
    if numbers.min() < 0 or numbers.max() > 1:
        raise ConfigError(f"p_values span [{numbers.min()}, {numbers.max()}]; give numbers in [0, 1].")
    return np.minimum(1.0, numbers * len(numbers))


def _scores(name: str, values: Numbers) -> npt.NDArray[np.float64]:
    try:
        return finite_numbers(values, at_least=1)
    except ConfigError as error:
        shown = show(repr(values), 60)
        raise ConfigError(f"{name}: {shown}; give a list of at least one number, none NaN or infinite.") from error


def _marked(scores: Numbers, is_positive: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    numbers, mask = _scores("scores", scores), np.asarray(is_positive)
    if mask.dtype != np.bool_ or mask.shape != numbers.shape:
        raise ConfigError(f"is_positive is {mask.dtype} {mask.shape}; give a boolean each for {len(numbers)} scores.")
    if mask.all() or not mask.any():
        raise ConfigError(f"{mask.sum()} of {len(mask)} scores are positives; give at least one of either kind.")
    return numbers, mask


def _counts(positives: npt.NDArray[Any], negatives: npt.NDArray[Any]) -> tuple[Counts, Counts]:
    """How many of either group lie at each value, from low to high."""
    values, places = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
    found, clean = np.split(places, [len(positives)])
    return np.bincount(found, minlength=len(values)), np.bincount(clean, minlength=len(values))


def _merged(found: Counts, clean: Counts) -> tuple[Counts, Counts]:
    """Neighboring values that only one group takes as one: what is above what stays the same."""
    kind = (found > 0) + 2 * (clean > 0)
    starts = np.flatnonzero(np.concatenate([[True], (kind[1:] != kind[:-1]) | (kind[1:] == 3)]))
    return np.add.reduceat(found, starts), np.add.reduceat(clean, starts)


def _wins(found: Counts, clean: Counts) -> Counts:
    """Twice the number of pairs in which the positive is above, a tie counting half; over the last axis."""
    return (found * (2 * np.cumsum(clean, axis=-1) - clean)).sum(axis=-1)  # type: ignore[no-any-return]


def _bootstrap(found: Counts, clean: Counts) -> Interval:
    draw, cells = numpy_generator(0, "defense", "auroc"), len(found)
    members = [np.repeat(np.arange(cells), group) for group in (found, clean)]
    rows, areas = max(1, BLOCK // max(map(len, members))), []
    for start in range(0, RESAMPLES, rows):
        offsets = cells * np.arange(min(rows, RESAMPLES - start))[:, None]
        drawn = [group[draw.integers(len(group), size=(len(offsets), len(group)))] + offsets for group in members]
        counts = [np.bincount(d.ravel(), minlength=offsets.size * cells).reshape(-1, cells) for d in drawn]
        areas.append(_wins(*counts) / (2 * len(members[0]) * len(members[1])))
    low, high = np.percentile(np.concatenate(areas), [2.5, 97.5])
    return float(low), float(high)


def _clopper_pearson(share: float, m: int) -> Interval:
    low = float(betaincinv(share * m, (1 - share) * m + 1, 0.025)) if share > 0 else 0.0
    return low, float(betaincinv(share * m + 1, (1 - share) * m, 0.975)) if share < 1 else 1.0
