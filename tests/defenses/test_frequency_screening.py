"""Frequency screening: its arithmetic, that planted frequencies are found, and that clean sets have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch

from blto.data.images import ImageSet
from blto.data.synthetic import Synthetic
from blto.defenses.base import Conditions, Images, Scores, score_dataset
from blto.defenses.frequency_screening import FrequencyScreening, coefficients, largest_deviation, typical
from blto.errors import ConfigError, InputRefused
from blto.poisoning import FrequencyTrigger, apply_to_uint8
from blto.registry import signature_schema, validate

SHAPES = Synthetic(train_size=600).load("train")
POISONS = np.arange(50, 600, 100)  # 1%: six of 600
YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])


def screened(images: Images, seed: int = 0, **options: int) -> Scores:
    given = replace(SHAPES, images=images, labels=np.zeros(len(images), np.int64))
    return score_dataset(FrequencyScreening(**options), given, None, Conditions(seed))


def with_ctrl(magnitude: float, rows: np.ndarray = POISONS) -> Images:
    trigger = FrequencyTrigger(magnitude=magnitude, test_magnitude=magnitude, window=32, positions=(15, 31))
    images = SHAPES.images.copy()
    images[rows] = apply_to_uint8(trigger, images[rows])
    return images


def auroc(scores: Scores, rows: np.ndarray = POISONS) -> float:
    """The chance that a poison has a larger score than a clean image."""
    clean = np.delete(scores, rows)
    return float((scores[rows][:, None] > clean).mean() + 0.5 * (scores[rows][:, None] == clean).mean())


def test_the_score_is_what_the_definition_says() -> None:
    """Against scipy's DCT and numpy's medians; 599 images, so that a median is one of them."""
    images = SHAPES.images[:599]
    found = scipy.fft.dctn(np.einsum("dc,nchw->ndhw", YUV, images.astype(np.float64)), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(coefficients(torch.from_numpy(images)).numpy(), found, atol=1e-9)
    median = np.median(found, axis=0)
    spread = 1.4826 * np.median(np.abs(found - median), axis=0)
    least = np.sqrt((YUV**2).sum(axis=1) / 12)  # of uniform errors in [-0.5, 0.5] of R, G and B
    z = (found - median) / np.maximum(spread, least[:, None, None])
    np.testing.assert_allclose(screened(images), np.sqrt((z**2).sum(axis=1).max(axis=(1, 2))), rtol=2e-3)


def test_deviations_at_one_frequency_add_up_and_those_at_several_do_not() -> None:
    found = torch.zeros(4, 3, 8, 8)
    found[1, 1, 5, 5] = 3
    found[2, 1, 5, 5], found[2, 2, 5, 5] = 3, -4
    found[3, 1, 5, 5], found[3, 2, 5, 6] = 3, -4
    spread = torch.full((3, 8, 8), 2.0)
    assert largest_deviation(found + 7, torch.full((3, 8, 8), 7.0), spread).tolist() == [0, 1.5, 2.5, 2]


def test_medians_are_not_moved_by_a_minority() -> None:
    known = torch.randn(1001, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 20 + 5
    known[:200] += 10_000
    median, spread = typical(known)
    assert (median - 5).abs().max() < 10  # 6.4 is the 62.5th percentile of the others
    assert 20 < spread.min() <= spread.max() < 35
    _, least = typical(torch.zeros(11, 3, 4, 4))
    assert least[:, 0, 0].tolist() == pytest.approx([0.1930, 0.1569, 0.2334], abs=1e-4), "rounding alone, never 0"


def test_ctrl_is_found() -> None:
    assert auroc(screened(with_ctrl(50))) > 0.995
    scores = screened(with_ctrl(100))
    assert scores[POISONS].min() > np.delete(scores, POISONS).max()


def test_a_patch_of_fine_detail_is_found() -> None:
    images = SHAPES.images.copy()
    images[POISONS, 0, 10:18, 10:18] = 255 * (np.indices((8, 8)).sum(axis=0) % 2)
    assert auroc(screened(images)) > 0.99


def test_one_poison_in_eight_does_not_hide_the_others() -> None:
    rows = np.arange(0, 600, 8)
    assert auroc(screened(with_ctrl(50, rows)), rows) > 0.97


def test_a_clean_set_has_no_separation() -> None:
    """The images that are poisoned above score like the others without a trigger, and hardly any scores as a poison."""
    clean, poisoned = screened(with_ctrl(0)), screened(with_ctrl(50))
    np.testing.assert_array_equal(clean, screened(SHAPES.images))
    assert 0.2 < auroc(clean) < 0.8  # six images: the standard error is 0.12
    halves = np.arange(0, 600, 2)
    assert 0.43 < auroc(clean, halves) < 0.57  # 0.024
    assert (clean > poisoned[POISONS].min()).mean() < 0.005


def test_medians_come_from_a_draw() -> None:
    images = with_ctrl(50)
    few = [screened(images, seed, reference=60) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])
    assert all(auroc(scores) > 0.99 for scores in few)
    np.testing.assert_array_equal(screened(images, 0, reference=600), screened(images, 1, reference=5000))


def test_a_score_goes_with_its_image() -> None:
    order = np.random.default_rng(0).permutation(600)
    np.testing.assert_allclose(screened(SHAPES.images[order]), screened(SHAPES.images)[order], rtol=1e-6)


def test_gray_images_are_scored_and_nothing_is_changed() -> None:
    gray = np.repeat(SHAPES.images[:100, :1], 3, axis=1)
    gray.setflags(write=False)
    before = gray.copy()
    scores = screened(gray)
    np.testing.assert_array_equal(gray, before)
    assert np.isfinite(scores).all()
    assert scores.max() < 1000, "no deviation of U and V, where all are 0"


def test_what_cannot_be_screened_is_refused() -> None:
    assert len(screened(SHAPES.images[:10])) == 10
    with pytest.raises(InputRefused, match=r"9 images, .* give 10 or more"):
        screened(SHAPES.images[:9])
    with pytest.raises(ConfigError, match="reference"):
        validate(signature_schema(FrequencyScreening, "frequency_screening"), {"reference": 9}, "defense")


def test_images_of_other_sizes() -> None:
    images = Synthetic(train_size=60, image_size=24).load("train")
    assert isinstance(images, ImageSet)
    assert np.isfinite(score_dataset(FrequencyScreening(), images, None, Conditions())).all()
