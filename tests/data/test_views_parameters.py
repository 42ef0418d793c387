"""View parameters: distributed as torchvision's, and a function of (seed, epoch, sample, view) alone."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from blto.data.views import RECIPES, ViewRecipe, Views, draw, resolve_recipe
from blto.errors import ConfigError

Array = np.ndarray[Any, Any]
SIZE = 32


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    image, ratio = torch.empty(3, 96, 128), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(3000)])
    recipe = ViewRecipe(crop_scale=scale)
    ours = draw(recipe, seed=0, epoch=0, samples=np.arange(3000), view=0, image_size=(96, 128)).box
    for measure in (area, aspect, lambda box: box[:, 0], lambda box: box[:, 1]):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [96, 128]).all()


def area(box: Array) -> Array:
    return box[:, 2] * box[:, 3]


def aspect(box: Array) -> Array:
    return box[:, 3] / box[:, 2]


@pytest.mark.parametrize("image_size", [(10, 100), (100, 10)])
def test_a_crop_that_never_fits_is_the_central_one(image_size: tuple[int, int]) -> None:
    recipe = ViewRecipe(crop_scale=(0.9, 1.0))
    ours = draw(recipe, seed=0, epoch=0, samples=np.arange(20), view=0, image_size=image_size).box
    theirs = RandomResizedCrop.get_params(torch.empty(3, *image_size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert (ours == theirs).all()


def test_jitter_is_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    jitter = ColorJitter(0.8, 0.8, 0.8, 0.2)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(3000)])
    recipe = resolve_recipe({"name": "simclr", "jitter_probability": 1.0})
    params = draw(recipe, seed=0, epoch=0, samples=np.arange(3000), view=0, image_size=(SIZE, SIZE))
    for op in range(4):
        assert stats.ks_2samp(params.factors[:, op], theirs[:, op]).pvalue > 0.001
    counts = [(params.order == order).all(axis=1).sum() for order in itertools.permutations(range(4))]
    assert sum(counts) == 3000
    assert stats.chisquare(counts).pvalue > 0.001
    assert np.abs(np.corrcoef(params.factors.T) - np.eye(4)).max() < 0.08


@pytest.mark.parametrize("view", [0, 1, 2])
def test_each_step_happens_as_often_as_the_recipe_says(view: int) -> None:
    count = 4000
    params = draw(RECIPES["byol"], seed=0, epoch=0, samples=np.arange(count), view=view, image_size=(SIZE, SIZE))
    happened = {
        0.5: params.flip,
        0.8: (params.factors != np.array([1, 1, 1, 0], np.float32)).any(axis=1),
        0.2: params.gray,
        (1.0, 0.1, 0.1)[view]: params.blur_sigma > 0,
    }
    for chance, events in happened.items():
        assert abs(events.mean() - chance) <= 4 * np.sqrt(chance * (1 - chance) / count)
    jittered = (params.factors[:, 3] != 0).astype(float)
    steps = np.stack([params.flip, jittered, params.gray, params.solarize_threshold <= 1, params.blur_sigma > 0])
    varying = steps[steps.std(axis=1) > 0]
    assert np.abs(np.corrcoef(varying) - np.eye(len(varying))).max() < 0.08  # each step is drawn on its own
    solarized = (params.solarize_threshold <= 1).mean()
    assert solarized == 0 if view == 0 else abs(solarized - 0.2) < 0.03
    blurred = params.blur_sigma[params.blur_sigma > 0]
    assert stats.kstest(blurred, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001


def test_parameters_do_not_depend_on_the_batch() -> None:
    views = Views(RECIPES["byol"], SIZE)
    whole = views.draw(seed=7, epoch=3, samples=np.arange(100), view=1)
    picked = np.array([41, 3, 99, 3])
    part = views.draw(seed=7, epoch=3, samples=picked, view=1)
    assert all(np.array_equal(a[picked], b) for a, b in zip(whole.arrays, part.arrays, strict=True))


def test_parameters_differ_between_seeds_epochs_views_and_samples() -> None:
    views = Views(RECIPES["mocov2"], SIZE)
    keys = itertools.product((0, 1, 2**63 - 1), (0, 1), (0, 1), (0, 1000))
    drawn = [views.draw(seed=s, epoch=e, view=v, samples=np.arange(50) + first) for s, e, v, first in keys]
    for first, second in itertools.combinations(drawn, 2):
        assert np.abs(np.corrcoef(first.factors[:, 0], second.factors[:, 0])[0, 1]) < 0.6
        assert (first.box == second.box).all(axis=1).mean() < 0.2
        assert not np.array_equal(first.flip, second.flip)


def test_changing_one_probability_leaves_the_other_draws_alone() -> None:
    key: dict[str, Any] = {"seed": 0, "epoch": 0, "samples": np.arange(50), "view": 0, "image_size": (SIZE, SIZE)}
    before = draw(RECIPES["mocov2"], **key)
    after = draw(resolve_recipe({"name": "mocov2", "flip": 0.0, "blur_probability": 0.0}), **key)
    assert not after.flip.any()
    assert not after.blur_sigma.any()
    for name in ("box", "order", "factors", "gray"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_one_coin_for_color_jitter_is_thrown_for_each_batch_and_view() -> None:
    recipe = resolve_recipe({"name": "mocov2", "jitter_coin": "batch"})
    always = resolve_recipe({"name": "mocov2", "jitter_probability": 1.0})
    neutral, jittered = np.array([1, 1, 1, 0], np.float32), []
    for batch, view in itertools.product(range(300), range(2)):
        samples = np.arange(8) + 8 * batch
        key: dict[str, Any] = {"seed": 1, "epoch": 2, "samples": samples, "view": view, "image_size": (SIZE, SIZE)}
        found, with_jitter = draw(recipe, **key), draw(always, **key)
        changed = (found.factors != neutral).any(axis=1)
        assert changed.all() or not changed.any()
        if changed.all():
            assert np.array_equal(found.factors, with_jitter.factors), "strengths are each sample's own"
        for name in ("box", "flip", "order", "gray", "blur_sigma"):
            assert np.array_equal(getattr(found, name), getattr(with_jitter, name))
        assert np.array_equal(draw(recipe, **key).factors, found.factors)
        jittered.append(changed[0])
    assert abs(np.mean(jittered) - 0.8) < 4 * np.sqrt(0.16 / 600)
    assert abs(np.corrcoef(jittered[::2], jittered[1::2])[0, 1]) < 0.25, "the two views have coins of their own"
    assert len(draw(recipe, seed=1, epoch=0, samples=np.arange(0), view=0, image_size=(SIZE, SIZE))) == 0


def region(first: Array, margin: float, size: int) -> Array:
    """(top, bottom, left, right) of a box that is enlarged all around and cut off at the image's border."""
    y, x, h, w = first
    down, across = int(margin * h), int(margin * w)
    return np.array([max(y - down, 0), min(y + h + down, size), max(x - across, 0), min(x + w + across, size)])


