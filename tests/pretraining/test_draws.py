"""What the loop shows a method: two views of every image, drawn apart from each other and anew in each epoch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from blto.data.views import Views
from blto.pretraining.loop import batch_rows, pretrain
from blto.pretraining.trainer import Trainer
from blto.runtime.seeds import stream_seed
from tests.factories import random_images, tiny_recipe

IMAGES = random_images(16).without_labels()  # two batches of 8 an epoch
EPOCHS = 3


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The views of every training step, as the trainer is given them."""
    seen: list[list[torch.Tensor]] = []
    original = Trainer.train_step

    def noting(self: Trainer, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append([view.clone() for view in views])
        return original(self, views)

    monkeypatch.setattr(Trainer, "train_step", noting)
    return seen


def views_by_image(steps: list[list[torch.Tensor]], seed: int) -> dict[int, list[torch.Tensor]]:
    """Every view that was made of each image."""
    found: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(IMAGES))}
    for number, views in enumerate(steps):
        epoch, batch = divmod(number, 2)
        rows = batch_rows(len(IMAGES), 8, seed=stream_seed(seed, "pretrain"), epoch=epoch, batch=batch)
        for view in views:
            for row, image in zip(rows, view, strict=True):
                found[int(row)].append(image)
    return found


def test_no_two_views_of_an_image_are_the_same(steps: list[list[torch.Tensor]]) -> None:
    pretrain(IMAGES, tiny_recipe(epochs=EPOCHS), seed=5)
    assert len(steps) == 2 * EPOCHS
    for views in views_by_image(steps, 5).values():
        assert len(views) == 2 * EPOCHS
        assert not any(torch.equal(one, other) for one, other in combinations(views, 2))


def test_images_that_look_alike_get_views_of_their_own(steps: list[list[torch.Tensor]]) -> None:
    alike = IMAGES.replace(np.arange(16), np.repeat(IMAGES.images[:1], 16, axis=0))
    pretrain(alike, tiny_recipe(epochs=1, batch_size=16), seed=5)
    ((first, second),) = steps
    assert len({view.numpy().tobytes() for view in torch.cat((first, second))}) == 32


def test_the_views_are_those_of_the_run_s_seed_epoch_sample_and_view(steps: list[list[torch.Tensor]]) -> None:
    recipe, seed = tiny_recipe(epochs=EPOCHS), stream_seed(5, "pretrain")
    pretrain(IMAGES, recipe, seed=5)
    source = Views(recipe.views, IMAGES.image_size)
    for epoch in range(EPOCHS):
        for batch in (0, 1):
            rows = batch_rows(len(IMAGES), 8, seed=seed, epoch=epoch, batch=batch)
            for view in (0, 1):
                drawn = source.draw(seed=seed, epoch=epoch, samples=rows, view=view)
                assert torch.equal(steps[2 * epoch + batch][view], source.fast(IMAGES.images, rows, drawn))
