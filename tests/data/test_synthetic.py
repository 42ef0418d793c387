from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

import blto.data
from blto.data.images import ImageSet
from blto.data.synthetic import CLASSES, SHAPES, TEXTURES, Synthetic, uniforms
from blto.errors import ConfigError

Array = npt.NDArray[Any]
UNSEEN_SEEDS = (0, 1, 2)  # the drawing was chosen on seeds from 100 up


@cache
def splits(seed: int) -> tuple[ImageSet, ImageSet]:
    data = Synthetic(train_size=4000, test_size=1000, generator_seed=seed)
    return data.load("train"), data.load("test")


def linear_accuracy(train: Array, train_labels: Array, test: Array, test_labels: Array) -> float:
    """Test accuracy of a converged logistic regression on standardised features; the penalty suits 3072 of them."""
    mean, spread = train.mean(0), train.std(0) + 1e-6
    probe = LogisticRegression(C=1e-3 if train.shape[1] > 1000 else 1.0, max_iter=2000)
    probe.fit((train - mean) / spread, train_labels)
    return float(probe.score((test - mean) / spread, test_labels))


def raw(images: ImageSet) -> Array:
    return images.images.reshape(len(images), -1).astype(np.float32)


def color(images: ImageSet) -> Array:
    """Mean, spread and an eight-bin histogram of each channel."""
    pixels = images.images.reshape(len(images), 3, -1)
    bins = [(pixels // 32 == level).mean(2) for level in range(8)]
    return np.concatenate([pixels.mean(2) / 255, pixels.std(2) / 255, *bins], axis=1)


def position(images: ImageSet) -> Array:
    """Centre and extent of the brightness, and of its squared distance from the mean."""
    gray = images.images.mean(1)
    axis = np.linspace(-1, 1, images.image_size)
    columns = []
    for weight in (gray, (gray - gray.mean((1, 2), keepdims=True)) ** 2):
        total = weight.sum((1, 2))
        for power in (axis, axis**2):
            columns += [(weight * power[:, None]).sum((1, 2)) / total, (weight * power).sum((1, 2)) / total]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
def test_a_linear_probe_on_pixels_stays_below_half(seed: int) -> None:
    train, test = splits(seed)
    assert linear_accuracy(raw(train), train.labels, raw(test), test.labels) < 0.3  # type: ignore[arg-type]


@pytest.mark.parametrize("cue", [color, position])
@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
def test_neither_color_nor_position_gives_the_class_away(seed: int, cue: Any) -> None:
    train, test = splits(seed)
    assert linear_accuracy(cue(train), train.labels, cue(test), test.labels) < 0.3  # type: ignore[arg-type]


@pytest.mark.parametrize("cue", [color, position])
def test_nor_do_they_to_boosted_trees(cue: Any) -> None:
    train, test = splits(0)
    trees = HistGradientBoostingClassifier(max_iter=15, random_state=0).fit(cue(train), train.labels)
    assert trees.score(cue(test), test.labels) < 0.4


def test_these_probes_do_read_a_class_that_is_there() -> None:
    """The probes' own control: tint each class, or move a bright spot with it, and they find it."""
    labels = np.arange(400, dtype=np.int64) % 10
    images = np.random.default_rng(0).integers(0, 256, (400, 3, 32, 32), dtype=np.uint8)
    tinted = ImageSet(
        np.maximum(images, (labels * 25).astype(np.uint8)[:, None, None, None]), labels, tuple("abcdefghij"), "tinted"
    )
    assert linear_accuracy(color(tinted)[:300], labels[:300], color(tinted)[300:], labels[300:]) > 0.9
    moved = np.zeros_like(images)
    moved[np.arange(400), :, 3 * labels, 16] = 255
    spots = ImageSet(moved, labels, tuple("abcdefghij"), "spots")
    assert linear_accuracy(position(spots)[:300], labels[:300], position(spots)[300:], labels[300:]) > 0.9


def test_the_bytes_are_frozen() -> None:
    data = Synthetic(train_size=200, test_size=50)
    assert data.load("train").content_hash == "0eef026c4b60a11ff30d865f0cc10d9ff13e9fa0693ba271f7b2ad251274c0a9"
    assert data.load("test").content_hash == "a543335ea882089ce225f331b2fbf546278c47604760d75d38bd35c93a24f0b7"


def test_the_first_images_do_not_depend_on_how_many_there_are() -> None:
    few, many = (Synthetic(train_size=size).load("train") for size in (333, 700))
    np.testing.assert_array_equal(few.images, many.images[:333])
    np.testing.assert_array_equal(few.labels, many.labels[:333])  # type: ignore[index]


def test_splits_and_seeds_differ() -> None:
    sets = [
        Synthetic(train_size=20, test_size=20, generator_seed=seed).load(split)
        for seed in (0, 1)
        for split in ("train", "test")
    ]
    assert len({each.content_hash for each in sets}) == 4


def test_classes_are_balanced_and_use_every_shape_and_texture() -> None:
    train, _ = splits(0)
    assert np.bincount(train.labels).tolist() == [400] * 10  # type: ignore[arg-type]
    assert {shape for shape, _ in CLASSES} == set(SHAPES)
    assert {texture for _, texture in CLASSES} == set(TEXTURES)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_other_sizes(size: int) -> None:
    images = blto.data.load({"name": "synthetic", "train_size": 30, "image_size": size})
    assert images.images.shape == (30, 3, size, size)
    assert images.images.std() > 20


@pytest.mark.parametrize(
    ("key", "value"), [("train_size", 9), ("image_size", 8), ("generator_seed", -1), ("train_sizes", 100)]
)
def test_bad_arguments_are_named(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        blto.data.load({"name": "synthetic", key: value})


def test_uniforms_are_one_table_however_it_is_cut() -> None:
    whole = uniforms((3, 1), 0, 40, 7)
    np.testing.assert_array_equal(uniforms((3, 1), 13, 9, 7), whole[13:22])
    assert 0 <= whole.min() < 0.02
    assert 0.98 < whole.max() < 1


def test_uniforms_are_philox_words() -> None:
    """Against NumPy's own conversion of the same stream."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((5, 2))))
    np.testing.assert_array_equal(uniforms((5, 2), 0, 10, 3), generator.random((10, 3)))
