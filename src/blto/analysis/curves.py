"""Curves over training: how near the trigger brings an image to the target class, and what the features look like.

All similarities are cosines between mean-centred features and the centroid of the target class. Uncentred, every image
resembles every other after a ReLU and pooling, and a curve shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from blto.analysis.style import CLEAN, MUTED, TARGET, TRIGGERED, TWIN, column, legend_below, new_figure, styled
from blto.errors import ConfigError

SIMILARITY = "Cosine similarity to target class"

Twin = tuple[ArrayLike, ArrayLike]


@styled
def similarity_trajectory(
    epochs: ArrayLike, triggered: ArrayLike, clean: ArrayLike, target: ArrayLike, *, twin: Twin | None = None
) -> Figure:
    """Trigger-target similarity over the victim's training (the BLTO paper's Figure 1).

    Args:
        epochs: (T,) victim epochs at which the rest was measured.
        triggered: (T,) similarity of triggered images of other classes to the target class.
        clean: (T,) the same images without the trigger: the level of no effect.
        target: (T,) clean images of the target class: the level of full effect.
        twin: (epochs, triggered) of the clean twin, on the same triggered images.

    Raises:
        ConfigError: an argument is not a row of finite numbers, or the lengths differ.
    """
    x = column(epochs, "epochs")
    figure, [axes] = new_figure(3.3)
    axes.plot(x, column(target, "target", len(x)), color=TARGET, linestyle="--", label="target-class images")
    axes.plot(x, column(triggered, "triggered", len(x)), color=TRIGGERED, marker="o", label="triggered, poisoned")
    if twin is not None:
        twin_x = column(twin[0], "twin epochs")
        twin_y = column(twin[1], "twin triggered", len(twin_x))
        axes.plot(twin_x, twin_y, color=TWIN, marker="s", markerfacecolor="none", label="triggered, clean twin")
    axes.plot(x, column(clean, "clean", len(x)), color=CLEAN, linestyle=":", label="other classes, no trigger")
    axes.set(xlabel="Victim training (epochs)", ylabel=SIMILARITY)
    _whole_numbers(axes)
    legend_below(figure, axes)
    return figure


class ProbeTrajectory(NamedTuple):
    """What one probe says of one encoder over its training: fractions at T epochs; of a clean twin the ASR counts."""

    epochs: ArrayLike
    asr: ArrayLike
    untriggered: ArrayLike = ()
    accuracy: ArrayLike = ()


@styled
def asr_trajectory(probes: Mapping[str, tuple[ProbeTrajectory, ProbeTrajectory | None]]) -> Figure:
    """Attack success over the victim's training, beside what triggered images do to an encoder that saw no poison.

    Args:
        probes: a panel each: a probe's name -> what it says of the poisoned encoder (the ASR, the rate at which images
            of other classes go to the target class without the trigger, clean accuracy) and of the twin (the ASR).

    Raises:
        ConfigError: no probe, a value that is not finite, or lengths that differ.
    """
    if not probes:
        raise ConfigError("no probe to show; give at least one.")
    figure, panels = new_figure(1.1 + 2.2 * len(probes), rows=len(probes))
    for axes, (name, (poisoned, twin)) in zip(panels, probes.items(), strict=True):
        x = column(poisoned.epochs, "epochs")
        accuracy, asr, untriggered = (
            column(getattr(poisoned, name), name, len(x)) for name in ("accuracy", "asr", "untriggered")
        )
        axes.plot(x, accuracy, color=TARGET, linestyle="--", label="clean accuracy, poisoned")
        axes.plot(x, asr, color=TRIGGERED, marker="o", label="ASR, poisoned")
        if twin is not None:
            twin_x = column(twin.epochs, "twin epochs")
            twin_y = column(twin.asr, "twin asr", len(twin_x))
            axes.plot(twin_x, twin_y, color=TWIN, marker="s", markerfacecolor="none", label="ASR, clean twin")
        axes.plot(x, untriggered, color=CLEAN, linestyle=":", label="no trigger, poisoned")
        axes.set(ylim=(0, 1), title=f"{name} probe")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[-1].set_xlabel("Victim training (epochs)")
    _whole_numbers(panels[-1])
    legend_below(figure, panels[0])
    return figure


@styled
def alignment_uniformity(
    epochs: ArrayLike,
    alignment: ArrayLike,
    uniformity: ArrayLike,
    *,
    twin: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Figure:
    """Alignment and uniformity of the victim's features over training (Wang and Isola 2020; the paper's Figure 4).

    Args:
        epochs: (T,) victim epochs.
        alignment: (T,) mean squared distance between unit features of two views of an image, 0 to 4.
        uniformity: (T,) log of the mean Gaussian potential between images, at most 0.
        twin: (epochs, alignment, uniformity) of the clean twin.

    Raises:
        ConfigError: an argument is not a row of finite numbers, or the lengths differ.
    """
    titles = [f"{name}, lower is better" for name in ("Alignment (squared distance)", "Uniformity (log potential)")]
    return _two_panels(epochs, dict(zip(titles, (alignment, uniformity), strict=True)), twin)


@styled
def displacement_trajectory(
    epochs: ArrayLike,
    shift: ArrayLike,
    advance: ArrayLike,
    *,
    twin: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Figure:
    """Where the trigger moves images in the victim's feature space over training, as `evaluation.displacement` says.

    Args:
        epochs: (T,) victim epochs.
        shift: (T,) how far, in units of the images' own spread.
        advance: (T,) how far towards the target class; 1 is as far from the middle as its own images lie.
        twin: (epochs, shift, advance) of the clean twin.

    Raises:
        ConfigError: an argument is not a row of finite numbers, or the lengths differ.
    """
    titles = ("Shift by the trigger (1: as far as images lie apart)", "Of it towards the target class (1: all the way)")
    return _two_panels(epochs, dict(zip(titles, (shift, advance), strict=True)), twin)


@styled
def crafting_curve(
    steps: ArrayLike, triggered: ArrayLike, clean: ArrayLike, target: ArrayLike, *, restarts: Sequence[float] = ()
) -> Figure:
    """Similarities on the surrogate while the trigger is made.

    Args:
        steps: (T,) steps of the trigger.
        triggered: (T,) similarity of triggered images to the target class, on the surrogate of that step.
        clean: (T,) the same images without the trigger.
        target: (T,) clean images of the target class.
        restarts: steps at which the surrogate was initialised anew.

    Raises:
        ConfigError: an argument is not a row of finite numbers, or the lengths differ.
    """
    x = column(steps, "steps")
    figure, [axes] = new_figure(3.3)
    axes.plot(x, column(target, "target", len(x)), color=TARGET, linestyle="--", label="target-class images")
    axes.plot(x, column(triggered, "triggered", len(x)), color=TRIGGERED, label="triggered")
    axes.plot(x, column(clean, "clean", len(x)), color=CLEAN, linestyle=":", label="other classes, no trigger")
    for index, start in enumerate(restarts):
        label = "surrogate starts anew" if index == 0 else None
        axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label=label)
    axes.set(xlabel="Steps of the trigger", ylabel=SIMILARITY)
    _whole_numbers(axes)
    legend_below(figure, axes)
    return figure


def _two_panels(
    epochs: ArrayLike, values: Mapping[str, ArrayLike], twin: tuple[ArrayLike, ArrayLike, ArrayLike] | None
) -> Figure:
    """Two quantities of the victim over training, above each other, beside its clean twin's; `values`: by title."""
    x = column(epochs, "epochs")
    figure, panels = new_figure(4.2, rows=2)
    for index, (axes, (title, plotted)) in enumerate(zip(panels, values.items(), strict=True)):
        axes.plot(x, column(plotted, title, len(x)), color=TRIGGERED, marker="o", label="poisoned")
        if twin is not None:
            twin_x = column(twin[0], "twin epochs")
            twin_y = column(twin[1 + index], f"twin {title}", len(twin_x))
            axes.plot(twin_x, twin_y, color=TWIN, marker="s", markerfacecolor="none", label="clean twin")
        axes.set_title(title)
    panels[-1].set_xlabel("Victim training (epochs)")
    _whole_numbers(panels[-1])
    legend_below(figure, panels[0])
    return figure


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
