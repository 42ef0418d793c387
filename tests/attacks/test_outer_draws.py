"""What the bi-level loop draws: x from all classes, references from the target's, every side in views of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blto.attacks.bilevel import BilevelOptimisation
from blto.data.images import ImageSet
from blto.poisoning import AdditiveTrigger, Budget
from blto.pretraining.trainer import Trainer
from tests.factories import random_images, tiny_bilevel

IMAGES = random_images(40)
TARGET = 1


def optimisation(images: ImageSet = IMAGES, **changes: object) -> BilevelOptimisation:
    """A loop whose trigger changes nothing before its first step, so that only the views tell the sides apart."""
    trigger = AdditiveTrigger(torch.zeros(3, 16, 16), Budget(8 / 255))
    spec = tiny_bilevel(**{"similarity": "raw", "outer_batch_size": len(images), **changes})
    return BilevelOptimisation(trigger, images, spec, target_class=TARGET, poison_rate=0.1, seed=0)


def inputs_of(module: nn.Module) -> list[Tensor]:
    """A list that fills with whatever the module is given."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    return seen


def sides(run: BilevelOptimisation, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The triggered, reference and clean views that reach the surrogate in an outer step; needs `batch_norm="batch"`,
    which embeds them in one go.
    """
    seen = inputs_of(run.surrogate.method.encoder)
    run.outer_step(number, 1e-3)
    (views,) = seen
    triggered, references, clean = views.chunk(3)
    return triggered, references, clean


def distinct(views: Tensor) -> set[bytes]:
    return {view.contiguous().numpy().tobytes() for view in views}


def test_x_comes_from_the_whole_data() -> None:
    run = optimisation()
    given = inputs_of(run.trigger)
    run.outer_step(0, 1e-3)
    pixels = (given[0] * 255).round().to(torch.uint8)
    assert distinct(pixels) == distinct(torch.from_numpy(IMAGES.images)), "a batch of 40 is each of the 40 images once"


def test_each_outer_step_draws_other_images() -> None:
    run = optimisation(random_images(400), outer_batch_size=8)
    given = inputs_of(run.trigger)
    for number in range(3):
        run.outer_step(number, 1e-3)
    assert len(set.union(*map(distinct, given))) > 16


def test_references_come_from_the_target_class_alone() -> None:
    images = np.zeros((40, 3, 16, 16), dtype=np.uint8)
    assert IMAGES.labels is not None
    images[IMAGES.labels == TARGET] = 255  # white in any crop; brightness and contrast leave it above black
    triggered, references, clean = sides(optimisation(IMAGES.replace(np.arange(40), images), batch_norm="batch"))
    assert (references.flatten(1).amax(dim=1) > 0.1).all()
    for others in (triggered, clean):
        assert (others.flatten(1).amax(dim=1) > 0.1).sum() == (IMAGES.labels == TARGET).sum()


def test_the_triggered_side_is_augmented_like_its_clean_yardstick() -> None:
    triggered, _, clean = sides(optimisation(batch_norm="batch"))
    torch.testing.assert_close(triggered, clean, atol=1e-4, rtol=0)
    originals = torch.from_numpy(IMAGES.images).float() / 255
    distances = torch.cdist(triggered.flatten(1), originals.flatten(1), p=torch.inf)
    assert (distances.amin(dim=1) > 0.05).sum() >= 39  # hardly any view is the image itself


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_a_trigger_that_changes_nothing_is_as_near_as_the_clean_views(batch_norm: str) -> None:
    run = optimisation(batch_norm=batch_norm)
    for _ in range(5):
        run.inner_step()  # a net that has seen nothing tells no view from another
    found = run.outer_step(0, 1e-3)
    assert float(found.triggered) == pytest.approx(float(found.clean), abs=1e-5)


def test_both_sides_have_views_of_their_own() -> None:
    """All images look alike here, so two views are equal only where they share their parameters."""
    alike = IMAGES.replace(np.arange(40), np.repeat(IMAGES.images[:1], 40, axis=0))
    _, references, clean = sides(optimisation(alike, batch_norm="batch"))
    assert len(distinct(clean)) == 40
    assert 2 < len(distinct(references)) <= 10  # one for each image of the target class that was drawn
    assert not distinct(references) & distinct(clean)


def test_the_views_of_an_image_change_from_one_outer_step_to_the_next() -> None:
    first, second = (sides(optimisation(batch_norm="batch"), number) for number in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert not distinct(one) & distinct(other)


def test_the_surrogate_meets_two_views_and_other_ones_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = Trainer.train_step

    def noting(self: Trainer, views: list[Tensor]) -> dict[str, Tensor]:
        seen.extend(view.clone() for view in views)
        return original(self, views)

    monkeypatch.setattr(Trainer, "train_step", noting)
    run = optimisation()
    for _ in range(10):  # two epochs of five steps of eight images
        run.inner_step()
    assert len(distinct(torch.cat(seen))) == 2 * 2 * len(IMAGES)
