"""A map of the feature space: do triggered images sit in the target's cluster? It proves nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from blto.analysis.style import OTHERS, TARGET, TRIGGERED, labels_for, legend_below, new_figure, styled
from blto.errors import ConfigError

MARKERS = ("s", "^", "D")


def embed(features: ArrayLike, *, perplexity: float = 30.0, seed: int = 0) -> NDArray[np.float64]:
    """t-SNE of (N, D) features to (N, 2), the same for the same features, perplexity and seed.

    Raises:
        ConfigError: features are not finite (N, D), or N is not above the perplexity.
    """
    from sklearn.manifold import TSNE  # half a second to import, and only this figure needs it
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ConfigError(f"features have shape {array.shape}; give finite numbers (N, D).")
    if len(array) <= perplexity:
        raise ConfigError(f"{len(array)} points are too few for perplexity {perplexity:g}; give more, or lower it.")
    tsne = TSNE(n_components=2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    with threadpool_limits(1):  # the sums of several threads would depend on how many there are
        return np.asarray(tsne.fit_transform(array), dtype=np.float64)


@styled
def embedding_map(points: ArrayLike, groups: ArrayLike, names: Sequence[str]) -> Figure:
    """Points of the target class, of up to three other classes and of triggered images (the paper's Figure 3).

    Args:
        points: (N, 2) from `embed`.
        groups: (N,) ints: 0 is the target class, the last is "triggered", those between are other classes.
        names: the name of each group, 2 to 5 of them.

    Raises:
        ConfigError: wrong shapes, or a group without a name.
    """
    xy, group = np.asarray(points, dtype=np.float64), np.asarray(groups)
    if xy.ndim != 2 or xy.shape[1] != 2 or group.shape != xy.shape[:1]:
        raise ConfigError(f"points are {xy.shape} and groups {group.shape}; give (N, 2) and (N,).")
    if not 2 <= len(names) <= 5 or not np.isin(group, np.arange(len(names))).all():
        raise ConfigError(f"{len(names)} names for groups up to {group.max(initial=0)}; give 2 to 5, one for each.")
    colors = [TARGET, *OTHERS[: len(names) - 2], TRIGGERED]
    markers = ["o", *MARKERS[: len(names) - 2], "x"]
    figure, [axes] = new_figure(4.4)
    for index, name in enumerate(labels_for(names, len(names))):
        chosen = xy[group == index]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=13 if markers[index] != "x" else 18,
            c=colors[index],
            marker=markers[index],
            linewidths=1.1 if markers[index] == "x" else 0,
            alpha=0.85,
            label=name,
        )
    axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[], aspect="equal")
    axes.set_adjustable("datalim")
    axes.grid(visible=False)
    legend_below(figure, axes)
    return figure
