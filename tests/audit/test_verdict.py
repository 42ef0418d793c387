"""The verdict of a scan, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blto.audit.verdict import Outcome, Verdict, clean_encoders_needed, drilled, judge


def outcome(score: float, clean: Sequence[float], planted: Sequence[float] = (), title: str = "D") -> Outcome:
    return Outcome("d", title, score, None, {}, tuple(clean), tuple(planted))


def ladder(count: int) -> list[float]:
    return [step / count for step in range(count)]


def test_a_score_beyond_all_of_nineteen_clean_ones_is_suspect_and_beyond_eighteen_says_nothing() -> None:
    found = judge([outcome(2.0, ladder(19))], alpha=0.05)
    assert found.verdict is Verdict.SUSPECT
    assert found.p_value == pytest.approx(0.05)
    assert "0 of 19 clean encoders score as high" in found.reasons[0]
    found = judge([outcome(2.0, ladder(18))], alpha=0.05)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "give at least 19 of them" in found.reasons[0]


def test_an_ordinary_score_is_clean_where_enough_clean_ones_are_there() -> None:
    found = judge([outcome(0.5, ladder(40))], alpha=0.05)
    assert found.verdict is Verdict.CLEAN
    assert found.p_value == pytest.approx(21 / 41)
    assert found.power is None
    assert "has not been measured" in found.reasons[1]


def test_a_clean_encoder_with_the_same_score_counts_against_a_finding() -> None:
    assert judge([outcome(1.0, [1.0, *ladder(39)])], alpha=0.05).p_value == pytest.approx(2 / 41)
    assert judge([outcome(1.0, [1.0, *ladder(19)])], alpha=0.05).verdict is not Verdict.SUSPECT


def test_without_a_clean_encoder_nothing_is_ever_clean() -> None:
    for outcomes in ([], [outcome(0.0, [])], [outcome(9.0, [])]):
        found = judge(outcomes, alpha=0.05)
        assert (found.verdict, found.p_value, found.power) == (Verdict.INCONCLUSIVE, None, None)
        assert "no clean encoder" in found.reasons[0]
        assert "at 0.05 takes at least 19 of them" in found.reasons[0]
    assert "at least 39 of them" in judge([outcome(0.0, []), outcome(1.0, [])], alpha=0.05).reasons[0]


def test_several_detectors_pay_for_their_number() -> None:
    one, other = outcome(2.0, ladder(19), title="one"), outcome(0.3, ladder(19), title="other")
    found = judge([other, one], alpha=0.05)
    assert found.p_value == pytest.approx(0.1)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "at least 39" in found.reasons[0]
    found = judge([outcome(0.3, ladder(39), title="other"), outcome(2.0, ladder(39), title="one")], alpha=0.05)
    assert found.verdict is Verdict.SUSPECT
    assert found.reasons[0].startswith("one: "), "the reason is that of the detector with the smallest p-value"


@pytest.mark.parametrize(("detectors", "alpha", "needed"), [(1, 0.05, 19), (2, 0.05, 39), (1, 0.01, 99), (1, 0.5, 1)])
def test_how_many_clean_encoders_a_finding_costs(detectors: int, alpha: float, needed: int) -> None:
    assert clean_encoders_needed(detectors, alpha) == needed


def test_a_drill_says_how_often_the_same_rule_finds_a_planted_encoder() -> None:
    planted = [2.0, 2.0, 2.0, 0.5]
    power = drilled([outcome(0.1, ladder(19), planted)], 0.05)
    assert power is not None
    assert power[0] == 0.75
    assert power[1] < 0.75 < power[2]
    assert power[3] == 4
    assert drilled([outcome(0.1, ladder(19))], 0.05) is None
    found = judge([outcome(0.1, ladder(19), planted)], alpha=0.05)
    assert found.verdict is Verdict.CLEAN
    assert found.power == power
    assert "found 75% of 4 encoders" in found.reasons[1]


def test_nothing_found_by_a_scan_that_fails_its_drill_is_inconclusive() -> None:
    found = judge([outcome(0.1, ladder(19), [0.2, 0.3, 2.0])], alpha=0.05)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "found 33% of 3 encoders" in found.reasons[0]
    found = judge([outcome(2.0, ladder(19), [0.2, 0.3])], alpha=0.05)
    assert found.verdict is Verdict.SUSPECT, "a finding stands, whatever else the scan may miss"


def test_the_exit_codes_are_those_of_the_contract() -> None:
    assert [verdict.exit_code for verdict in (Verdict.CLEAN, Verdict.SUSPECT, Verdict.INCONCLUSIVE)] == [0, 1, 8]
