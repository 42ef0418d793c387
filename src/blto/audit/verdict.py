"""From scores to a verdict: arithmetic and words alone, so that every rule can be tested by itself.

suspect       a detector's score lies so far above those of clean encoders that chance hardly explains it,
              or the file itself is a finding (it holds code, or weights that are no numbers)
clean         nothing of the kind, beside enough clean encoders; how much that says, only a drill can tell
inconclusive  nothing could have been found: too few clean encoders, or a drill that the scan failed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from blto.evaluation.detection import bonferroni, rank_p_value, smallest_p_value
from blto.evaluation.statistics import wilson

ENOUGH_POWER = 0.5
"""Share of planted encoders that a drill has to find; with less of it, nothing found says nothing."""


class Verdict(StrEnum):
    """What a scan says."""

    CLEAN = "clean"
    SUSPECT = "suspect"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return {"clean": 0, "suspect": 1, "inconclusive": 8}[self.value]


@dataclass(frozen=True)
class Outcome:
    """What one detector made of the suspect, beside encoders of which the answer is known.

    Attributes:
        detector: its name in DEFENSES.
        title: for readers.
        score: of the suspect; larger is more suspicious.
        flagged: by the method's own threshold; None where it has none.
        measures: see `Inspection`.
        clean: scores of clean encoders of the same family.
        planted: scores of the drill's encoders, each a clean one that blto has tampered with.
        seconds: for the suspect.
        references: how many further clean encoders it learned from.
    """

    detector: str
    title: str
    score: float
    flagged: bool | None
    measures: Mapping[str, float] = field(default_factory=dict)
    clean: tuple[float, ...] = ()
    planted: tuple[float, ...] = ()
    seconds: float = 0.0
    references: int = 0

    @property
    def p_value(self) -> float | None:
        """That a clean encoder scores as high, by rank among the clean ones; None without any."""
        return rank_p_value(self.score, self.clean) if self.clean else None


@dataclass(frozen=True)
class Judgement:
    """The verdict and its reasons.

    Attributes:
        verdict: see the module.
        p_value: the smallest over the detectors, times their number; None where there is no clean encoder.
        reasons: sentences.
        power: share of the drill's encoders that the same rule finds, its interval, and how many there were.
    """

    verdict: Verdict
    p_value: float | None
    reasons: tuple[str, ...]
    power: tuple[float, float, float, int] | None = None


def judge(outcomes: Sequence[Outcome], *, alpha: float) -> Judgement:
    """The verdict of several detectors at the error rate `alpha` for a clean encoder, over all of them together."""
    known = [outcome for outcome in outcomes if outcome.clean]
    if not known:
        needed = clean_encoders_needed(max(1, len(outcomes)), alpha)
        reason = (
            "There is no clean encoder of the same family to compare with, so no score can be called high, whatever it "
            f"is. A finding at {alpha:g} takes at least {needed} of them: other seeds of the same recipe."
        )
        return Judgement(Verdict.INCONCLUSIVE, None, (reason,))
    p_value = min(bonferroni([rank_p_value(outcome.score, outcome.clean) for outcome in known]))
    reachable = min(1.0, len(known) * smallest_p_value(min(len(outcome.clean) for outcome in known)))
    power = drilled(known, alpha)
    least = min(known, key=lambda outcome: rank_p_value(outcome.score, outcome.clean))
    beaten = sum(score >= least.score for score in least.clean)
    compared = f"{least.title}: {beaten} of {len(least.clean)} clean encoders score as high or higher"
    if p_value <= alpha:
        return Judgement(Verdict.SUSPECT, p_value, (f"{compared} (p = {p_value:.3g}, at most {alpha:g}).",), power)
    if reachable > alpha:
        needed = clean_encoders_needed(len(known), alpha) + max(outcome.references for outcome in known)
        reason = (
            f"{compared}. With so few clean encoders p cannot fall below {reachable:.3g}, so nothing can be found at "
            f"{alpha:g}; give at least {needed} of them."
        )
        return Judgement(Verdict.INCONCLUSIVE, p_value, (reason,), power)
    if power is not None and power[0] < ENOUGH_POWER:
        reason = f"{compared}, but the same scan found {power[0]:.0%} of {power[3]} encoders that blto tampered with."
        return Judgement(Verdict.INCONCLUSIVE, p_value, (reason,), power)
    found = "How often this scan finds a backdoor has not been measured; a drill does it."
    if power is not None:
        found = f"The same scan found {power[0]:.0%} of {power[3]} encoders that blto tampered with."
    return Judgement(Verdict.CLEAN, p_value, (f"{compared} (p = {p_value:.3g}).", found), power)


def drilled(outcomes: Sequence[Outcome], alpha: float) -> tuple[float, float, float, int] | None:
    """The power of the rule in `judge`: share of planted encoders found, and its 95% interval; None without a drill."""
    count = min((len(outcome.planted) for outcome in outcomes), default=0)
    if not count:
        return None
    found = 0
    for number in range(count):
        values = [rank_p_value(outcome.planted[number], outcome.clean) for outcome in outcomes]
        found += min(bonferroni(values)) <= alpha
    low, high = wilson(found, count)
    return found / count, low, high, count


def clean_encoders_needed(detectors: int, alpha: float) -> int:
    """The smallest number of clean encoders with which so many detectors together can reach `alpha`."""
    return max(1, math.ceil(detectors / alpha - 1e-9) - 1)  # 1 / (1 + count) is the smallest p-value
