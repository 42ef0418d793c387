"""Spectral signatures: poisons stand out along the direction in which their class varies most (Tran et al., 2018)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.pseudo_classes import Vectors, principal, pseudo_classes, suspect_features
from blto.models.encoder import Encoder
from blto.registry import Card


def outlier_scores(vectors: Vectors) -> Scores:
    """Squared projection of each centred row (n, D) on the top right singular vector of all of them: (n,)."""
    scores: Scores = principal(vectors, 1)[:, 0] ** 2
    return scores


class SpectralSignatures(DatasetFilter):
    """Score an image by how far it lies along the top singular direction of its pseudo-class.

    Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv 1811.00636, algorithm 1: for the
    features f of one class with mean m, and v the top right singular vector of the rows f - m, the score is
    ((f - m) . v)^2. It finds poisons that are a minority of their class and shift its features in one direction.

    Where this differs from the authors' code: they have a supervised classifier and its labels, where here the whole
    set is one class, or k-means on the encoder's features stands in for the labels; they remove from each class 1.5
    times as many images as may be poisons, where here nothing is removed and the scores of all classes are on one
    scale, that of the features.

    Args:
        classes: pseudo-classes of k-means; 1 takes the whole set as one. Poisons that fill a pseudo-class of their own,
            as they do where contrastive pretraining has bound a trigger, are no outliers in it, and are not found.
    """

    card = Card(
        "Spectral signatures",
        "how far an image lies along the direction in which its class varies most",
        "arXiv 1811.00636",
        2018,
        "the training set without labels and the encoder pretrained on it",
    )
    evidence = Evidence(
        "It finds the patch at 9.9% and 5% in six of six sets, with pseudo-classes in none of four; at 2% and less "
        "neither finds enough to remove; of BLTO the default finds more than half on one set for frogs, and too little "
        "for trucks, airplanes, or where it hides; it was chosen on four of these sets.",
        must_show="test_feature_filters::test_a_spectral_score_is_the_squared_projection_within_the_pseudo_class",
        positive="test_feature_filters::test_poisons_that_fill_a_pseudo_class_are_found_in_the_whole_set_alone",
    )

    def __init__(self, *, classes: Annotated[int, Field(ge=1)] = 1) -> None:
        self.classes = classes

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`. Raises InputRefused for fewer images than classes."""
        vectors = suspect_features(encoder, suspects, conditions)
        scores = np.empty(len(vectors))
        for rows in pseudo_classes(vectors, self.classes, conditions):
            scores[rows] = outlier_scores(vectors[rows])
        return scores
