"""Classes for a training set without labels: k-means on the features of an encoder that was pretrained on it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from blto.defenses.base import Conditions, Images, Scores
from blto.errors import Diverged, InputRefused
from blto.evaluation.features import device_of, extract
from blto.models.encoder import Encoder
from blto.runtime.seeds import stream_seed

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

STARTS = 3
"""k-means begins so often, and the tightest clusters count."""


def suspect_features(encoder: Encoder | None, suspects: Images, conditions: Conditions) -> Vectors:
    """Features float32 (N, D) of a training set; the encoder is left where it lay."""
    assert encoder is not None  # `score_dataset` refuses to go without
    place = device_of(encoder)
    try:
        vectors: Vectors = extract(encoder.to(conditions.device), suspects).vectors.numpy()
        return vectors
    finally:
        encoder.to(place)


def unit(vectors: Vectors) -> Vectors:
    """Every row with length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def k_means(points: npt.NDArray[Any], count: int, seed: int) -> tuple[Rows, npt.NDArray[Any]]:
    """Each row's cluster (N,) and the centres (count, D); where fewer rows differ, some clusters are empty."""
    from sklearn.cluster import KMeans  # half a second to import, and only these defenses need it
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit(points)
    return fitted.labels_.astype(np.int64), fitted.cluster_centers_


def pseudo_classes(vectors: Vectors, count: int, conditions: Conditions) -> list[Rows]:
    """The rows of each pseudo-class, none of them empty: k-means on features of length 1, so by their cosine.

    Raises:
        InputRefused: fewer images than classes.
        Diverged: fewer different features than classes.
    """
    if len(vectors) < count:
        raise InputRefused(f"{len(vectors)} images for {count} pseudo-classes; lower the defense's option classes.")
    labels, _ = k_means(unit(vectors), count, stream_seed(conditions.seed, "defense", "pseudo_classes"))
    rows = [np.flatnonzero(labels == label) for label in range(count)]
    if not all(len(each) for each in rows):
        raise Diverged(
            f"{len(vectors)} images have fewer than {count} different features; the encoder collapsed: pretrain it "
            f"anew, or lower the defense's option classes."
        )
    return rows


def principal(vectors: Vectors, count: int) -> Scores:
    """Coordinates float64 (n, count) of the centred rows along their top singular directions, the first the top one."""
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    coordinates: Scores = centred @ directions[:, : -count - 1 : -1]
    return coordinates
