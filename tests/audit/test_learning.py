"""Detectors that learn from clean encoders, in a scan: who is learned from, who is compared with, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blto.audit import looking
from blto.audit.encoder import EncoderScan, scan_encoder
from blto.audit.page import render_page
from blto.audit.verdict import Outcome, Verdict, clean_encoders_needed, judge
from blto.defenses.base import Conditions, learn_from
from blto.errors import ConfigError
from blto.records import RunStore
from tests.factories import random_images, tiny_encoders

IMAGES = random_images(128, size=16).without_labels()
LEARNING: dict[str, Any] = {
    "name": "generator_inversion",
    "references": 2,
    "images": 100,
    "clusters": 2,
    "steps": 2,
    "moved": 10,
}
SIMPLE = {"name": "channel_outlier"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_encoders(tmp_path_factory.mktemp("encoders"), 6)


def scan(encoders: list[Path], store: Path, *detectors: dict[str, Any], **options: Any) -> EncoderScan:
    return scan_encoder(encoders[0], IMAGES, clean=encoders[1:], detectors=detectors, store=RunStore(store), **options)


def test_encoders_that_were_learned_from_are_not_compared_with(encoders: list[Path], tmp_path: Path) -> None:
    learning, simple = scan(encoders, tmp_path, LEARNING, SIMPLE).outcomes
    assert (len(learning.clean), learning.references) == (3, 2)
    assert (len(simple.clean), simple.references) == (5, 0)


def test_what_is_learned_is_learned_once_and_shared(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []

    def learning(*given: Any) -> Conditions:
        learned.append(1)
        return learn_from(*given)

    monkeypatch.setattr(looking, "learn_from", learning)
    scan(encoders, tmp_path, LEARNING)
    scan([encoders[5], *encoders[1:5]], tmp_path, LEARNING)
    assert len(learned) == 1
    scan([encoders[0], *reversed(encoders[1:])], tmp_path, LEARNING)
    assert len(learned) == 2, "other encoders to learn from teach something else"


def test_a_detector_with_too_few_to_learn_from_is_left_out(encoders: list[Path], tmp_path: Path) -> None:
    found = scan(encoders[:2], tmp_path, LEARNING, SIMPLE)
    assert [outcome.detector for outcome in found.outcomes] == ["channel_outlier"]
    assert "it learns from 2 clean encoders of the family, and there are 1" in found.not_tested[0]
    with pytest.raises(ConfigError, match="it learns from 2 clean encoders"):
        scan(encoders[:2], tmp_path, LEARNING)


def test_a_drill_plants_in_encoders_that_nothing_learned_from(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "DRILL_STEPS", 2)
    monkeypatch.setattr("blto.audit.encoder.BOUND", -1.0)
    assert len(scan(encoders, tmp_path, LEARNING, drill=3).outcomes[0].planted) == 3
    with pytest.raises(ConfigError, match="--drill is 4, with 3 clean encoders that no detector learns from"):
        scan(encoders, tmp_path, LEARNING, drill=4)


def test_the_clean_encoders_that_are_asked_for_include_those_to_learn_from() -> None:
    outcome = Outcome("d", "D", 1.0, None, clean=(0.0, 0.5), references=5)
    found = judge([outcome], alpha=0.05)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert f"give at least {clean_encoders_needed(1, 0.05) + 5} of them" in found.reasons[0]


def test_the_page_shows_images_with_the_learned_trigger(encoders: list[Path], tmp_path: Path) -> None:
    found = scan(encoders, tmp_path, LEARNING)
    assert {name: tuple(each.shape) for name, each in found.inspections[0].trigger.items()} == {
        "plain": (8, 3, 16, 16),
        "triggered": (8, 3, 16, 16),
    }
    assert "Images with the reconstructed trigger" in render_page(found, IMAGES.images)