def plain_crop_near(first: Array, margin: float, size: int, least: float, draw_from: np.random.Generator) -> Array:
    """A localized crop as CorruptEncoder describes it, one number after the other."""
    top, bottom, left, right = region(first, margin, size)
    height, width = bottom - top, right - left
    while True:
        target = draw_from.uniform(min(least * size**2, height * width), height * width)
        shape = np.exp(draw_from.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(target * shape)), round(np.sqrt(target / shape))
        if w <= width and h <= height:
            y, x = draw_from.integers(top, bottom - h + 1), draw_from.integers(left, right - w + 1)
            return np.array([y, x, h, w])


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_localized_crops_are_distributed_as_those_of_the_plain_reference(margin: float) -> None:
    count, least = 3000, 0.2
    recipe = ViewRecipe(crop_scale=(least, 1.0), crop_margin=margin)
    key: dict[str, Any] = {"seed": 0, "epoch": 0, "samples": np.arange(count), "image_size": (96, 96)}
    first, second = (draw(recipe, view=view, **key).box for view in (0, 1))
    other = draw(recipe, view=0, **{**key, "seed": 1}).box  # the reference stands on crops of its own
    generator = np.random.default_rng(0)
    plain = np.stack([plain_crop_near(box, margin, 96, least, generator) for box in other])
    for measure in (area, aspect, lambda box: box[:, 0], lambda box: box[:, 1]):
        assert stats.ks_2samp(measure(second), measure(plain)).pvalue > 0.001
    for near, theirs in zip((second - first).T, (plain - other).T, strict=True):
        assert stats.ks_2samp(near, theirs).pvalue > 0.001


