from __future__ import annotations

import hashlib

import numpy as np
import pytest

from blto.data.images import ImageSet
from blto.errors import ConfigError, InputRefused


def small(count: int = 6, size: int = 4) -> ImageSet:
    images = np.arange(count * 3 * size * size, dtype=np.uint8).reshape(count, 3, size, size)
    return ImageSet(images, np.arange(count, dtype=np.int64) % 2, ("cat", "dog"), "small")


def test_sizes() -> None:
    images = small(6, 4)
    assert (len(images), images.image_size, images.num_classes) == (6, 4, 2)


def test_subset_keeps_order_and_pairs() -> None:
    images = small()
    part = images.subset(np.array([4, 1], dtype=np.int64))
    np.testing.assert_array_equal(part.images, images.images[[4, 1]])
    assert part.labels is not None
    assert part.labels.tolist() == [0, 1]
    assert part.num_classes == 2


def test_without_labels_hides_labels_and_names() -> None:
    bare = small().without_labels()
    assert bare.labels is None
    assert bare.class_names == ()
    np.testing.assert_array_equal(bare.images, small().images)


def test_replace_changes_the_named_images_only_and_copies() -> None:
    images = small()
    before = images.images.copy()
    changed = images.replace(
        np.array([5, 2], dtype=np.int64), np.stack([np.full((3, 4, 4), v, np.uint8) for v in (7, 9)])
    )
    assert (changed.images[5] == 7).all()
    assert (changed.images[2] == 9).all()
    np.testing.assert_array_equal(changed.images[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    np.testing.assert_array_equal(images.images, before)
    assert changed.labels is images.labels


@pytest.mark.parametrize(
    ("indices", "shape", "dtype"),
    [([1, 1], (2, 3, 4, 4), "uint8"), ([1], (2, 3, 4, 4), "uint8"), ([1], (1, 3, 4, 4), "int64")],
)
def test_replace_refuses(indices: list[int], shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ConfigError):
        small().replace(np.array(indices, dtype=np.int64), np.zeros(shape, dtype))


def test_content_hash_is_the_documented_sum() -> None:
    images = small()
    assert images.labels is not None
    expected = hashlib.sha256(repr((images.images.shape, True)).encode())
    expected.update(images.images.tobytes() + images.labels.astype("<i8").tobytes())
    assert images.content_hash == expected.hexdigest()


def test_content_hash_sees_pixels_labels_and_shape_but_not_the_name() -> None:
    base = small()
    assert base.labels is not None
    pixel = base.replace(np.array([0]), base.images[:1] ^ np.uint8(1))
    label = ImageSet(base.images, 1 - base.labels, base.class_names, "small")
    shape = ImageSet(base.images.reshape(-1, 3, 2, 2), None, (), "small")
    hashes = {each.content_hash for each in (base, pixel, label, base.without_labels(), shape)}
    assert len(hashes) == 5
    assert ImageSet(base.images, base.labels, ("a", "b", "c"), "other").content_hash == base.content_hash


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 4, 4), np.float32),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 5), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8).transpose(0, 3, 1, 2),
    ],
    ids=["float", "channels last", "not square", "one image", "not contiguous"],
)
def test_wrong_pixels_are_refused(images: np.ndarray) -> None:
    with pytest.raises(InputRefused, match="bad: images are"):
        ImageSet(images, None, (), "bad")


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 2]), np.array([-1, 0]), np.array([0]), np.array([0, 1], np.int32)],
    ids=["above", "below", "too few", "int32"],
)
def test_wrong_labels_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(InputRefused, match="bad: labels"):
        ImageSet(np.zeros((2, 3, 4, 4), np.uint8), labels, ("cat", "dog"), "bad")


def test_labels_need_class_names() -> None:
    with pytest.raises(ConfigError, match="class_names"):
        ImageSet(np.zeros((1, 3, 4, 4), np.uint8), np.zeros(1, np.int64), (), "bad")
