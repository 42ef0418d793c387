"""A detector's scores side by side: the suspect, clean encoders, and encoders known to be backdoored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from blto.analysis.style import CLEAN, INK, TRIGGERED, column, legend_below, new_figure, styled


@styled
def score_strip(suspect: float, clean: ArrayLike, planted: ArrayLike = ()) -> Figure:
    """One dot an encoder, a row a kind; the suspect as a line through all rows.

    Args:
        suspect: its score; larger is more suspicious.
        clean: (N,) of clean encoders, N at least 1.
        planted: (M,) of encoders that were tampered with on purpose; M may be 0.

    Raises:
        ConfigError: no clean score, or one that is no number.
    """
    rows: Sequence[tuple[str, ArrayLike, str]] = [("clean", clean, CLEAN)]
    if np.size(planted):
        rows = [*rows, ("planted", planted, TRIGGERED)]
    figure, [axes] = new_figure(0.9 + 0.3 * len(rows))
    for height, (name, scores, colour) in enumerate(rows):
        x = column(scores, f"{name} scores")
        spread = 0.5 * (np.arange(len(x)) * 0.618 % 1 - 0.5)  # dots of equal scores lie apart
        axes.plot(x, height + spread, "o", color=colour, markersize=4, alpha=0.75, label=f"{name} ({len(x)})")
    axes.axvline(suspect, color=INK, linewidth=1.6, label="the suspect")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("Score (larger is more suspicious)")
    axes.grid(visible=False, axis="y")
    legend_below(figure, axes)
    return figure