def test_a_localized_crop_lies_near_the_first_view_s_and_changes_nothing_else() -> None:
    plain = resolve_recipe({"name": "byol", "crop_scale": [0.2, 0.6]})
    recipe = plain.model_copy(update={"crop_margin": 0.25})
    key: dict[str, Any] = {"seed": 5, "epoch": 3, "samples": np.arange(400), "image_size": (48, 48)}
    first, second, third = (draw(recipe, view=view, **key) for view in (0, 1, 2))
    before = [draw(plain, view=view, **key) for view in (0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(first.arrays, before[0].arrays, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(second.arrays[1:], before[1].arrays[1:], strict=True))
    assert not np.array_equal(second.box, third.box)
    for start, *later in zip(first.box, second.box, third.box, strict=True):
        top, bottom, left, right = region(start, 0.25, 48)
        for y, x, h, w in later:
            assert top <= y < y + h <= bottom
            assert left <= x < x + w <= right
            assert h * w <= 0.65 * 48**2, "no larger than a crop may be"
    assert (area(second.box) >= 0.17 * 48**2).all(), "no smaller than a crop may be"
    outside = [(box[0] < region(start, 0.25, 48)[0]) for start, box in zip(before[0].box, before[1].box, strict=True)]
    assert np.mean(outside) > 0.1, "without the margin many lie elsewhere"


def test_localized_crops_do_not_depend_on_the_batch() -> None:
    recipe = resolve_recipe({"name": "mocov2", "crop_margin": 0.2})
    key: dict[str, Any] = {"seed": 7, "epoch": 3, "view": 1, "image_size": (SIZE, SIZE)}
    whole, picked = draw(recipe, samples=np.arange(100), **key), np.array([41, 3, 99, 3])
    assert np.array_equal(draw(recipe, samples=picked, **key).box, whole.box[picked])


def test_first_parameters_are_frozen() -> None:
    params = Views(RECIPES["byol"], SIZE).draw(seed=0, epoch=1, samples=np.arange(64), view=1)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in params.arrays)).hexdigest()
    assert digest[:16] == "fa6c4cb964ad18f1", "a change here changes every published run"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("simclrr", 'did you mean "simclr"'),
        ({"flip": 0.5}, "unknown view recipe"),
        ({"name": ["simclr"]}, "unknown view recipe"),
        ({"name": "simclr", "flips": 0.5}, 'did you mean "flip"'),
        ({"name": "simclr", "flip": 1.5}, "views.flip"),
        ({"name": "simclr", "hue": 0.6}, "views.hue"),
        ({"name": "simclr", "crop_scale": (0.5, 0.2)}, "low <= high"),
        ({"name": "simclr", "crop_scale": (0.5, 1.2)}, "crop_scale"),
        ({"name": "simclr", "blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"name": "byol", "blur_probability": (1.0, 2.0)}, "views.blur_probability.1"),
        ({"name": "simclr", "crop_margin": -0.1}, "views.crop_margin: input should be greater"),
    ],
)
def test_a_wrong_recipe_is_one_line_of_advice(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_recipe(spec)


def test_recipes_resolve_by_name_and_with_overrides() -> None:
    assert resolve_recipe("byol") == RECIPES["byol"]
    changed = resolve_recipe({"name": "byol", "blur_probability": 0.3})
    assert changed == RECIPES["byol"].model_copy(update={"blur_probability": (0.3, 0.3)})
    assert resolve_recipe({"name": "simclr", **changed.model_dump(mode="json")}) == changed
