"""Local density: poisons lie in sparser surroundings than their neighbours do (Huang et al., ICLR 2025)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.pseudo_classes import Rows, Vectors, suspect_features, unit
from blto.errors import ConfigError, InputRefused
from blto.evaluation.neighbours import nearest
from blto.models.encoder import Encoder
from blto.registry import Card
from blto.runtime.seeds import numpy_generator

Measure = Literal["k_distance", "slof", "dao"]

LEAST_DISTANCE = 1e-3
"""Smaller distances count as this one: products of float32 features of length 1 tell no finer ones apart."""
LARGEST_DIMENSION = 1e3
"""Of a neighbourhood all of whose distances are the same, where the estimate is infinite."""


def neighbourhoods(points: Vectors, k: int) -> tuple[Scores, Rows]:
    """Distances (n, k) from each row of length 1 to its k nearest other rows, ascending, and those rows' indices."""
    keys, begin = torch.from_numpy(points), 0
    distances, indices = np.empty((len(points), k)), np.empty((len(points), k), np.int64)
    for products, found in nearest(keys, keys, k + 1):
        rows = slice(begin, begin + len(found))
        own = torch.arange(rows.start, rows.stop)[:, None]
        ordered = torch.where(found == own, torch.inf, products).sort(dim=1, descending=True, stable=True)
        cosines = ordered.values[:, 1:].double()  # without the row itself
        distances[rows] = (2 - 2 * cosines).clamp_(min=LEAST_DISTANCE**2).sqrt_()
        indices[rows] = found.gather(1, ordered.indices[:, 1:])
        begin = rows.stop
    return distances, indices


def intrinsic_dimension(distances: Scores) -> Scores:
    """Maximum-likelihood estimate of the local intrinsic dimension from ascending distances (n, k): (n,)."""
    spread = -np.log(distances / distances[:, -1:]).mean(axis=1)
    dimensions: Scores = 1 / np.maximum(spread, 1 / LARGEST_DIMENSION)
    return dimensions


def sparsity(distances: Scores, indices: Rows, measure: Measure) -> Scores:
    """How sparse the surroundings of each row are: (n,). See `LocalDensity` for the three measures."""
    reach = distances[:, -1]
    if measure == "k_distance":
        return reach
    ratios: Scores = reach[:, None] / reach[indices]
    if measure == "dao":
        ratios = intrinsic_dimension(distances)[indices] * np.log(ratios)
    scores: Scores = ratios.mean(axis=1)
    return scores


class LocalDensity(DatasetFilter):
    """Compare how far an image's nearest neighbours are with how far theirs are.

    Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining" (DBCL), ICLR 2025, arXiv
    2502.01385, applies three known outlier measures to the image features of CLIP. With r(x) the distance between
    features of length 1 of x and of its k-th nearest neighbour:

    - k_distance: r(x).
    - slof, the simplified local outlier factor: the mean of r(x) / r(y) over the k nearest neighbours y.
    - dao, dimensionality-aware outlier detection (Anderberg et al., SDM 2024): the mean of
      d(y) * log(r(x) / r(y)), where d(y) is the local intrinsic dimension at y, estimated by maximum likelihood.

    As in their code, neighbours are sought among the images of a random batch, so that only a few poisons are there;
    and `dao` is a mean of logarithms, where its definition is a mean of the powers (r(x) / r(y))^d(y).

    Where this differs from the authors' code: every image is in one batch, and batches are equally large; the neighbour
    of rank k is the same for an image and for its neighbours, where theirs is one further for the image; equal features
    have a least distance, where theirs score 1,000.

    Args:
        measure: one of the three.
        neighbours: k (the code: 16).
        batch_size: images among which neighbours are sought, or a few more (the code: two pretraining batches of
            1,024); null is the whole set, with work that grows with its square.
    """

    card = Card(
        "Local density",
        "whether the surroundings of an image are sparser than those of its neighbours",
        "arXiv 2502.01385",
        2025,
        "the training set without labels and the encoder pretrained on it",
    )
    evidence = Evidence(
        "It finds no poisons: those of the patch and of BLTO lie closer together than clean images, not apart.",
        must_show="test_feature_filters::test_measures_are_their_definitions",
    )

    def __init__(
        self,
        *,
        measure: Measure = "dao",
        neighbours: Annotated[int, Field(ge=2)] = 16,
        batch_size: Annotated[int, Field(ge=3)] | None = 2048,
    ) -> None:
        if batch_size is not None and batch_size <= neighbours:
            raise ConfigError(f"batch_size is {batch_size}; give more than the option neighbours, {neighbours}.")
        self.measure: Measure = measure
        self.neighbours, self.batch_size = neighbours, batch_size

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`. Raises InputRefused for too few images."""
        count = len(suspects)
        if count <= self.neighbours:
            raise InputRefused(
                f"{count} images and {self.neighbours} neighbours; give more images, or lower neighbours."
            )
        points = unit(suspect_features(encoder, suspects, conditions))
        order = numpy_generator(conditions.seed, "defense", "local_density").permutation(count)
        batches = np.array_split(order, max(1, count // (self.batch_size or count)))
        scores = np.empty(count)
        with conditions.progress.bar("local density", len(batches)) as advance:
            for done, rows in enumerate(batches, start=1):
                scores[rows] = sparsity(*neighbourhoods(points[rows], self.neighbours), self.measure)
                advance(done, "")
        return scores
