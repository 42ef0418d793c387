"""The figures made from test images and their features: what the trigger looks like, and where it takes images."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from blto.analysis.embedding import embed, embedding_map
from blto.analysis.images import residual_grid, residual_table

SHOWN = 6  # images in the residual grid
MAPPED = 150  # points of each group in the embedding map
PERPLEXITY = 30.0


def test_set_figures(
    originals: NDArray[np.uint8],
    triggered: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
    target_class: int,
    *,
    features: ArrayLike,
    triggered_features: ArrayLike,
) -> dict[str, tuple[Figure, dict[str, list[Any]]]]:
    """Name -> (figure, plotted columns): "residual_grid" and, where there are points enough, "embedding_map".

    Args:
        originals, triggered: the test images before and after the trigger, uint8 (N, 3, H, W).
        labels: their classes (N,).
        class_names: one name per class.
        target_class: the attack's.
        features, triggered_features: (N, D) of both on the encoder under attack.
    """
    other_classes = [label for label in np.unique(labels) if label != target_class]
    shown = [int(np.flatnonzero(labels == label)[0]) for label in other_classes[:SHOWN]]
    figures: dict[str, tuple[Figure, dict[str, list[Any]]]] = {}
    if shown:
        before, after = originals[shown], triggered[shown]
        figures["residual_grid"] = (residual_grid(before, after), dict(residual_table(before, after)))
    groups = [np.flatnonzero(labels == label)[:MAPPED] for label in (target_class, *other_classes[:3])]
    changed = np.flatnonzero(labels != target_class)
    changed = changed[np.linspace(0, len(changed) - 1, min(MAPPED, len(changed))).astype(int)]
    if sum(map(len, groups)) + len(changed) > PERPLEXITY:
        vectors = np.concatenate(
            [np.asarray(features)[np.concatenate(groups)], np.asarray(triggered_features)[changed]]
        )
        sizes = [*map(len, groups), len(changed)]
        numbers = np.repeat(np.arange(len(sizes)), sizes)
        names = [class_names[label] for label in (target_class, *other_classes[:3])] + ["triggered"]
        points = embed(vectors, perplexity=PERPLEXITY)
        columns = {
            "x": points[:, 0].tolist(),
            "y": points[:, 1].tolist(),
            "group": [names[number] for number in numbers],
        }
        figures["embedding_map"] = (embedding_map(points, numbers, names), columns)
    return figures
