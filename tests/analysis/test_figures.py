"""Figures: they show the numbers they are given, refuse what does not fit, and never change their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from blto.analysis import (
    ExposurePath,
    ProbeTrajectory,
    alignment_uniformity,
    asr_trajectory,
    crafting_curve,
    displacement_trajectory,
    embed,
    embedding_map,
    exposure_map,
    metric_bars,
    residual_grid,
    residual_table,
    score_strip,
    similarity_trajectory,
    svg_text,
)
from blto.analysis.images import amplified_residual, largest_amplification
from blto.errors import ConfigError

T = [0, 5, 10]
GROUPS = [0, 0, 1, 1, 2]


def pictures(seed: int = 0, count: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)


def bars(**changes: Any) -> Figure:
    given: dict[str, Any] = {"labels": ["a", "b"], "values": [0.9, 0.1], "low": [0.8, 0], "high": [1, 0.2]}
    return metric_bars(**{**given, "twin": [0.1, 0.1], "unit": "ASR", **changes})


FIGURES: dict[str, Callable[[], Figure]] = {
    "similarity": lambda: similarity_trajectory(T, [0, 0.5, 0.6], [0, 0, 0], [0.2, 0.6, 0.7], twin=(T, [0, 0.1, 0.1])),
    "success": lambda: asr_trajectory(
        {
            "linear": (
                ProbeTrajectory(T, [0, 0.5, 0.6], [0, 0, 0], [0.2, 0.6, 0.7]),
                ProbeTrajectory(T, [0, 0.1, 0.1]),
            ),
            "knn": (ProbeTrajectory(T, [0, 0.4, 0.7], [0, 0, 0], [0.2, 0.6, 0.7]), None),
        }
    ),
    "alignment": lambda: alignment_uniformity(T, [2, 1, 0.5], [-1, -2, -3], twin=(T, [2, 1, 1], [-1, -2, -2])),
    "displacement": lambda: displacement_trajectory(T, [0, 1, 2], [0.5, 0.2, 0.1], twin=(T, [0, 0.1, 0.1], [0, 0, 0])),
    "exposure": lambda: exposure_map([ExposurePath("BLTO", [1, 10, 100], [0.4, 0.5, 0.6], [0, -0.1, 0.5])], "knn"),
    "crafting": lambda: crafting_curve(T, [0, 0.5, 0.1], [0, 0, 0], [0.2, 0.6, 0.2], restarts=[10]),
    "bars": bars,
    "residual": lambda: residual_grid(pictures(), pictures(1)),
    "scores": lambda: score_strip(0.9, [0.1, 0.2, 0.2], [0.8]),
    "embedding": lambda: embedding_map(np.arange(10).reshape(5, 2), GROUPS, ["truck", "cat", "triggered"]),
}


def plotted(figure: Figure) -> dict[str, list[float]]:
    """Label -> y values of every labeled line."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {str(line.get_label()): [float(y) for y in np.asarray(line.get_ydata())] for line in lines}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_figure_has_the_same_bytes_and_no_date(name: str) -> None:
    first, second = svg_text(FIGURES[name]()), svg_text(FIGURES[name]())
    assert first == second
    assert "<dc:date>" not in first
    assert mpl.__version__ not in first


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_readable_on_a_telephone(name: str) -> None:
    figure = FIGURES[name]()
    pixels_per_point = 343 / (figure.get_figwidth() * 72)
    sizes = [float(text.get_fontsize()) for text in figure.findobj(mpl.text.Text) if text.get_text()]
    assert min(sizes) * pixels_per_point >= 8.5


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"residual"}))
def test_every_axis_says_what_it_shows(name: str) -> None:
    figure = FIGURES[name]()
    lowest = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"][-1]
    assert lowest.get_xlabel()
    assert all(axes.get_ylabel() or axes.get_title(loc="left") or axes.get_yticklabels() for axes in figure.axes)


