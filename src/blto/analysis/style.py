"""How every figure of blto looks, and the checks that their inputs share.

A figure is 4.6 inches wide with 9-point text: scaled to a telephone's 343 pixels the text is still 9 pixels high, and
in print it fits one column. One color means one thing in every figure (the Okabe-Ito palette, which stays distinct
under the common color blindnesses), and line style or marker repeats it, so nothing is lost in black and white.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from blto.errors import ConfigError
from blto.files.text import show

TRIGGERED = "#d55e00"  # vermillion: what carries the trigger, and the poisoned encoder
CLEAN = "#0072b2"  # blue: clean images of other classes
TARGET = "#009e73"  # green: the target class
TWIN = "#767c88"  # gray: the clean twin
OTHERS = ("#56b4e9", "#cc79a7", "#e69f00")  # sky, pink, orange: classes that only give context
INK, MUTED, GRID = "#20242c", "#5c6370", "#dfe2e8"

WIDTH = 4.6  # inches

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib, so the layout is the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$"
    "axes.formatter.useoffset": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.facecolor": "none",  # the page shows through, light or dark
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's font
    "svg.hashsalt": "blto",  # the same figure has the same ids, hence the same bytes
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function in blto's style, leaving the caller's matplotlib settings alone.

    A name in a script that DejaVu Sans lacks is no fault: the SVG holds text, and whoever shows it has the glyphs.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)  # type: ignore[arg-type]  # the stubs list every key as a literal
            return function(*args, **kwargs)

    return wrapper


def new_figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the common width and `height` inches, with `rows` axes above each other and one x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, [row[0] for row in axes]


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend of `axes` under the figure, where it hides no data at any width."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    # matplotlib lists lines before bars; the bars are what the figure is about
    handles, labels = zip(*sorted(entries, key=lambda entry: not isinstance(entry[0], BarContainer)), strict=True)
    place: Any = {"loc": "outside lower center", "ncols": columns, "scatteryoffsets": [0.5]}
    figure.legend(handles, labels, columnspacing=1.6, handlelength=2.4, **place)


def column(values: ArrayLike, name: str, length: int | None = None) -> NDArray[np.float64]:
    """`values` as a vector of finite floats. Raises ConfigError if it is not one, is empty, or has another length."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ConfigError(
            f"{name} has shape {array.shape} and {np.isnan(array).sum()} NaN; give finite numbers in a row."
        )
    if length is not None and len(array) != length:
        raise ConfigError(f"{name} has {len(array)} values where {length} are needed; give one for each point.")
    return array


def labels_for(labels: Sequence[str], length: int) -> list[str]:
    """The labels, safe to show, if there are `length` of them. Raises ConfigError otherwise."""
    if len(labels) != length:
        raise ConfigError(f"{len(labels)} labels for {length} entries; give one for each.")
    shown = [show(label, 40) for label in labels]
    # matplotlib leaves a label that begins with "_" out of the legend
    return [f" {label}" if label.startswith("_") else label for label in shown]
