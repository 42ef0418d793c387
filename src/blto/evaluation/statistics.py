"""Intervals and tests for fractions and for seeds. Torch-free.

Within a run the unit is a test image (`wilson`, `paired_difference_interval`, `lift_interval`); that says nothing about
the spread between runs, where the unit is a seed (`student_t_interval`, `sign_flip_test`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

from blto.errors import ConfigError

Interval = tuple[float, float]

MAX_SIGN_FLIPS = 24  # 2^23 sums are enumerated, 64 MiB


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The score interval of a binomial proportion (Wilson, JASA 1927, vol. 22, p. 209).

    Args:
        successes: number of successes, 0 to n.
        n: number of trials, at least 1.
        level: nominal coverage, in (0, 1).

    Returns:
        Low and high, within [0, 1].

    Raises:
        ConfigError: counts or level out of range.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(f"{successes} successes of {n}: give 0 <= successes <= n with n at least 1.")
    z, p = _normal_quantile(level), successes / n
    shrink = 1 / (1 + z * z / n)
    center = shrink * (p + z * z / (2 * n))
    half = shrink * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends one limit is exactly 0 or 1; rounding must not leave it a little outside or inside.
    return (0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half)


def student_t_interval(values: Sequence[float] | npt.NDArray[Any], level: float = 0.95) -> Interval:
    """The interval of a mean over seeds: mean -+ t * s / sqrt(n) with n - 1 degrees of freedom.

    Args:
        values: one finite number per seed, at least 2.
        level: nominal coverage, in (0, 1).

    Raises:
        ConfigError: fewer than 2 values, or one that is not finite.
    """
    numbers = finite_numbers(values, at_least=2)
    _check_level(level)
    n = len(numbers)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(numbers.std(ddof=1)) / math.sqrt(n)
    mean = float(numbers.mean())
    return (mean - half, mean + half)


def paired_difference_interval(gained: int, lost: int, n: int, level: float = 0.95) -> Interval:
    """The interval of a difference of two proportions measured on the same n images: p1 - p2 = (gained - lost) / n.

    The Wald interval after adding one to each discordant count (Bonett and Price, J. Educ. Behav. Stat. 2012,
    vol. 37, p. 479): closed form, and unlike Wald and Newcombe's method 10 it does not shrink to a point where no
    image, or every image, is discordant. It always contains (gained - lost) / n.

    Args:
        gained: images that are a success under the first condition only.
        lost: images that are a success under the second condition only.
        n: all images, at least 1.
        level: nominal coverage, in (0, 1).

    Returns:
        Low and high, within [-1, 1].

    Raises:
        ConfigError: counts or level out of range.
    """
    if min(gained, lost) < 0 or n < 1 or gained + lost > n:
        raise ConfigError(f"{gained} gained and {lost} lost of {n} pairs: give counts of at least 0 that sum to <= n.")
    p1, p2 = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _normal_quantile(level) * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return (max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half))


def lift_interval(
    hits: npt.NDArray[np.bool_],
    first: npt.NDArray[np.bool_],
    second: npt.NDArray[np.bool_],
    level: float = 0.95,
) -> Interval:
    """The interval of a lift, mean(hits) - max(mean(first), mean(second)), all three on the same images.

    The lift is the smaller of two paired differences, so its limits are the smaller low limit and the smaller high one.
    That covers with at least `level` (in normal theory, for any gap and any correlation between the two), although
    which reference is the larger is itself estimated: with references far apart each limit misses alpha / 2 of the
    time; with tied ones the high limit misses up to alpha, but the low one only when both intervals lie too high.

    Args:
        hits: bool (n,), whether the trigger took each image to the target.
        first, second: bool (n,), the innocent explanations of the same images.
        level: nominal coverage, in (0, 1).

    Raises:
        ConfigError: no image, not boolean, or lengths that differ.
    """
    arrays = [np.asarray(array) for array in (hits, first, second)]
    if any(a.dtype != np.bool_ or a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        shown = ", ".join(f"{a.dtype} {a.shape}" for a in arrays)
        raise ConfigError(f"lift of {shown}; give three boolean arrays of one length.")
    taken, *references = arrays
    intervals = [
        paired_difference_interval(int((taken & ~other).sum()), int((other & ~taken).sum()), len(taken), level)
        for other in references
    ]
    return (min(low for low, _ in intervals), min(high for _, high in intervals))


def sign_flip_test(differences: Sequence[float] | npt.NDArray[Any]) -> float:
    """The exact two-sided p-value of "the mean paired difference is 0": all 2^n sign patterns are enumerated.

    Valid wherever the differences are symmetric about 0 under the null (Fisher 1935, section 21). The smallest value it
    can return is 2 / 2^n, so fewer than 6 pairs can never reach 0.05. Zeros stay in; if all are zero, p is 1.

    Args:
        differences: one finite number per seed, 1 to 24 of them.

    Raises:
        ConfigError: none or too many values, or one that is not finite.
    """
    numbers = finite_numbers(differences, at_least=1)
    if len(numbers) > MAX_SIGN_FLIPS:
        raise ConfigError(f"{len(numbers)} differences; the exact test enumerates signs for at most {MAX_SIGN_FLIPS}.")
    # By symmetry the first sign may be held fixed. The first pattern flips nothing: it is the observed sum.
    sums = numbers[:1]
    for difference in numbers[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    # Fractions such as 0.1 + 0.2 and 0.3 are ties that rounding pulls apart.
    tolerance = 1e-9 * float(np.abs(numbers).sum())
    return float(np.mean(np.abs(sums) >= abs(sums[0]) - tolerance))


def finite_numbers(values: Sequence[float] | npt.NDArray[Any], *, at_least: int) -> npt.NDArray[np.float64]:
    """The values as float64 (n,). Raises ConfigError where there are too few, or where one is missing or not finite."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"values {values!r:.80} are not all numbers; give one number per seed.") from error
    if numbers.ndim != 1 or len(numbers) < at_least:
        raise ConfigError(f"values of shape {numbers.shape}; give a list of at least {at_least}, one number per seed.")
    if not np.isfinite(numbers).all():
        raise ConfigError(
            f"values {numbers.tolist()!r:.80} hold NaN or infinity; a failed seed has no value to average."
        )
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level {level}: give a coverage strictly between 0 and 1, such as 0.95.")


def _normal_quantile(level: float) -> float:
    """Half-width in standard deviations of a two-sided normal interval."""
    _check_level(level)
    return float(ndtri((1 + level) / 2))
