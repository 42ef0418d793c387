"""Beatrix: its arithmetic against numpy, that a planted reaction is found, and that there is none without."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import e
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from blto.data.synthetic import Synthetic
from blto.defenses.base import Conditions, Images, Scores, score_inputs
from blto.defenses.beatrix import Beatrix, class_anomaly, deviations, gram_entries, limits
from blto.errors import ConfigError, InputRefused
from blto.models.encoder import Encoder
from blto.registry import signature_schema, validate

SHAPES = Synthetic(train_size=600, test_size=10).load("train")


def marked(images: Images, mark: int) -> Images:
    """A pixel of one gray: 0 is the trigger."""
    out = images.copy()
    out[:, :, 0, 0] = mark
    return out


CLEAN, OTHERS, VICTIMS = np.split(marked(SHAPES.images, 100), 3)
TRIGGERED = marked(VICTIMS, 0)


class Reacting(nn.Module):
    """Light and two colors, 8 x 8, a silent channel and a constant one; the trigger stirs a color at one place."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(x, 4)
        stirred = torch.zeros_like(cells[:, :2])
        stirred[:, 0, 3, 3] = self.gain * (x[:, :, 0, 0].amax(dim=1) == 0)
        silent = torch.zeros_like(cells[:, :1])
        return torch.cat([cells[:, :1], cells[:, 1:] + stirred, silent, silent + 0.5], dim=1)


