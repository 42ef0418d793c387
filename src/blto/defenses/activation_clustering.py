"""Activation clustering: a class with poisons falls into two clusters, and the smaller one is theirs (Chen et al.)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.pseudo_classes import Vectors, k_means, principal, pseudo_classes, suspect_features
from blto.models.encoder import Encoder
from blto.registry import Card
from blto.runtime.seeds import stream_seed


def smaller_cluster_scores(vectors: Vectors, dimensions: int, seed: int) -> Scores:
    """How clearly each row (n, D) is one of the smaller of two clusters: (n,), from -1 to 1.

    (a - b) / max(a, b) for distances a to the larger cluster's centre and b to the smaller one's, after PCA. Its
    absolute value is the row's simplified silhouette. 0 where there are no two clusters.
    """
    scores = np.zeros(len(vectors))
    if len(vectors) < 2:
        return scores
    points = principal(vectors, dimensions)
    labels, centres = k_means(points, 2, seed)
    smaller = int(np.bincount(labels, minlength=2).argmin())
    near, far = (np.linalg.norm(points - centres[label], axis=1) for label in (smaller, 1 - smaller))
    larger = np.maximum(near, far)
    np.divide(far - near, larger, out=scores, where=larger > 0)
    return scores


class ActivationClustering(DatasetFilter):
    """Split each pseudo-class in two by 2-means on ten principal components; the smaller half is suspicious.

    Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019,
    arXiv 1811.03728. There a cluster as a whole is judged: by its relative size, by the silhouette of the split, or by
    how a network trained without it classifies it. Here each image has a score, from -1 to 1: its simplified silhouette
    in the split, positive in the smaller cluster and negative in the larger one. So an image scores high in the smaller
    cluster of a clear split, and near 0 wherever the split is arbitrary.

    Where this differs from the paper: it has a supervised classifier and its labels, where here the whole set is one
    class, or k-means on the encoder's features stands in for the labels; it reduces dimensions by ICA, where here it is
    PCA.

    Args:
        classes: pseudo-classes of k-means; 1 takes the whole set as one. Poisons that fill a pseudo-class of their own
            are split like any clean class, and are not found.
        dimensions: that PCA keeps (BackdoorBench: 10); fewer where the features have fewer.
    """

    card = Card(
        "Activation clustering",
        "whether an image is in the smaller of the two clusters of its class",
        "arXiv 1811.03728",
        2018,
        "the training set without labels and the encoder pretrained on it",
    )
    evidence = Evidence(
        "It finds the patch at 9.9% in five of five sets, with pseudo-classes in none of three; at 5% and less, and of "
        "BLTO, neither finds enough to remove; the default was chosen on these sets.",
        must_show="test_feature_filters::"
        "test_a_row_of_the_smaller_cluster_scores_its_silhouette_and_others_minus_theirs",
        positive="test_feature_filters::test_poisons_that_fill_a_pseudo_class_are_found_in_the_whole_set_alone",
    )

    def __init__(
        self, *, classes: Annotated[int, Field(ge=1)] = 1, dimensions: Annotated[int, Field(ge=1)] = 10
    ) -> None:
        self.classes, self.dimensions = classes, dimensions

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`. Raises InputRefused for fewer images than classes."""
        vectors = suspect_features(encoder, suspects, conditions)
        scores = np.empty(len(vectors))
        for number, rows in enumerate(pseudo_classes(vectors, self.classes, conditions)):
            seed = stream_seed(conditions.seed, "defense", "activation_clustering", number)
            scores[rows] = smaller_cluster_scores(vectors[rows], self.dimensions, seed)
        return scores
