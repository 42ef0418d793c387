"""Filters on features: their arithmetic, what they find, what they cannot find, and that they only look."""

from __future__ import annotations

import copy
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.defenses.activation_clustering import ActivationClustering, smaller_cluster_scores
from blto.defenses.base import Conditions, DatasetFilter, Scores, score_dataset
from blto.defenses.local_density import LocalDensity, Measure, intrinsic_dimension, neighbourhoods, sparsity
from blto.defenses.pseudo_classes import principal, pseudo_classes, unit
from blto.defenses.spectral import SpectralSignatures, outlier_scores
from blto.errors import ConfigError, Diverged, InputRefused
from blto.models.encoder import Encoder
from blto.registry import signature_schema, validate

SIZE = 4
DIMENSIONS = 3 * SIZE * SIZE
Mask = npt.NDArray[np.bool_]
MEASURES: tuple[Measure, ...] = get_args(Measure)
ALL = [SpectralSignatures(classes=3), ActivationClustering(classes=3), LocalDensity(neighbours=5, batch_size=60)]


ByClass = SpectralSignatures | ActivationClustering


class Pixels(nn.Module):
    """The pixels are the features; batch norm and dropout are there to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIMENSIONS, eps=0)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(x.flatten(1)))
        return out


def pixel_encoder() -> Encoder:
    return Encoder(Pixels(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=SIZE).eval()


def image_set(vectors: npt.NDArray[np.float64]) -> ImageSet:
    """Images whose features are these vectors, in [0, 1]."""
    images = np.round(255 * vectors).astype(np.uint8).reshape(-1, 3, SIZE, SIZE)
    return ImageSet(images, np.zeros(len(images), np.int64), ("a",), "planted")


def classes_with_poisons(poisons: int, shift: float, *, contrast: float = 0.6) -> tuple[ImageSet, Mask]:
    """Three classes of 100, `contrast` apart in their features; the first `poisons` of one are brighter in others."""
    draw = np.random.default_rng(0)
    vectors = draw.uniform(0, 0.2, (300, DIMENSIONS))
    for label in range(3):
        vectors[100 * label : 100 * label + 100, 12 * label : 12 * label + 12] += contrast
    vectors[:poisons, -8:] += shift
    order = draw.permutation(300)
    return image_set(vectors[order]), (np.arange(300) < poisons)[order]


def found(filtering: DatasetFilter, suspects: ImageSet, mask: Mask, seed: int = 0) -> float:
    """AUROC of the scores."""
    return float(roc_auc_score(mask, score_dataset(filtering, suspects, pixel_encoder(), Conditions(seed))))


def noise(count: int, dimensions: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def test_principal_coordinates_are_those_of_a_singular_value_decomposition() -> None:
    vectors = (noise(40, 7) * np.arange(1, 8) + 5).astype(np.float32)
    left, values, _ = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64))
    assert np.allclose(np.abs(principal(vectors, 3)), np.abs(left[:, :3] * values[:3]), atol=1e-9)
    assert principal(vectors, 20).shape == (40, 7)
    assert np.allclose(outlier_scores(vectors), (left[:, 0] * values[0]) ** 2)


def test_a_spectral_score_is_the_squared_projection_within_the_pseudo_class() -> None:
    suspects, _ = classes_with_poisons(20, 0.5)
    scores = score_dataset(SpectralSignatures(classes=3), suspects, pixel_encoder(), Conditions())
    vectors = suspects.images.reshape(len(suspects), -1).astype(np.float32) / np.float32(255)
    for label in range(3):
        rows = np.flatnonzero(vectors[:, 12 * label] > 0.5)
        centred = vectors[rows].astype(np.float64) - vectors[rows].mean(axis=0, dtype=np.float64)
        direction = np.linalg.svd(centred)[2][0]
        assert np.allclose(scores[rows], (centred @ direction) ** 2, rtol=1e-3, atol=1e-6)


def test_pseudo_classes_are_the_directions_of_the_features_and_each_row_is_in_one() -> None:
    suspects, _ = classes_with_poisons(0, 0)
    vectors = suspects.images.reshape(len(suspects), -1).astype(np.float32)
    lengths = np.random.default_rng(1).uniform(0.01, 100, (len(vectors), 1)).astype(np.float32)
    rows = pseudo_classes(vectors * lengths, 3, Conditions())
    truth = [set(np.flatnonzero(vectors[:, 12 * label] > 127)) for label in range(3)]
    assert sorted(map(sorted, map(set, rows))) == sorted(map(sorted, truth))
    assert np.array_equal(pseudo_classes(vectors, 1, Conditions())[0], np.arange(len(vectors)))
    assert np.allclose(np.linalg.norm(unit(vectors), axis=1), 1)
    assert np.array_equal(unit(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))


def test_a_row_of_the_smaller_cluster_scores_its_silhouette_and_others_minus_theirs() -> None:
    smaller, larger = np.array([[9.0, 0], [11, 0]]), np.array([[-1.0, 0], [1, 0], [0, 1], [0, -1]])
    scores = smaller_cluster_scores(np.concatenate([smaller, larger]).astype(np.float32), 10, 0)
    near, far = 1.0, np.array([9.0, 11])
    assert np.allclose(scores[:2], (far - near) / far)
    away = np.sqrt(101)
    assert np.allclose(scores[2:], [-(11 - 1) / 11, -(9 - 1) / 9, -(away - 1) / away, -(away - 1) / away])


def test_a_class_that_cannot_be_split_is_not_suspicious() -> None:
    assert smaller_cluster_scores(np.ones((1, 3), np.float32), 10, 0).tolist() == [0]
    assert smaller_cluster_scores(np.ones((5, 3), np.float32), 10, 0).tolist() == [0] * 5
    assert outlier_scores(np.ones((1, 3), np.float32)).tolist() == [0]


@pytest.mark.parametrize("kind", [SpectralSignatures, ActivationClustering])
def test_a_minority_of_a_class_is_found_and_is_not_where_nothing_was_planted(kind: type[ByClass]) -> None:
    """The recall that is asked of both on a patch, and chance for the same images without it."""
    suspects, mask = classes_with_poisons(20, 0.5)
    scores = score_dataset(kind(classes=3), suspects, pixel_encoder(), Conditions())
    assert set(np.argsort(-scores)[:20]) == set(np.flatnonzero(mask))
    assert 0.35 < found(kind(classes=3), *classes_with_poisons(20, 0.0)) < 0.65


@pytest.mark.parametrize("kind", [SpectralSignatures, ActivationClustering])
def test_poisons_that_fill_a_pseudo_class_are_found_in_the_whole_set_alone(kind: type[ByClass]) -> None:
    suspects, mask = classes_with_poisons(30, 0.8, contrast=0.2)
    assert 0.3 < found(kind(classes=4), suspects, mask) < 0.7
    assert found(kind(), suspects, mask) > 0.99


def by_hand(points: npt.NDArray[np.float32], k: int) -> dict[str, Scores]:
    """The three measures of every row, each written out."""
    exact = points.astype(np.float64)
    distances = np.linalg.norm(exact[:, None] - exact[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1)[:, :k]
    near = np.take_along_axis(distances, order, axis=1)
    dimension = [-1 / np.mean([np.log(d / row[-1]) for d in row]) for row in near]
    by_measure: dict[str, list[float]] = {name: [] for name in MEASURES}
    for i in range(len(points)):
        ratios = [near[i, -1] / near[j, -1] for j in order[i]]
        by_measure["k_distance"].append(near[i, -1])
        by_measure["slof"].append(float(np.mean(ratios)))
        by_measure["dao"].append(
            float(np.mean([dimension[j] * np.log(r) for j, r in zip(order[i], ratios, strict=True)]))
        )
    return {name: np.array(values) for name, values in by_measure.items()}


@pytest.mark.parametrize("count", [9, 700])  # 700 is more than a block of `nearest`
@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_their_definitions(measure: Measure, count: int) -> None:
    points = unit(noise(count, 6))
    assert np.allclose(sparsity(*neighbourhoods(points, 5), measure), by_hand(points, 5)[measure], rtol=1e-3, atol=1e-3)


def test_an_image_is_not_its_own_neighbour_though_others_equal_it() -> None:
    points = unit(np.concatenate([np.tile(noise(1, 6), (9, 1)), noise(20, 6, seed=1)]))
    _, indices = neighbourhoods(points, 4)
    assert not (indices == np.arange(29)[:, None]).any()
    assert set(indices[:9].flatten()) <= set(range(9))


def test_the_estimate_of_a_dimension_is_near_the_truth() -> None:
    """Distances to the k nearest of points that fill a ball of m dimensions grow as u^(1/m)."""
    for dimension in (2, 8):
        distances = np.sort(np.random.default_rng(0).uniform(size=(500, 100)), axis=1) ** (1 / dimension)
        assert abs(np.median(intrinsic_dimension(distances)) / dimension - 1) < 0.05


@pytest.mark.parametrize("measure", MEASURES)
def test_features_that_are_all_the_same_are_equally_suspicious(measure: Measure) -> None:
    scores = sparsity(*neighbourhoods(unit(np.ones((8, 3), np.float32)), 4), measure)
    assert np.isfinite(scores).all()
    assert np.ptp(scores) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_images_apart_are_found_and_are_not_where_nothing_was_planted(measure: Measure) -> None:
    suspects, mask = classes_with_poisons(20, 0.0)
    filtering = LocalDensity(measure=measure, neighbours=5, batch_size=100)
    assert 0.35 < found(filtering, suspects, mask) < 0.65
    apart, draw = suspects.images.reshape(300, -1).copy(), np.random.default_rng(2)
    for row in np.flatnonzero(mask):
        apart[row, draw.choice(np.arange(12, DIMENSIONS), 4, replace=False)] += 128  # each in a direction of its own
    assert found(filtering, image_set(apart / 255), mask) > 0.95


def test_poisons_that_are_each_other_s_neighbours_are_found_in_small_batches_alone() -> None:
    suspects, mask = classes_with_poisons(12, 0.5)
    for measure in MEASURES[1:]:
        assert found(LocalDensity(measure=measure, neighbours=5, batch_size=None), suspects, mask) < 0.6
        assert found(LocalDensity(measure=measure, neighbours=5, batch_size=50), suspects, mask) > 0.9


@pytest.mark.parametrize("filtering", ALL, ids=lambda each: type(each).__name__)
def test_a_filter_only_looks_and_the_same_seed_sees_the_same(filtering: DatasetFilter) -> None:
    suspects, _ = classes_with_poisons(20, 0.5)
    encoder = pixel_encoder().train()
    encoder.backbone.get_submodule("dropout").eval()
    state, modes = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    images = suspects.images.copy()
    scores = filtering.score(suspects.images, encoder, Conditions(3))
    assert scores.shape == (300,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert np.array_equal(filtering.score(suspects.images, encoder, Conditions(3)), scores)
    assert np.array_equal(suspects.images, images)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_another_seed_draws_other_batches() -> None:
    suspects, _ = classes_with_poisons(0, 0)
    first, second = (score_dataset(ALL[2], suspects, pixel_encoder(), Conditions(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("filtering", ALL, ids=lambda each: type(each).__name__)
def test_a_set_that_cannot_be_scored_is_refused(filtering: DatasetFilter) -> None:
    suspects, _ = classes_with_poisons(0, 0)
    with pytest.raises(InputRefused, match="needs an encoder pretrained on them"):
        score_dataset(filtering, suspects, None, Conditions())
    with pytest.raises(InputRefused, match=r"^2 images (for 3 pseudo-classes|and 5 neighbours); .*lower"):
        score_dataset(filtering, image_set(np.zeros((2, DIMENSIONS))), pixel_encoder(), Conditions())


def test_a_collapsed_encoder_has_no_pseudo_classes() -> None:
    with pytest.raises(Diverged, match=r"^50 images have fewer than 3 different features; the encoder collapsed"):
        score_dataset(ALL[0], image_set(np.full((50, DIMENSIONS), 0.5)), pixel_encoder(), Conditions())


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (SpectralSignatures, {"classes": 0}),
        (ActivationClustering, {"dimensions": 0}),
        (LocalDensity, {"neighbours": 1}),
        (LocalDensity, {"measure": "lof"}),
    ],
)
def test_options_out_of_range_are_refused(kind: type[DatasetFilter], given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"defense\.{next(iter(given))}"):
        validate(signature_schema(kind, "it"), given, "defense")


def test_a_batch_without_enough_neighbours_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 16; give more than the option neighbours, 16"):
        LocalDensity(batch_size=16)