def test_the_strip_shows_every_score_and_the_suspect_through_all_rows() -> None:
    figure = FIGURES["scores"]()
    lines = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].get_lines()}
    assert lines == {"clean (3)": [0.1, 0.2, 0.2], "planted (1)": [0.8], "the suspect": [0.9, 0.9]}
    assert len(score_strip(0.9, [0.1]).axes[0].get_lines()) == 2, "a row without a dot is left out"
    for wrong in ([], [float("nan")]):
        with pytest.raises(ConfigError):
            score_strip(0.9, wrong)


def test_drawing_leaves_the_callers_settings_alone() -> None:
    with mpl.rc_context({"font.size": 31, "svg.fonttype": "path"}):
        text = svg_text(FIGURES["bars"]())
        assert mpl.rcParams["font.size"] == 31
    assert text == svg_text(FIGURES["bars"]())
    assert "ASR (%)" in text  # text stays text


def test_the_trajectory_shows_poisoned_twin_and_both_levels() -> None:
    assert plotted(FIGURES["similarity"]()) == {
        "target-class images": [0.2, 0.6, 0.7],
        "triggered, poisoned": [0, 0.5, 0.6],
        "triggered, clean twin": [0, 0.1, 0.1],
        "other classes, no trigger": [0, 0, 0],
    }


def test_surrogates_that_start_anew_are_marked() -> None:
    marked = crafting_curve(T, [0, 0.5, 0.1], [0, 0, 0], [0.2, 0.6, 0.2], restarts=[5, 10]).axes[0]
    across = [np.asarray(line.get_xdata()) for line in marked.get_lines()]
    starts = [float(x[0]) for x in across if len(set(x.tolist())) == 1]
    assert starts == [5, 10]
    assert "surrogate starts anew" in plotted(FIGURES["crafting"]())


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, np.nan], [[0, 1, 2]], [], [0, 1, np.inf]])
def test_curves_refuse_what_is_not_one_finite_value_per_epoch(wrong: list[Any]) -> None:
    fine = [0.0, 1.0, 2.0]
    for position in range(3):
        values = [fine, fine, fine]
        values[position] = wrong
        with pytest.raises(ConfigError):
            similarity_trajectory(T, *values)
        with pytest.raises(ConfigError):
            crafting_curve(T, *values)
    with pytest.raises(ConfigError):
        alignment_uniformity(T, fine, wrong)
    with pytest.raises(ConfigError):
        similarity_trajectory(T, fine, fine, fine, twin=(T, wrong))


@pytest.mark.parametrize(
    "change", [{"labels": ["a"]}, {"low": [0.1]}, {"values": [93.1, 2.0]}, {"twin": [[0.1, 0.1]]}, {"high": []}]
)
def test_bars_refuse_percent_and_unequal_lengths(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bars(**change)


def test_a_bar_that_was_not_measured_says_so() -> None:
    nan = float("nan")
    figure = bars(values=[0.9, nan], low=[0.8, nan], high=[1.0, nan], twin=[nan, nan])
    assert [text.get_text() for text in figure.axes[0].texts] == ["not measured"]
    assert "not measured" not in svg_text(bars())


def test_residuals_are_amplified_around_gray_as_far_as_nothing_clips() -> None:
    before = np.full((1, 3, 1, 2), 100, dtype=np.uint8)
    after = before.copy()
    after[0, 0] = [[108, 92]]
    assert largest_amplification(before, after) == 15
    assert amplified_residual(before, after, 15)[0, :, 0].tolist() == [[248, 8], [128, 128], [128, 128]]
    assert largest_amplification(before, before) == 1
    assert residual_table(before, after) == {"image": [0.0], "linf": [8 / 255], "mean_absolute": [8 / 255 / 3]}


def test_the_grid_shows_the_images_themselves() -> None:
    before, after = pictures(0, 3), pictures(1, 3)
    shown = [np.asarray(axes.images[0].get_array()) for axes in residual_grid(before, after).axes]
    assert len(shown) == 9
    assert np.array_equal(shown[1], before[1].transpose(1, 2, 0))
    assert np.array_equal(shown[5], after[2].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (pictures(), pictures(count=3)),
        (pictures() / 255, pictures()),
        (pictures()[0], pictures()[0]),
        (pictures().transpose(0, 2, 3, 1), pictures().transpose(0, 2, 3, 1)),
        (pictures(count=9), pictures(count=9)),
    ],
)
def test_the_grid_refuses_what_is_not_two_equal_stacks_of_uint8_images(before: Any, after: Any) -> None:
    with pytest.raises(ConfigError, match="images"):
        residual_grid(before, after)


