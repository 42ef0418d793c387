"""SSL-Backdoor: the patch is there, whole and nowhere else, within the paper's bounds, and the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blto.attacks.base import Surroundings, poison_with
from blto.attacks.ssl_backdoor import SSLBackdoor, draw_patch
from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning import PatchTrigger, apply_to_uint8, load_trigger, save_trigger
from blto.poisoning.patch import places, span
from tests.factories import random_images

DRAWS = 10_000


def trained(size: int = 32, seed: int = 0, **options: Any) -> PatchTrigger:
    attack = SSLBackdoor(target_class=1, **options)
    trigger = attack.train_trigger(random_images(4, size=size), seed=seed, surroundings=Surroundings()).trigger
    assert isinstance(trigger, PatchTrigger)
    return trigger


def found_at(before: np.ndarray, after: np.ndarray, patch: np.ndarray) -> tuple[int, int]:
    """Where the patch is, from the pixels alone: equal to it there, equal to the original everywhere else."""
    size = patch.shape[-1]
    fits = []
    for row in range(after.shape[1] - size + 1):
        for column in range(after.shape[2] - size + 1):
            pasted = before.copy()
            pasted[:, row : row + size, column : column + size] = patch
            if np.array_equal(pasted, after):
                fits.append((row, column))
    assert len(fits) == 1
    return fits[0]


@pytest.mark.parametrize("at_test", [False, True])
def test_the_patch_is_pasted_whole_and_nothing_else_changes(at_test: bool) -> None:
    images = random_images(20, size=32).images
    trigger = trained().at_test() if at_test else trained()
    after = apply_to_uint8(trigger, images)
    patch = draw_patch(7, seed=0).numpy()
    corners = [found_at(*pair, patch) for pair in zip(images, after, strict=True)]
    assert len(set(corners)) > 10
    floats = torch.from_numpy(images).float() / 255
    assert torch.equal(trigger(floats), torch.from_numpy(after).float() / 255), "opaque: equal to the last bit"


def draws(trigger: PatchTrigger, size: int) -> Tensor:
    """Corners (DRAWS, 2) on images that are noise in their first row and black elsewhere."""
    images = torch.zeros(DRAWS, 3, size, size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    images[:, :, 0] = torch.randint(0, 256, (DRAWS, 3, size), generator=generator, dtype=torch.uint8)
    parts = (images[start : start + 1000].float() / 255 for start in range(0, DRAWS, 1000))
    return torch.tensor([c for part in parts for c in places(part, trigger.size, trigger.placement, seed=trigger.seed)])


@pytest.mark.parametrize(("at_test", "first", "last"), [(False, 8, 24 - 7), (True, 3, 28 - 7)])
def test_places_are_uniform_within_the_paper_s_bounds(at_test: bool, first: int, last: int) -> None:
    """[0.25 W, 0.75 W - w] on poisons and [0.10 W, 0.90 W - w] on test images, both ends reached."""
    corners = draws(trained().at_test() if at_test else trained(), 32)
    counts = [torch.bincount(corners[:, axis], minlength=32) for axis in (0, 1)]
    number = last - first + 1
    for count in counts:
        assert count.nonzero().flatten().tolist() == list(range(first, last + 1))
        expected = DRAWS / number
        assert ((count[first : last + 1] - expected).square() / expected).sum() < 3 * number  # chi-square
    assert len({tuple(corner) for corner in corners.tolist()}) == number**2, "rows and columns are drawn apart"


def test_the_authors_own_size() -> None:
    """50 of 224 pixels: [56, 118] on poisons, [22, 151] on test images."""
    assert trained(size=224).size == 50
    assert span(224, 50, (0.25, 0.75)) == (56, 168 - 50)
    assert span(224, 50, (0.10, 0.90)) == (22, 201 - 50)
    assert trained().size == 7


def test_a_range_without_room_is_its_lower_bound_and_the_patch_stays_inside() -> None:
    assert span(32, 16, (0.25, 0.75)) == (8, 8)
    assert span(32, 20, (0.25, 0.75)) == (8, 8)  # the authors': the lower bound where the range is empty
    assert span(32, 30, (0.25, 0.75)) == (2, 2)
    assert span(32, 32, (0.10, 0.90)) == (0, 0)
    images = random_images(3, size=32).images
    covered = apply_to_uint8(trained(patch_size=32), images)
    assert np.array_equal(covered, np.broadcast_to(draw_patch(32, seed=0), covered.shape))


def test_the_patch_is_four_by_four_colors() -> None:
    patch = draw_patch(8, seed=5)
    assert torch.equal(patch, patch[:, ::2, ::2].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))
    assert len({tuple(color) for color in patch.flatten(1).T.tolist()}) == 16
    assert torch.equal(draw_patch(8, seed=5), patch)
    assert not torch.equal(draw_patch(8, seed=6), patch)
    for size in (7, 50):  # cells differ by a pixel where four do not divide the size; every color is there
        assert len({tuple(color) for color in draw_patch(size, seed=5).flatten(1).T.tolist()}) == 16


def test_a_place_depends_on_seed_and_image_alone(tmp_path: Path) -> None:
    images = random_images(40, size=32).images
    trigger = trained(seed=1)
    after = apply_to_uint8(trigger, images)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(apply_to_uint8(trigger, images[order], batch_size=7), after[order])
    save_trigger(tmp_path / "t.safetensors", trigger)
    again = load_trigger(tmp_path / "t.safetensors")
    assert np.array_equal(apply_to_uint8(again, images), after)
    at_test = apply_to_uint8(trigger.at_test(), images)
    assert np.array_equal(apply_to_uint8(again.at_test(), images), at_test)
    assert not np.array_equal(at_test, after)
    assert np.array_equal(apply_to_uint8(trigger.at_test().at_test(), images), at_test)
    assert (apply_to_uint8(trained(seed=2), images) != after).any(axis=(1, 2, 3)).sum() > 30
    assert torch.equal(trained(seed=2).patch, trigger.patch), "the run's seed moves the patch and does not repaint it"


def test_poisons_are_as_many_as_asked_for_and_no_other_image_has_the_patch() -> None:
    images = random_images(200, size=32)
    trigger = trained()
    poisoned = poison_with(SSLBackdoor(target_class=1, poison_rate=0.1), trigger, images, seed=3)
    assert images.labels is not None
    assert poisoned.n_poisoned == 20
    assert images.labels[poisoned.mask].tolist() == [1] * 20
    patch = trigger.patch.numpy()
    windows = np.lib.stride_tricks.sliding_window_view(poisoned.poisoned.images, (3, 7, 7), axis=(1, 2, 3))
    has_patch = (windows == patch).all(axis=(-3, -2, -1)).any(axis=(1, 2, 3))
    assert np.array_equal(has_patch, poisoned.mask)


def test_what_does_not_fit_is_refused() -> None:
    images = random_images(size=32)
    SSLBackdoor(target_class=0, patch_size=32).check_images(images)
    with pytest.raises(
        ConfigError, match=r"attack\.patch_size is 33, larger than the images of noise, .* give 1 to 32"
    ):
        SSLBackdoor(target_class=0, patch_size=33).check_images(images)
    with pytest.raises(ConfigError, match="the patch has 33 pixels a side"):
        trained(patch_size=33)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="accepted is uint8"):
        PatchTrigger(torch.zeros(3, 4, 4), seed=0, placement=(0, 1), test_placement=(0, 1))
    with pytest.raises(ConfigError, match="0 <= from <= to <= 1"):
        PatchTrigger(draw_patch(4, seed=0), seed=0, placement=(0, 1), test_placement=(0.9, 0.1))


def test_a_set_of_tiny_images_gets_a_patch_too() -> None:
    images = ImageSet(np.zeros((1, 3, 2, 2), dtype=np.uint8), np.zeros(1, dtype=np.int64), ("a",), "tiny")
    assert SSLBackdoor(target_class=0).size_on(images.image_size) == 1
