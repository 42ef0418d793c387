"""Repeated windows: its arithmetic, that pasted patches are found and clean sets are not, and what it cannot see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from blto.attacks.ssl_backdoor import draw_patch
from blto.data.synthetic import Synthetic
from blto.defenses.base import Conditions, Images, Scores, score_dataset
from blto.defenses.repeated_windows import RepeatedWindows, count_images, sharing, window_hashes
from blto.errors import ConfigError, InputRefused
from blto.files.images import decode_image, encode_jpeg
from blto.poisoning import FrequencyTrigger, PatchTrigger, apply_to_uint8
from blto.registry import signature_schema, validate

SHAPES = Synthetic(train_size=600).load("train")
POISONS = np.arange(50, 600, 100)  # 1%: six of 600
OTHERS = np.delete(np.arange(600), POISONS)


def scored(images: Images, seed: int = 0, **options: int) -> Scores:
    given = replace(SHAPES, images=images, labels=np.zeros(len(images), np.int64))
    return score_dataset(RepeatedWindows(**options), given, None, Conditions(seed))


def with_patch(size: int = 7) -> Images:
    trigger = PatchTrigger(draw_patch(size, seed=0), seed=0, placement=(0.25, 0.75), test_placement=(0.1, 0.9))
    images = SHAPES.images.copy()
    images[POISONS] = apply_to_uint8(trigger, images[POISONS])
    return images


def test_a_hash_belongs_to_the_pixels_of_a_window_wherever_it_is() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 12, 15, 3), dtype=np.uint8)
    second[6:11, 3:8] = first[1:6, 9:14]
    one, other = window_hashes(np.stack([first, second]), 5, 5).reshape(2, 8, 11)
    assert one[1, 9] == other[6, 3] != 0
    assert len(np.intersect1d(one, other)) == 1
    assert len(np.unique(np.stack([one, other]))) == 2 * 88 - 1
    second[8, 5, 2] ^= 1
    assert window_hashes(second[None], 5, 5).reshape(8, 11)[6, 3] != one[1, 9]
    turned = np.ascontiguousarray(first.transpose(1, 0, 2))
    assert not len(np.intersect1d(window_hashes(turned[None], 5, 5), one)), "rows and columns are not the same"


def test_a_window_without_texture_is_left_out() -> None:
    image = np.zeros((1, 12, 12, 3), np.uint8)
    image[:, :, 6:] = 9
    assert not window_hashes(image, 5, 5).any(), "no pair of neighbours differs down a column"
    image[:, 6:, 6:, 1] = 7
    assert not window_hashes(image, 5, 5).any(), "nowhere in all five columns"
    places = (window_hashes(image, 5, 3).reshape(8, 8) != 0).nonzero()
    assert {*zip(*map(np.ndarray.tolist, places), strict=True)} == {(y, x) for y in (2, 3, 4, 5) for x in (4, 5)}
    image[:, 6:, :6, 1] = 7
    places = (window_hashes(image, 5, 5).reshape(8, 8) != 0).nonzero()
    assert {*zip(*map(np.ndarray.tolist, places), strict=True)} == {(y, x) for y in (2, 3, 4, 5) for x in (2, 3, 4, 5)}
    assert (window_hashes(image, 5, 0) != 0).all()
    assert window_hashes(image[:, :4], 5, 5).shape == (1, 0)


def test_of_a_large_image_the_same_windows_are_looked_at_wherever_they_are() -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 1, 100, 100, 3), dtype=np.uint8)
    second[:, 40:90, 40:90] = first[:, 3:53, 7:57]
    one, other = window_hashes(first, 5, 5), window_hashes(second, 5, 5)
    kept = one[one != 0]
    assert 900 < len(kept) < 1150  # 1,024 of 9,216 on average
    shared = np.intersect1d(kept, other)
    assert 190 < len(shared) < 280  # 46 x 46 windows of 9,216
    inside = np.zeros((96, 96), bool)
    inside[3:49, 7:53] = True
    np.testing.assert_array_equal(np.sort(one.reshape(96, 96)[inside & (one.reshape(96, 96) != 0)]), shared)


def test_counts_are_of_images_and_a_score_leaves_the_image_itself_out() -> None:
    hashes = np.array([[5, 5, 7, 0], [5, 9, 7, 0], [5, 8, 8, 0], [1, 2, 3, 0]], np.uint64)
    table = count_images([hashes[:2], hashes[2:]])
    assert [each.tolist() for each in table] == [[5, 7], [3, 2]]
    every, none = np.ones(4, bool), np.zeros(4, bool)
    assert sharing(hashes, table, every).tolist() == [2, 2, 2, 0]
    assert sharing(hashes, table, none).tolist() == [3, 3, 3, 0]
    pair = np.array([[7, 0]], np.uint64)
    assert sharing(pair, table, none[:1]).tolist() == [2]
    assert sharing(pair, table, every[:1]).tolist() == [0], "one other alone"
    nothing = count_images([])
    assert [len(each) for each in nothing] == [0, 0]
    assert sharing(hashes, nothing, every).tolist() == [0] * 4


def test_pasted_patches_are_found() -> None:
    """All poisons and nothing else, at 1%; each shares its patch with the five others."""
    scores = scored(with_patch())
    assert scores[POISONS].tolist() == [5] * 6
    assert scores[OTHERS].max() == 0


@pytest.mark.parametrize("size", [5, 12])
def test_patches_of_other_sizes_are_found(size: int) -> None:
    scores = scored(with_patch(size))
    assert scores[POISONS].min() > scores[OTHERS].max()


def test_a_clean_set_has_nothing() -> None:
    assert scored(SHAPES.images).max() == 0


def test_a_patch_that_went_through_jpeg_or_was_resized_is_not_seen() -> None:
    stored, resized = with_patch(12), with_patch(12)
    for row in POISONS:
        pixels = np.ascontiguousarray(stored[row].transpose(1, 2, 0))
        stored[row] = decode_image(encode_jpeg(pixels, 95), "a").transpose(2, 0, 1)
        small = Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR)
        resized[row] = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert scored(stored).max() == 0
    assert scored(resized).max() == 0


def test_a_trigger_that_depends_on_the_image_is_not_seen() -> None:
    images = SHAPES.images.copy()
    trigger = FrequencyTrigger(magnitude=50, test_magnitude=50, window=32, positions=(15, 31))
    images[POISONS] = apply_to_uint8(trigger, images[POISONS])
    assert scored(images).max() == 0


def test_windows_are_counted_in_a_draw() -> None:
    images = SHAPES.images.copy()
    images[::3] = with_patch(7)[POISONS[0]]
    few = [scored(images, seed, sample=90) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])
    for scores in few:
        assert 15 < scores[::3].min() <= scores.max() < 50  # 30 on average
        assert len(np.unique(scores[::3])) == 2, "those that were counted have one other less"
        assert scores[1::3].max() == 0
    np.testing.assert_array_equal(scored(images, 0), scored(images, 1))


def test_a_score_goes_with_its_image_and_nothing_is_changed() -> None:
    images = with_patch()
    images.setflags(write=False)
    before, order = images.copy(), np.random.default_rng(0).permutation(600)
    np.testing.assert_array_equal(scored(images[order]), scored(images)[order])
    np.testing.assert_array_equal(images, before)


def test_what_cannot_be_screened_is_refused() -> None:
    assert scored(SHAPES.images[:3]).tolist() == [0, 0, 0]
    with pytest.raises(InputRefused, match=r"2 images, .* give 3 or more"):
        scored(SHAPES.images[:2])
    schema = signature_schema(RepeatedWindows, "repeated_windows")
    for key, value in (("window", 1), ("texture", -1), ("sample", 2)):
        with pytest.raises(ConfigError, match=key):
            validate(schema, {key: value}, "defense")
