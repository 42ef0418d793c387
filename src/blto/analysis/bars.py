"""Bars for rates: the attack's, its interval, and the clean twin's on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from blto.analysis.style import INK, MUTED, TRIGGERED, TWIN, labels_for, legend_below, new_figure, styled
from blto.errors import ConfigError


@styled
def metric_bars(
    labels: Sequence[str], values: ArrayLike, low: ArrayLike, high: ArrayLike, *, twin: ArrayLike, unit: str
) -> Figure:
    """One bar per entry with its interval, and a mark where the clean twin stands.

    Args:
        labels: K names, drawn from top to bottom.
        values: (K,) fractions in [-1, 1]; NaN where not measured, which the figure says.
        low: (K,) lower ends of the intervals; NaN where there is none.
        high: (K,) upper ends.
        twin: (K,) the clean twin's value of the same metric; NaN where there is none.
        unit: what is measured ("Attack success rate").

    Raises:
        ConfigError: lengths differ, or a value is outside [-1, 1].
    """
    value, lower, upper, other = (_fractions(given) for given in (values, low, high, twin))
    names = labels_for(labels, len(value))
    if not len(value) or not len(value) == len(lower) == len(upper) == len(other):
        raise ConfigError("values, low, high and twin differ in length or are empty; give one of each per label.")
    figure, [axes] = new_figure(1.25 + 0.36 * len(names))
    rows = np.arange(len(names))
    axes.barh(rows, np.nan_to_num(value), height=0.46, color=TRIGGERED, label="poisoned encoder")
    for row in rows[np.isfinite(value) & np.isfinite(lower) & np.isfinite(upper)]:
        axes.plot([lower[row], upper[row]], [row, row], color=INK, linewidth=1.4, marker="|", markersize=7)
    known = np.isfinite(other)
    if known.any():
        label = "clean twin, same images"
        axes.plot(other[known], rows[known], "D", mfc="white", mec=TWIN, mew=1.6, ms=6.5, label=label)
    for row in rows[~np.isfinite(value)]:
        axes.text(0.01, row, "not measured", va="center", color=MUTED)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, float(np.nanmin([0.0, *lower, *value])) * 1.05), 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{unit} (%), bar ends with 95% interval")
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    legend_below(figure, axes)
    return figure


def _fractions(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or (np.abs(array[~np.isnan(array)]) > 1).any():
        raise ConfigError(f"rates have shape {array.shape} or leave [-1, 1]; give a row of fractions, not percent.")
    return array