def toy(gain: float = 3.0, *more: nn.Module) -> Encoder:
    return Encoder(nn.Sequential(Reacting(gain), *more), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()


def detector(**options: Any) -> Beatrix:
    return Beatrix(**{"images": 200, "classes": 4, "powers": 3, **options})


def scored(images: Images, encoder: Encoder, clean: Images = CLEAN, **options: Any) -> Scores:
    return detector(**options).score(images, encoder, clean, Conditions())


def auroc(suspicious: Scores, others: Scores) -> float:
    return float(roc_auc_score([1] * len(suspicious) + [0] * len(others), np.concatenate([suspicious, others])))


def numbers(*shape: int, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def gram_by_hand(maps: npt.NDArray[Any], power: int) -> npt.NDArray[Any]:
    count = maps.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    sums = np.array([[np.sum(image[i] ** power * image[j] ** power) for i, j in pairs] for image in maps])
    roots: npt.NDArray[Any] = np.sign(sums) * np.abs(sums) ** (1 / power)
    return roots


def limits_by_hand(entries: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Of an odd number of rows, as numpy has another median of an even one."""
    median = np.median(entries, axis=0)
    spread = 10 * np.median(np.abs(entries - median), axis=0)
    return median - spread, median + spread


def deviations_by_hand(entries: npt.NDArray[Any], low: npt.NDArray[Any], high: npt.NDArray[Any]) -> npt.NDArray[Any]:
    below, above = np.maximum(low - entries, 0) / (np.abs(low) + 1e-6), np.maximum(entries - high, 0)
    mean: npt.NDArray[Any] = (below + above / (np.abs(high) + 1e-6)).mean(axis=1)
    return mean


@pytest.mark.parametrize("power", [1, 2, 3, 8])
def test_gram_entries_are_the_upper_triangle_of_the_powers(power: int) -> None:
    maps = numbers(3, 5, 4, 4)
    wanted = gram_by_hand(maps, power)
    assert power % 2 == 0 or (wanted < 0).any()  # the root keeps the sign
    np.testing.assert_allclose(gram_entries(torch.from_numpy(maps), power), wanted, rtol=1e-4, atol=1e-5)


def test_eighth_powers_of_large_and_small_maps_are_exact() -> None:
    maps = torch.from_numpy(numbers(2, 3, 2, 2)).float()
    for scale in (1e-3, 1e4):
        wanted = scale**2 * gram_entries(maps, 8).numpy()
        np.testing.assert_allclose(gram_entries(scale * maps, 8), wanted, rtol=1e-4)


def test_limits_and_deviations_are_those_of_numpy() -> None:
    clean, others = 3 + numbers(11, 6), 3 + 20 * numbers(4, 6, seed=1)
    low, high = limits(torch.from_numpy(clean))
    wanted = limits_by_hand(clean)
    np.testing.assert_allclose(low, wanted[0])
    np.testing.assert_allclose(high, wanted[1])
    np.testing.assert_allclose(deviations(torch.from_numpy(others), (low, high)), deviations_by_hand(others, *wanted))
    assert (others < wanted[0]).any()
    assert (others > wanted[1]).any()
    assert deviations(low[None], (low, high)) == deviations(high[None], (low, high)) == 0


def test_scores_are_multiples_of_the_held_out_percentile() -> None:
    """Of one class, a tenth of whose clean images have the trigger, so that the percentile is not 0."""
    encoder, clean = toy(), np.concatenate([CLEAN[:113], TRIGGERED[5:17]])
    with torch.inference_mode():
        maps, suspects = (encoder.backbone(torch.from_numpy(part) / 255) for part in (clean, TRIGGERED[:5]))
    held_out, wanted, fold = np.zeros(125), np.zeros(5), np.arange(125) % 5
    for power in (1, 2, 3):
        entries = gram_entries(maps, power)
        wanted += deviations(gram_entries(suspects, power), limits(entries))
        for held in range(5):
            held_out[fold == held] += deviations(entries[fold == held], limits(entries[fold != held]))
    threshold = np.quantile(held_out, 0.95)
    assert threshold > 0
    np.testing.assert_allclose(scored(TRIGGERED[:5], encoder, clean, classes=1), wanted / (threshold + 1e-6), rtol=1e-3)


def test_a_planted_reaction_is_found_and_none_without() -> None:
    """200 against 200 images: the standard error of a chance AUROC is 0.03."""
    reacts, is_deaf = toy(), toy(gain=0.0)
    others = scored(OTHERS, reacts)
    assert auroc(scored(TRIGGERED, reacts), others) > 0.99
    assert 0.38 < auroc(scored(VICTIMS, reacts), others) < 0.62
    assert 0.38 < auroc(scored(TRIGGERED, is_deaf), scored(OTHERS, is_deaf)) < 0.62
    assert (scored(TRIGGERED, reacts) > 1).mean() > 0.95
    assert (others > 1).mean() < 0.15


def test_scores_do_not_depend_on_order_or_company() -> None:
    encoder, order = toy(), np.random.default_rng(0).permutation(400)
    images = np.concatenate([OTHERS, TRIGGERED])
    scores = scored(images, encoder)
    np.testing.assert_allclose(scored(images[order], encoder), scores[order], rtol=1e-3, atol=1e-3)
    parts = [scored(part, encoder) for part in (images[:1], images[1:150], images[150:])]
    np.testing.assert_allclose(np.concatenate(parts), scores, rtol=1e-3, atol=1e-3)


def test_a_small_cluster_is_no_class_and_its_images_have_finite_scores() -> None:
    """White images are a cluster of their own: of nine no class, of ten one."""
    white = np.full_like(CLEAN[:10], 255)
    red = white * np.array([1, 0, 0], np.uint8)[:, None, None]
    for count, classes in ((9, 1), (10, 2)):
        given = np.concatenate([red, red, white[:count]])
        scores, found, _ = detector(classes=2).judge(np.concatenate([white, red]), toy(), given, Conditions())
        assert np.isfinite(scores).all()
        assert len(np.unique(found)) == classes


def test_classes_are_of_direction_and_not_of_length() -> None:
    """An image's class is that of the same image at half its light."""
    encoder = Encoder(nn.AvgPool2d(8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = np.concatenate([OTHERS // 2 * 2, OTHERS // 2])
    classes = np.split(detector().judge(images, encoder, CLEAN, Conditions())[1], 2)
    np.testing.assert_array_equal(classes[0], classes[1])
    assert len(np.unique(classes)) == 4


def test_without_any_spread_scores_are_finite() -> None:
    same = np.repeat(CLEAN[:1], 60, axis=0)
    scores = scored(np.concatenate([same[:1], TRIGGERED]), toy(), same)
    assert np.isfinite(scores).all()
    assert scores[0] == 0
    assert (scores[1:] > 1).all()


def two_samples_by_hand(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    points = np.concatenate([one, other])
    squared = np.array([[np.sum((a - b) ** 2) for a in points] for b in points])
    kernel = sum(np.exp(-squared / width) for width in (np.median(squared), np.median(squared) / 2))
    sign = np.array([1 / len(one)] * len(one) + [-1 / len(other)] * len(other))
    return float(sign @ kernel @ sign * len(one) * len(other) / len(points))


def test_class_anomaly_is_the_two_sample_statistic_in_robust_deviations() -> None:
    vectors, classes = numbers(75, 3), np.repeat(np.arange(5), (5, 11, 15, 19, 25))  # odd: one median
    suspicious = np.random.default_rng(1).random(75) < 0.4
    each = [(vectors[mine & suspicious], vectors[mine & ~suspicious]) for mine in (classes == k for k in range(5))]
    above = np.array([two_samples_by_hand(*pair) for pair in each])
    above -= np.median(above)
    wanted = above / (1.4826 * np.median(np.abs(above)))
    np.testing.assert_allclose(class_anomaly(vectors, classes, suspicious), wanted, rtol=1e-3)


def test_the_class_that_two_groups_make_up_stands_out() -> None:
    vectors, classes, suspicious = numbers(500, 4), np.arange(500) % 10, np.arange(500) >= 400
    null = class_anomaly(vectors, classes, suspicious)
    vectors[(classes == 7) & suspicious] += 3
    index = class_anomaly(vectors, classes, suspicious)
    assert index.argmax() == 7
    assert index[7] > e**2 > null.max()
    assert np.sort(index)[-2] < e**2


def test_class_anomaly_of_no_suspicion_and_of_equal_vectors_is_zero() -> None:
    classes, some = np.arange(20) % 4, np.arange(20) < 5
    assert class_anomaly(numbers(20, 3), classes, np.zeros(20, bool)).tolist() == [0] * 4
    assert np.abs(class_anomaly(np.ones((20, 3)), classes, some)).max() < 1e-6


def test_the_planted_class_is_named() -> None:
    """Most triggered images go to one pseudo-class, clean ones to all."""
    encoder, images = toy(gain=30.0), np.concatenate([OTHERS, TRIGGERED])
    scores, classes, vectors = detector(classes=6).judge(images, encoder, CLEAN, Conditions())
    shares = np.bincount(classes[len(OTHERS) :], minlength=6) / len(TRIGGERED)
    assert shares.max() > 0.9
    assert vectors.shape == (400, 5)
    assert class_anomaly(vectors, classes, scores > 1).argmax() == shares.argmax()


def test_before_looks_at_the_last_map_of_more_places() -> None:
    reduced, plain = toy(3.0, nn.AvgPool2d(2), nn.ReLU()), toy(3.0)
    before, last = scored(TRIGGERED, reduced, stage="before"), scored(TRIGGERED, plain)
    np.testing.assert_allclose(before, last, rtol=1e-3)
    assert np.abs(scored(TRIGGERED, reduced) / last - 1).max() > 0.1


def test_nothing_given_is_changed_and_the_same_seed_scores_the_same() -> None:
    encoder, images, clean = toy(), TRIGGERED.copy(), CLEAN.copy()
    encoder.backbone.train()
    weights, modes = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    for given in (images, clean):
        given.setflags(write=False)
    first = scored(images, encoder, clean)
    np.testing.assert_array_equal(scored(images, encoder, clean), first)
    assert [part.training for part in encoder.modules()] == modes
    assert not any(part._forward_hooks for part in encoder.modules())
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    np.testing.assert_array_equal(images, TRIGGERED)
    np.testing.assert_array_equal(clean, CLEAN)
    unlabeled = replace(SHAPES, images=images, labels=None)
    through = score_inputs(detector(), unlabeled, encoder, replace(unlabeled, images=clean), Conditions())
    np.testing.assert_array_equal(through, first)


class Tokens(nn.Module):
    """(B, C, h, w) -> (B, hw, C), as transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def test_what_cannot_be_judged_is_refused() -> None:
    for backbone in (nn.Flatten(), nn.Sequential(nn.Conv2d(3, 4, 8, 8), Tokens(), MeanToken()), nn.AvgPool2d(32)):
        encoder = Encoder(backbone)
        with pytest.raises(InputRefused, match="does not make any; give a convolutional one"):
            scored(OTHERS, encoder)
        assert not any(part._forward_hooks for part in encoder.modules())
    with pytest.raises(InputRefused, match="more places than its last; give stage last"):
        scored(OTHERS, toy(), stage="before")
    with pytest.raises(InputRefused, match="39 clean images for 4 classes; give 10 a class or more"):
        scored(OTHERS, toy(), CLEAN[:39])
    schema = signature_schema(Beatrix, "beatrix")
    for given in ({"stage": "first"}, {"powers": 0}, {"classes": 0}, {"images": 9}):
        with pytest.raises(ConfigError, match=rf"defense\.{next(iter(given))}"):
            validate(schema, given, "defense")
