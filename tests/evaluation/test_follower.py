"""Following a trigger leaves the encoder in the mode it was in, and reads nothing from a trigger that does nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blto.data.views import RECIPES, Views
from blto.evaluation import Follower, backdoor_metrics, displacement, extract, fit_probe
from blto.evaluation.follower import TOLERANCE
from blto.models.encoder import build_encoder
from tests.factories import TINY_BACKBONE, random_images

PROBES: dict[str, dict[str, Any]] = {"linear": {"tolerance": 1e-5}, "knn": {"k": 5}}


def test_a_follower_restores_the_mode_and_reads_no_effect_from_no_trigger() -> None:
    train, test = random_images(40), random_images(40, seed=1)
    follow = Follower(train, test, test.images, 1, Views(RECIPES["simclr_cifar"], test.image_size), PROBES)
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=test.image_size)
    assert encoder.training
    row = follow(encoder)
    assert all(part.training for part in encoder.modules())
    assert row["trigger"] == pytest.approx(row["clean"], abs=1e-6)


def test_a_follower_judges_by_both_probes_with_the_definitions_of_the_metrics() -> None:
    train, test = random_images(400), random_images(300, seed=1)
    assert test.labels is not None
    target = train.images[np.flatnonzero(train.labels == 1)[0]]
    triggered = np.broadcast_to(target, test.images.shape).copy()  # every image becomes one image of class 1
    follow = Follower(train, test, triggered, 1, Views(RECIPES["simclr_cifar"], test.image_size), PROBES)
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=test.image_size)
    row = follow(encoder)
    bank = extract(encoder, train.images, train.labels)
    clean, changed = (extract(encoder, images).vectors for images in (test.images, triggered))
    for probe in ("linear", "knn"):
        predict = fit_probe(probe, bank, train.num_classes, **PROBES[probe])
        hits = predict(changed)
        expected = backdoor_metrics(
            labels=test.labels,
            target_class=1,
            clean_predictions=predict(clean),
            triggered_predictions=hits,
            twin_triggered_predictions=hits,
        )
        assert row[f"{probe}_asr"] in (0.0, 1.0)  # one image, one answer
        for name in ("asr", "untriggered_rate", "clean_accuracy"):
            assert row[f"{probe}_{name}"] == pytest.approx(expected[name].value, abs=0.01)
    other, references = (np.flatnonzero(chosen) for chosen in (test.labels != 1, train.labels == 1))
    parts = {"triggered": changed[other], "clean": clean[other], "references": bank.vectors[references]}
    moved = displacement(**parts, bank=bank.vectors)
    assert moved.keys() == {"shift", "advance", "common", "heading"}
    assert {name: row[name] for name in moved} == pytest.approx(moved, rel=1e-3)


def test_a_follower_asks_the_probes_of_the_run_alone_and_a_diverged_one_leaves_no_value() -> None:
    train, test = random_images(60), random_images(40, seed=1)
    views = Views(RECIPES["simclr_cifar"], test.image_size)
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=test.image_size)
    row = Follower(train, test, test.images, 1, views, {"knn": {}})(encoder)
    assert {name for name in row if "_" in name} == {"knn_asr", "knn_untriggered_rate", "knn_clean_accuracy"}
    row = Follower(train, test, test.images, 1, views, {"linear": {"max_iterations": 1, "tolerance": 1e-8}})(encoder)
    assert "linear_asr" not in row
    assert "trigger" in row


def test_a_linear_probe_on_the_way_is_fitted_less_exactly_where_the_run_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def fit(name: str, *args: Any, **options: Any) -> Any:
        given.append(options)
        return fit_probe(name, *args, **options)

    monkeypatch.setattr("blto.evaluation.follower.fit_probe", fit)
    train, test = random_images(60), random_images(40, seed=1)
    views = Views(RECIPES["simclr_cifar"], test.image_size)
    asked: list[dict[str, dict[str, Any]]] = [{"linear": {}}, {"linear": {"tolerance": 1e-5}}, {"knn": {}}]
    for probes in asked:
        Follower(train, test, test.images, 1, views, probes)(build_encoder(TINY_BACKBONE, seed=0, image_size=16))
    assert given == [{"tolerance": TOLERANCE}, {"tolerance": 1e-5}, {}]


def test_test_images_of_the_target_class_alone_are_not_judged() -> None:
    train, test = random_images(60), random_images(40, seed=1)
    follow = Follower(train, test, test.images, 1, Views(RECIPES["simclr_cifar"], test.image_size), PROBES)
    assert follow._test.labels is not None
    follow._test.labels[:] = 1  # what chance may draw from a test set of few other images
    row = follow(build_encoder(TINY_BACKBONE, seed=0, image_size=test.image_size))
    assert "linear_asr" not in row
