"""Pictures of a trigger: what it does to images, and how much of that an eye could see."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from blto.analysis.style import WIDTH, styled
from blto.errors import ConfigError

MIDDLE = 127.5  # the gray that stands for "no change" in an amplified residual


@styled
def residual_grid(
    originals: NDArray[np.uint8], triggered: NDArray[np.uint8], *, amplification: int | None = None
) -> Figure:
    """Originals, the same images triggered, and the amplified difference, one column per image (the paper's Figure 5).

    Args:
        originals: (K, 3, H, W) uint8, K from 1 to 8.
        triggered: the same shape.
        amplification: factor on the difference; by default the largest whole one that clips nothing.

    Raises:
        ConfigError: shapes or types differ, or there are not 1 to 8 images.
    """
    before, after = _checked(originals), _checked(triggered)
    if before.shape != after.shape:
        raise ConfigError(f"originals are {before.shape}, triggered {after.shape}; give two equal stacks of images.")
    factor = amplification or largest_amplification(before, after)
    rows = {
        "Original": before,
        "Triggered": after,
        f"Residual \u00d7 {factor}, gray is no change": amplified_residual(before, after, factor),
    }
    cell, title, gap = WIDTH / len(before), 0.2, 0.03  # inches
    cell_height = cell * before.shape[2] / before.shape[3]
    row_height = cell_height + title
    figure = Figure(figsize=(WIDTH, 3 * row_height))
    for row, (name, images) in enumerate(rows.items()):
        bottom = (2 - row) / 3
        figure.text(0, bottom + (cell_height + 0.06) / (3 * row_height), name, weight="bold")
        for index, image in enumerate(images):
            place = (index / len(before), bottom, (cell - gap) / WIDTH, (cell_height - gap) / (3 * row_height))
            axes = figure.add_axes(place)
            axes.imshow(image.transpose(1, 2, 0), interpolation="none", aspect="auto")
            axes.set_axis_off()
    return figure


def amplified_residual(before: NDArray[np.uint8], after: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """`factor` times the difference around middle gray, clipped to uint8."""
    difference = after.astype(np.float64) - before
    return np.clip(np.floor(MIDDLE + factor * difference + 0.5), 0, 255).astype(np.uint8)


def largest_amplification(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> int:
    """The largest whole factor at which no difference leaves the range; 1 where nothing differs."""
    largest = int(np.abs(after.astype(np.int64) - before).max(initial=0))
    return max(1, int(MIDDLE) // largest) if largest else 1


def residual_table(originals: NDArray[np.uint8], triggered: NDArray[np.uint8]) -> dict[str, list[float]]:
    """What the grid shows, as numbers: the largest and the mean absolute change of each image, in fractions of 1."""
    change = np.abs(_checked(triggered).astype(np.float64) - _checked(originals)) / 255
    return {
        "image": [float(index) for index in range(len(change))],
        "linf": change.max(axis=(1, 2, 3)).tolist(),
        "mean_absolute": change.mean(axis=(1, 2, 3)).tolist(),
    }


def _checked(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3 or not 1 <= len(array) <= 8:
        raise ConfigError(f"images are {array.dtype} {array.shape}; give uint8 (K, 3, H, W) with K from 1 to 8.")
    return array
