"""What each change of a recipe changes, that it leaves the rest and what it was given, and what it does to a patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blto.data.views import RECIPES, ViewRecipe, Views, draw
from blto.defenses import DEFENSES
from blto.defenses.base import RecipeChange
from blto.defenses.recipe_changes import ICutMix, LocalizedCropping, StrongAugmentation
from blto.errors import ConfigError
from blto.pretraining.spec import PretrainingSpec

CHANGES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "i_cutmix": ({"alpha": 0.5}, {"method": {"i_cutmix": 0.5}}),
    "localized_cropping": ({"margin": 0.1}, {"views": {"crop_margin": 0.1}}),
    "strong_augmentation": (
        {"crop": 0.1, "jitter": 1.0, "blur": 0.3, "solarize": 0.4},
        {
            "views": {
                "crop_scale": [0.1, 1.0],
                "brightness": 0.8,
                "contrast": 0.8,
                "saturation": 0.8,
                "hue": 0.2,
                "blur_probability": [0.3, 0.3],
                "solarize_probability": [0.0, 0.4],
            }
        },
    ),
}


def recipe(**changes: Any) -> PretrainingSpec:
    return PretrainingSpec.model_validate({"views": "simsiam_cifar", "epochs": 7, "normalise": False} | changes)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_sets_its_options_and_nothing_else(name: str) -> None:
    options, wanted = CHANGES[name]
    given = recipe()
    before = given.model_dump(mode="json")
    defense = DEFENSES.build({"name": name, **options})
    assert isinstance(defense, RecipeChange)
    found = defense.change(given).model_dump(mode="json")
    assert given.model_dump(mode="json") == before
    assert found == before | {part: before[part] | values for part, values in wanted.items()}
    assert defense.change(defense.change(given)) == defense.change(given), "twice is once"


@pytest.mark.parametrize("name", CHANGES)
def test_the_defaults_are_those_of_the_papers(name: str) -> None:
    wanted = {
        "i_cutmix": {"alpha": 1.0},
        "localized_cropping": {"margin": 0.2},
        "strong_augmentation": {"crop": 0.08, "jitter": 1.0, "blur": 0.5, "solarize": 0.2},
    }
    assert DEFENSES.resolve(name) == {"name": name, **wanted[name]}


def test_i_cutmix_is_for_methods_that_contrast_images() -> None:
    assert ICutMix(alpha=2.0).change(recipe(method="moco")).method["i_cutmix"] == 2.0
    for name in ("byol", "simsiam"):
        with pytest.raises(ConfigError, match=f"^i_cutmix is not for method {name}; give one of moco, simclr.$"):
            ICutMix().change(recipe(method=name))


@pytest.mark.parametrize("name", RECIPES)
def test_a_strong_augmentation_is_never_weaker_than_what_there_was(name: str) -> None:
    before = recipe(views=name).views
    for defense in (StrongAugmentation(), StrongAugmentation(crop=1.0, jitter=0.0, blur=0.0, solarize=0.0)):
        after = defense.change(recipe(views=name)).views
        assert after.crop_scale[0] <= before.crop_scale[0]
        for key in ("brightness", "contrast", "saturation", "hue"):
            assert getattr(after, key) >= getattr(before, key)
        for key in ("blur_probability", "solarize_probability"):
            assert all(a >= b for a, b in zip(getattr(after, key), getattr(before, key), strict=True))
    assert after == before, "nothing asked, nothing changed"


def seen(views: ViewRecipe, corner: int, size: int) -> tuple[np.ndarray[Any, Any], ...]:
    """For 4,000 images of 32 pixels: whether each of two crops has most of a square with its corner on the diagonal."""
    found = []
    for view in (0, 1):
        box = draw(views, seed=0, epoch=0, samples=np.arange(4000), view=view, image_size=(32, 32)).box
        ends = box[:, :2] + box[:, 2:]
        sides = np.minimum(ends, corner + size) - np.maximum(box[:, :2], corner)
        found.append(np.prod(sides.clip(0), axis=1) > size**2 / 2)
    return tuple(found)


def test_localized_crops_seldom_show_the_patch_in_one_view_and_the_object_in_the_other() -> None:
    """What binds a patch in CorruptEncoder's account, on an image with its object in one corner, a patch in another."""
    shares = {}
    for name, given in (("plain", recipe()), ("localized", LocalizedCropping().change(recipe()))):
        patch, thing = seen(given.views, 2, 8), seen(given.views, 16, 14)
        apart = (patch[0] & ~thing[0] & thing[1] & ~patch[1]) | (patch[1] & ~thing[1] & thing[0] & ~patch[0])
        shares[name] = apart.mean()
    assert shares["plain"] > 0.06
    assert shares["localized"] < 0.5 * shares["plain"]


def test_a_strong_augmentation_takes_most_of_a_fine_pattern_from_half_of_the_views() -> None:
    board = np.indices((32, 32)).sum(axis=0) % 2
    image = np.broadcast_to((128 + 32 * (2 * board - 1)).astype(np.uint8), (1, 3, 32, 32)).copy()
    uncropped = recipe(views={"name": "simsiam_cifar", "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]})
    left = {}
    for name, given in (("plain", uncropped), ("strong", StrongAugmentation(crop=1.0).change(uncropped))):
        views = Views(given.views, 32)
        drawn = views.draw(seed=0, epoch=0, samples=np.arange(400), view=0)
        left[name] = views.fast(image, np.zeros(400, np.int64), drawn).std(dim=(1, 2, 3)).numpy()
    assert np.median(left["plain"]) > 0.1
    assert (left["plain"] < 0.02).mean() < 0.02
    assert (left["strong"] < 0.02).mean() > 0.3