def test_embeddings_repeat_and_keep_clusters_apart() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(12, 5)), rng.normal(size=(12, 5)) + 20])
    points = embed(features, perplexity=5, seed=3)
    assert np.array_equal(points, embed(features, perplexity=5, seed=3))
    within = max(np.ptp(points[:12], axis=0).max(), np.ptp(points[12:], axis=0).max())
    assert np.linalg.norm(points[:12].mean(axis=0) - points[12:].mean(axis=0)) > within


@pytest.mark.parametrize("features", [np.zeros(5), np.full((9, 2), np.nan), np.zeros((5, 2))])
def test_embedding_refuses_too_few_or_broken_features(features: Any) -> None:
    with pytest.raises(ConfigError):
        embed(features, perplexity=5)


@pytest.mark.parametrize(
    ("points", "groups", "names"),
    [
        (np.zeros((5, 3)), GROUPS, ["a", "b", "c"]),
        (np.zeros((4, 2)), GROUPS, ["a", "b", "c"]),
        (np.zeros((5, 2)), GROUPS, ["a", "b"]),
        (np.zeros((5, 2)), GROUPS, ["a", "b", "c", "d", "e", "f"]),
    ],
)
def test_maps_refuse_points_without_a_named_group(points: Any, groups: Any, names: list[str]) -> None:
    with pytest.raises(ConfigError):
        embedding_map(points, groups, names)


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "<script>", "\u732b", "\x00\x1b[2J\u202e", "]]>&amp;", ""])
def test_class_names_are_drawn_as_they_are_and_never_obeyed(name: str) -> None:
    text = svg_text(embedding_map(np.zeros((5, 2)), GROUPS, ["truck", name, "triggered"]))
    assert "<script>" not in text
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    if name == "_hidden":
        assert "_hidden" in text


def test_the_exposure_map_has_a_marker_an_attack_and_a_point_a_snapshot() -> None:
    fine = [0.4, 0.5]
    paths = [ExposurePath(name, [1, 10], fine, [0.2, lift]) for name, lift in (("a", 0.9), ("b", -0.3), ("a", 0.1))]
    figure = exposure_map(paths, "knn")
    drawn = [each for each in figure.axes[0].collections if each.get_array() is not None]
    assert [list(np.asarray(each.get_array())) for each in drawn] == [[0.2, 0.9], [0.2, 0.0], [0.2, 0.1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    figure.draw_without_rendering()
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels(which="both")]
    assert "10" in ticks
    assert not any("$" in tick for tick in ticks)  # text is set as it is, without mathematics
    for wrong in (
        [],
        [ExposurePath("a", [0, 10], fine, fine)],
        [ExposurePath(str(i), [1, 10], fine, fine) for i in range(13)],
    ):
        with pytest.raises(ConfigError, match=r"exposures hold 0|attacks; give paths"):
            exposure_map(wrong, "knn")


def test_success_over_training_needs_a_probe_and_equal_lengths() -> None:
    with pytest.raises(ConfigError, match="no probe to show"):
        asr_trajectory({})
    with pytest.raises(ConfigError, match="asr"):
        asr_trajectory({"knn": (ProbeTrajectory(T, [0.1, 0.2], [0, 0, 0], [0, 0, 0]), None)})
