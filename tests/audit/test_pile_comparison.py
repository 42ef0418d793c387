"""The arithmetic of a scan of images: the exact test, which levels there are, and each rule of the verdict."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom

from blto.audit.pile.comparison import (
    SHARES,
    Drill,
    Found,
    Level,
    few_of,
    judge,
    look,
    place_of,
    reachable,
    score_at,
    smallest_p,
    usable_shares,
)
from blto.audit.verdict import Verdict


def test_the_tail_is_the_hypergeometric_one() -> None:
    for clean, suspects, drawn in ((5, 9, 4), (5, 3, 6), (9000, 50000, 59), (100, 100, 200)):
        for found in range(min(clean, drawn) + 1):
            expected = hypergeom.cdf(found, clean + suspects, clean, drawn)
            assert few_of(found, clean, suspects, drawn) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert few_of(0, 5, 3, 6) == 0, "three of six have to be clean"


def test_the_p_value_is_the_share_of_all_divisions() -> None:
    scores = [9, 9, 8, 5, 5, 5, 2, 1]
    for clean in combinations(range(8), 3):
        sides = (Counter(scores[i] for i in range(8) if i not in clean), Counter(scores[i] for i in clean))
        (level,) = look(*sides, [0.35])  # 2.8 images: 8 and more
        assert level.suspects + level.clean == 3
        as_few = [sum(i < 3 for i in other) <= level.clean for other in combinations(range(8), 3)]
        assert level.p_value == pytest.approx(np.mean(as_few))


def test_no_more_clean_piles_are_called_suspect_than_asked_for() -> None:
    """Also where images come in clusters that score alike, as near-duplicates do, and in any number of them."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(400):
        clusters = rng.geometric(0.2, 400)
        scores = np.repeat(rng.integers(0, 300, len(clusters)), clusters)
        rng.shuffle(scores)
        sides = (Counter(scores[:600].tolist()), Counter(scores[600:].tolist()))
        shares = usable_shares(sides[1].total(), 600, 2, 0.05)
        assert shares
        found = [Found("a", "A", look(*sides, shares)), Found("b", "B", look(*sides, shares))]
        p_value = smallest_p(found)
        called += p_value is not None and p_value <= 0.05
    assert called <= 31  # 0.05 of 400 and two and a half standard errors


def test_equal_scores_are_taken_together_and_as_nearly_the_share_as_can_be() -> None:
    suspects, clean = Counter({0: 960, 50: 40}), Counter({0: 1000})
    for share in (0.01, 0.05):
        (level,) = look(suspects, clean, [share])
        assert (level.suspects, level.clean, level.threshold) == (40, 0, score_at(50))
        assert level.p_value < 1e-11
    (level,) = look(suspects + Counter({90: 1}), clean, [0.05])
    assert level.suspects == 41, "one image is not five in a hundred"
    (level,) = look(Counter({0: 1000}), clean, [0.01])
    assert (level.suspects, level.clean) == (1000, 1000)
    assert level.p_value == pytest.approx(1.0)
    assert look(Counter(), Counter(), SHARES) == ()


def test_levels_that_cannot_reach_alpha_are_left_out() -> None:
    assert usable_shares(9000, 50000, 2, 0.05) == list(SHARES)
    assert usable_shares(200, 50000, 2, 0.05) == [0.05]
    assert usable_shares(10, 50000, 2, 0.05) == []
    assert usable_shares(1000, 3, 2, 0.05) != [], "three suspects that are all among the highest"
    assert usable_shares(30, 1, 1, 0.05) == [], "it is among the two highest of 31 too often"
    assert reachable(100, 100, 0.05) == pytest.approx(float(hypergeom.pmf(0, 200, 100, 10)))


def test_places_are_a_percent_apart() -> None:
    scores = np.geomspace(1, 1e6, 1000)
    below = (1 + scores) / [1 + score_at(place_of(score)) for score in scores]
    assert below.min() > 1 - 1e-9
    assert below.max() < 1.011
    assert place_of(0) == 0
    assert score_at(0) == 0
    assert [place_of(number) for number in range(60)] == sorted({place_of(number) for number in range(60)})


LEVEL = Level(0.01, 50, 434, 0, 1e-20)
NULL = Level(0.01, 50, 100, 20, 0.5)


def judged(*levels: Level, **more: Any) -> Any:
    given = {"images": (50_000, 9_000), "alpha": 0.05, **more}
    return judge([Found("a", "Detector A", levels)], **given)


def test_more_than_their_share_of_high_scores_makes_images_suspect() -> None:
    found = judged(LEVEL, NULL)
    assert (found.verdict, found.verdict.exit_code) == (Verdict.SUSPECT, 1)
    assert found.p_value == pytest.approx(2e-20)
    assert "434 of 50,000 suspects and 0 of 9,000" in found.reasons[0]
    assert "about 434 images more" in found.reasons[0]


def test_the_p_value_is_corrected_for_every_look() -> None:
    assert judged(Level(0.01, 1, 1, 1, 0.02), NULL, NULL).verdict is Verdict.CLEAN
    assert judged(Level(0.01, 1, 1, 1, 0.016), NULL, NULL).verdict is Verdict.SUSPECT


def test_without_clean_images_or_with_too_few_it_is_inconclusive() -> None:
    found = judge([Found("a", "A", ())], images=(50_000, 0), alpha=0.05)
    assert (found.verdict, found.p_value, found.verdict.exit_code) == (Verdict.INCONCLUSIVE, None, 8)
    found = judge([Found("a", "A", ())], images=(50_000, 10), alpha=0.05)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "give 128 clean images" in found.reasons[0]
    assert usable_shares(128, 50_000, 1, 0.05)
    assert not usable_shares(64, 50_000, 1, 0.05)


def test_clean_images_of_another_kind_are_never_a_null() -> None:
    for levels in ([LEVEL], [NULL]):
        found = judged(*levels, unlike="The clean images are drawings.")
        assert found.verdict is Verdict.INCONCLUSIVE
        assert found.reasons == ("The clean images are drawings.",)


def test_a_drill_that_finds_too_little_makes_nothing_found_inconclusive() -> None:
    drills = [Drill("CTRL", 0.01, 10, 10, 4096, 4096), Drill("SSL-Backdoor", 0.01, 4, 10, 4096, 4096)]
    found = judged(NULL, drills=drills)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "SSL-Backdoor at 0.01 in 4 of 10 drills" in found.reasons[0]
    assert judged(LEVEL, drills=drills).verdict is Verdict.SUSPECT
    found = judged(NULL, drills=drills[:1])
    assert found.verdict is Verdict.CLEAN
    assert found.power == drills[0].power
    assert found.power[0] == 1
    assert found.power[1] == pytest.approx(0.722, abs=1e-3)
    assert "CTRL in 10 of 10" in found.reasons[1]


def test_clean_without_a_drill_says_that_the_power_is_not_known() -> None:
    found = judged(NULL)
    assert (found.verdict, found.power) == (Verdict.CLEAN, None)
    assert "has not been measured" in found.reasons[1]
