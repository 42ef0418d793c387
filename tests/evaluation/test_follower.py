"""Following a trigger leaves the encoder in the mode it was in, and reads nothing from a trigger that does nothing."""

from __future__ import annotations

import numpy as np
import pytest

from blto.data.views import RECIPES, Views
from blto.evaluation import Follower, backdoor_metrics, extract, fit_probe
from blto.models.encoder import build_encoder
from tests.factories import TINY_BACKBONE, random_images


def test_a_follower_restores_the_mode_and_reads_no_effect_from_no_trigger() -> None:
    train, test = random_images(40), random_images(40, seed=1)
    follow = Follower(train, test, test.images, 1, Views(RECIPES["simclr_cifar"], test.image_size))
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
    follow = Follower(train, test, triggered, 1, Views(RECIPES["simclr_cifar"], test.image_size))
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=test.image_size)
    row = follow(encoder)
    bank = extract(encoder, train.images, train.labels)
    clean, changed = (extract(encoder, images).vectors for images in (test.images, triggered))
    for probe in ("linear", "knn"):
        predict = fit_probe(probe, bank, train.num_classes)
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
