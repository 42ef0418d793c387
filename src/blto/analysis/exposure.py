"""Where does a backdoor take? Lift over poison exposures and encoder accuracy, one path a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from blto.analysis.style import INK, MUTED, column, legend_below, new_figure, styled
from blto.errors import ConfigError

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")


@dataclass(frozen=True)
class ExposurePath:
    """One poisoned training as it goes.

    Attributes:
        attack: its name; paths of one attack share a marker.
        exposures: T numbers, poisoned images seen so far, above 0: poison rate x images x epochs.
        accuracy: T fractions, clean accuracy of the encoder.
        lift: T fractions, as `evaluation.metrics` defines it, over the clean twin at the same epoch.
    """

    attack: str
    exposures: Sequence[float]
    accuracy: Sequence[float]
    lift: Sequence[float]


@styled
def exposure_map(paths: Sequence[ExposurePath], probe: str) -> Figure:
    """Every snapshot of every path as a point: where it lies, and by its colour what the poisons did until then.

    Args:
        paths: of at most twelve attacks.
        probe: what measured accuracy and lift, for the labels.

    Raises:
        ConfigError: no path, more than twelve attacks, exposures of 0, other lengths, or a number that is not finite.
    """
    attacks = list(dict.fromkeys(path.attack for path in paths))
    if not 0 < len(attacks) <= len(MARKERS):
        raise ConfigError(f"{len(attacks)} attacks; give paths of 1 to {len(MARKERS)}.")
    figure, [axes] = new_figure(4.4)
    shade = Normalize(0.0, 1.0)
    for attack, marker in zip(attacks, MARKERS, strict=False):
        axes.plot([], [], marker, color=INK, markerfacecolor="none", label=attack)
    points = None
    for path in paths:
        x = column(path.exposures, "exposures")
        y, lift = (column(values, name, len(x)) for values, name in ((path.accuracy, "accuracy"), (path.lift, "lift")))
        if (x <= 0).any():
            raise ConfigError("exposures hold 0, which a logarithmic axis cannot show; leave the start out.")
        axes.plot(x, y, color=MUTED, linewidth=0.6, zorder=1)
        points = axes.scatter(
            x,
            y,
            c=np.clip(lift, 0.0, 1.0),
            norm=shade,
            cmap="viridis_r",
            marker=MARKERS[attacks.index(path.attack)],
            s=26,
            edgecolors=INK,
            linewidths=0.4,
            zorder=2,
        )
    assert points is not None  # there is a path
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="Poison exposures (images x epochs)", ylabel=f"Clean accuracy of the encoder ({probe})")
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar = figure.colorbar(points, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.02)
    bar.set_label(f"Lift over the clean twin ({probe}; below 0 as 0)")
    legend_below(figure, axes, columns=3)
    return figure
