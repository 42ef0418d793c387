"""From histograms of scores to a verdict: arithmetic and words alone.

Suspects and clean images are put together, and the highest scores of all are looked at: do the suspects have more of
them than their share? Which images those are is decided without knowing who is who. So, where the suspects are clean
and could as well have been any others of the lot, the number of clean images among them is hypergeometric, whatever the
scores and however they depend on one another, and the p-value is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from blto.audit.verdict import ENOUGH_POWER, Judgement, Verdict
from blto.evaluation.statistics import wilson

SHARES = (0.001, 0.01, 0.05)
"""Of all images, that are looked at: few find few poisons among many images, many those that hardly stand out."""
STEPS = 64
"""Places of a histogram by which a score doubles: they are 1% apart."""


def place_of(score: float) -> int:
    """Where a score stands in a histogram."""
    return round(STEPS * float(np.log2(1 + score)))


def score_at(place: int) -> float:
    """The lowest score at a place."""
    return max(0.0, float(2 ** ((place - 0.5) / STEPS)) - 1)


def few_of(found: int, clean: int, suspects: int, drawn: int) -> float:
    """The chance of at most `found` clean ones among `drawn` of `clean` + `suspects`: a tail of the hypergeometric."""
    least, most = max(0, drawn - suspects), min(found, clean, drawn)
    if most < least:
        return 0.0
    number = np.arange(least, most + 1)

    def choose(n: int, k: np.ndarray) -> np.ndarray:
        return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))

    logs = choose(clean, number) + choose(suspects, drawn - number) - choose(clean + suspects, np.array(drawn))
    return float(min(1.0, np.exp(logs).sum()))


def reachable(clean: int, suspects: int, share: float) -> float:
    """The p-value where as few clean images as can be are among the highest `share` of all."""
    drawn = int(np.ceil(share * (clean + suspects)))
    return few_of(max(0, drawn - suspects), clean, suspects, drawn)


@dataclass(frozen=True)
class Level:
    """What one detector shows where a share of all images is looked at.

    Attributes:
        share: about how many of all are looked at; where scores are equal it may be less or more.
        threshold: the lowest score that is.
        suspects, clean: how many of either are.
        p_value: that no more clean ones would be, were the suspects clean.
    """

    share: float
    threshold: float
    suspects: int
    clean: int
    p_value: float


def usable_shares(clean: int, suspects: int, detectors: int, alpha: float) -> list[float]:
    """The shares at which `alpha` can be reached at all; that depends on how many images there are alone."""
    tests = detectors * len(SHARES)
    return [share for share in SHARES if tests * reachable(clean, suspects, share) <= alpha]


def look(suspects: Mapping[int, int], clean: Mapping[int, int], shares: Sequence[float]) -> tuple[Level, ...]:
    """One detector at each of the shares, from histograms. Where scores are equal, as nearly that share as there is."""
    places = sorted({*suspects, *clean}, reverse=True)
    above = [np.cumsum([side.get(place, 0) for place in places]) for side in (suspects, clean)]
    if not places:
        return ()
    total = above[0][-1] + above[1][-1]
    levels = []
    for share in shares:
        nearest = int(np.abs(np.log((above[0] + above[1]) / (share * total))).argmin())
        one, other = (int(side[nearest]) for side in above)
        chance = few_of(other, int(above[1][-1]), int(above[0][-1]), one + other)
        levels.append(Level(share, score_at(places[nearest]), one, other, chance))
    return tuple(levels)


@dataclass(frozen=True)
class Found:
    """What one detector found.

    Attributes:
        detector: its name in DEFENSES.
        title: for readers.
        levels: none without clean images, or where there are too few.
        top: name and score of the most suspicious images, the first one most.
        seconds: of computing time, over all workers.
    """

    detector: str
    title: str
    levels: tuple[Level, ...]
    top: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0

    @property
    def best(self) -> Level | None:
        """The level with the smallest p-value."""
        return min(self.levels, key=lambda level: level.p_value, default=None)


@dataclass(frozen=True)
class Drill:
    """How often the same scan finds images that blto has poisoned.

    Attributes:
        attack: for readers.
        rate: share of the images that was poisoned.
        found, runs: how often, of how many.
        suspects, clean: images in each run.
    """

    attack: str
    rate: float
    found: int
    runs: int
    suspects: int
    clean: int

    @property
    def power(self) -> tuple[float, float, float, int]:
        """The share found, its 95% interval, and of how many runs."""
        return (self.found / self.runs, *wilson(self.found, self.runs), self.runs)


def smallest_p(found: Sequence[Found]) -> float | None:
    """Over detectors and shares, times their number; None where there are no levels."""
    values = [level.p_value for each in found for level in each.levels]
    return min(1.0, len(values) * min(values)) if values else None


def judge(
    found: Sequence[Found],
    *,
    images: tuple[int, int],
    alpha: float,
    unlike: str | None = None,
    drills: Sequence[Drill] = (),
) -> Judgement:
    """The verdict.

    Args:
        found: by each detector.
        images: how many suspects and how many clean ones were compared.
        alpha: error rate for clean suspects, over all detectors.
        unlike: why the clean images are of another kind than the suspects, as a sentence; None where they are not.
        drills: the measured power.
    """
    suspects, clean = images
    worst = min(drills, key=lambda drill: drill.power[0], default=None)
    power = None if worst is None else worst.power
    if not clean:
        reason = "There are no clean images of the same kind to compare with, so no score can be called high."
        return Judgement(Verdict.INCONCLUSIVE, None, (reason,))
    p_value = smallest_p(found)
    if unlike is not None:
        return Judgement(Verdict.INCONCLUSIVE, p_value, (unlike,), power)
    if p_value is None:
        reason = (
            f"With {suspects} suspects and {clean} clean images p cannot fall to {alpha:g}, so nothing can be found; "
            f"give {_needed(suspects, len(found), alpha)}."
        )
        return Judgement(Verdict.INCONCLUSIVE, None, (reason,), power)
    level, best = min(((level, each) for each in found for level in each.levels), key=lambda pair: pair[0].p_value)
    compared = (
        f"{best.title}: {level.suspects:,} of {suspects:,} suspects and {level.clean:,} of {clean:,} clean images "
        f"score {level.threshold:.3g} or more"
    )
    if p_value <= alpha:
        excess = level.suspects - level.clean * suspects / clean
        reason = (
            f"{compared} (p = {p_value:.3g}, at most {alpha:g}): about {excess:,.0f} images more than there should."
        )
        return Judgement(Verdict.SUSPECT, p_value, (reason,), power)
    if worst is not None and worst.power[0] < ENOUGH_POWER:
        shown = f"{worst.attack} at {worst.rate:g} in {worst.found} of {worst.runs} drills"
        reason = f"{compared}, but the same scan found {shown}."
        return Judgement(Verdict.INCONCLUSIVE, p_value, (reason,), power)
    said = "How often this scan finds poisons has not been measured; a drill does it."
    if drills:
        shown = "; ".join(f"{drill.attack} in {drill.found} of {drill.runs}" for drill in drills)
        said = f"At a rate of {drills[0].rate:g} the same scan found, of sets that blto poisoned: {shown}."
    return Judgement(Verdict.CLEAN, p_value, (f"{compared} (p = {p_value:.3g}).", said), power)


def _needed(suspects: int, detectors: int, alpha: float) -> str:
    """How many clean images would do, in words."""
    for clean in (2**power for power in range(1, 40)):
        if usable_shares(clean, suspects, detectors, alpha):
            return f"{clean} clean images"
    return "more suspects"
