"""Figures to files: SVG whose bytes depend on the figure alone, and the plotted numbers beside it as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from blto.analysis.style import styled
from blto.errors import ConfigError
from blto.files.atomic import atomic_write
from blto.files.text import show

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]


def save_figure(figure: Figure, path: Path, data: Columns) -> tuple[Path, Path]:
    """Write `<path>.svg` and `<path>.csv`; returns both. The folder must exist.

    Args:
        figure: any figure of this package.
        path: where, without a suffix.
        data: column name -> values; all columns are equally long.

    Raises:
        ConfigError: columns of different lengths.
        ResourceExhausted: no room, or no right to write there.
    """
    svg, table = path.with_name(path.name + ".svg"), path.with_name(path.name + ".csv")
    content = csv_text(data)
    atomic_write(svg, svg_text(figure).encode())
    atomic_write(table, content.encode())
    return svg, table


@styled
def svg_text(figure: Figure) -> str:
    """The figure as SVG: text stays text, ids come from the content, no date and no version inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()


def csv_text(data: Columns) -> str:
    """Columns as CSV, one header row; floats are written so that they read back exactly."""
    if len({len(values) for values in data.values()}) > 1:
        lengths = {name: len(values) for name, values in data.items()}
        raise ConfigError(f"columns differ in length ({lengths}); give one value per row in each.")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([safe_cell(name) for name in data])
    writer.writerows([safe_cell(cell) for cell in row] for row in zip(*data.values(), strict=True))
    return buffer.getvalue()


def safe_cell(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a quote in front; numbers pass, None is an empty cell."""
    if isinstance(cell, str):
        text = show(cell)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return cell.item() if hasattr(cell, "item") else cell
