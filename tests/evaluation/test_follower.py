"""Following a trigger leaves the encoder in the mode it was in, and reads nothing from a trigger that does nothing."""

from __future__ import annotations

import pytest

from blto.data.views import RECIPES, Views
from blto.evaluation import Follower
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
