"""Saved figures: the CSV beside the SVG holds exactly what is drawn, and opens in a spreadsheet without harm."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from blto.analysis import record_figures, save_figure
from blto.analysis.save import csv_text, safe_cell
from blto.errors import ConfigError
from blto.records import Metric, RunRecord

ROWS: list[dict[str, Any]] = [
    {"epoch": e, "trigger": 0.1 + e / 30, "clean": -0.1, "target": 0.7, "alignment": 1.0 - e / 40, "uniformity": -2.5}
    for e in (0, 10, 20)
]
JUDGED: list[dict[str, Any]] = [
    {
        **row,
        "linear_asr": 0.1 + row["epoch"] / 40,
        "knn_asr": 0.2,
        **{f"{probe}_{name}": 0.7 for probe in ("linear", "knn") for name in ("untriggered_rate", "clean_accuracy")},
    }
    for row in ROWS
]
CRAFTING: list[dict[str, Any]] = [
    {"step": r, "period": r // 20, "trigger": 0.2, "clean": 0.0, "target": 0.5} for r in (10, 20, 30, 40)
]


def record(**changes: Any) -> RunRecord:
    metrics = {
        "linear": {"asr": Metric(value=0.8, low=0.7, high=0.9, n=90), "asr_clean_twin": Metric(value=0.1, n=90)},
        "knn": {"asr": Metric(value=None, n=0)},
    }
    fields: dict[str, Any] = {"run_id": "r", "spec": {}, "took": False, "metrics": metrics, "trajectory": ROWS}
    return RunRecord(**{**fields, "trajectory_clean_twin": ROWS[:2], "crafting": CRAFTING, **changes})


def read(path: Path) -> dict[str, list[str]]:
    header, *rows = csv.reader(io.StringIO(path.read_text()))
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def lines(figure: Figure, label: str) -> list[tuple[float, float]]:
    found = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for line in found for x, y in np.asarray(line.get_xydata())]


def test_the_csv_holds_the_plotted_points(tmp_path: Path) -> None:
    figure, data = record_figures(record())["similarity_trajectory"]
    svg, table = save_figure(figure, tmp_path / "deep" / "similarity.v2", data)
    assert (svg.name, table.name) == ("similarity.v2.svg", "similarity.v2.csv")
    assert svg.read_text().startswith("<?xml")
    columns = read(table)
    rows = list(zip(columns["encoder"], columns["epoch"], columns["trigger"], strict=True))
    poisoned = [(float(x), float(y)) for encoder, x, y in rows if encoder == "poisoned"]
    twin = [(float(x), float(y)) for encoder, x, y in rows if encoder == "clean twin"]
    assert poisoned == lines(figure, "triggered, poisoned")
    assert twin == lines(figure, "triggered, clean twin")
    assert columns["target"] == ["0.7", "0.7", "0.7", "", ""]


def test_success_over_training_has_a_panel_a_probe_that_judged_every_epoch() -> None:
    figure, data = record_figures(record(trajectory=JUDGED, trajectory_clean_twin=JUDGED[:2]))["asr_trajectory"]
    linear, knn = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["linear probe", "knn probe"]
    shown = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in linear.get_lines()}
    assert shown["ASR, poisoned"] == [0.1, 0.35, 0.6]
    assert shown["ASR, clean twin"] == [0.1, 0.35]
    assert len(knn.get_lines()) == len(linear.get_lines())
    assert data["probe"] == ["linear"] * 5 + ["knn"] * 5
    assert data["encoder"] == (["poisoned"] * 3 + ["clean twin"] * 2) * 2
    assert data["asr"] == [0.1, 0.35, 0.6, 0.1, 0.35] + [0.2] * 5
    without = [{key: value for key, value in row.items() if not key.startswith("knn")} for row in JUDGED]
    both = record(trajectory=[*JUDGED[:2], without[2]], trajectory_clean_twin=JUDGED[:2])
    assert record_figures(both)["asr_trajectory"][1]["probe"].count("knn") == 4  # epochs that it has judged
    assert len(record_figures(record(trajectory=without))["asr_trajectory"][0].axes) == 1
    assert "asr_trajectory" not in record_figures(record(trajectory=ROWS))


def test_the_displacement_stands_beside_the_clean_twins() -> None:
    rows = [{**row, "shift": row["epoch"] / 10, "advance": 0.5 - row["epoch"] / 40} for row in ROWS]
    figure, data = record_figures(record(trajectory=rows, trajectory_clean_twin=rows[:2]))["displacement_trajectory"]
    assert data["shift"] == [0, 1, 2, 0, 1]
    assert data["advance"] == [0.5, 0.25, 0, 0.5, 0.25]
    assert lines(figure, "poisoned") == [(0, 0), (10, 1), (20, 2), (0, 0.5), (10, 0.25), (20, 0)]
    assert lines(figure, "clean twin") == [(0, 0), (10, 1), (0, 0.5), (10, 0.25)]
    collapsed = [rows[0], ROWS[1], rows[2]]
    assert record_figures(record(trajectory=collapsed))["displacement_trajectory"][1]["epoch"] == [0, 20]
    assert "displacement_trajectory" not in record_figures(record())  # of records that have not measured it


def test_all_figures_of_a_record_with_their_numbers() -> None:
    figures = record_figures(record())
    assert list(figures) == ["similarity_trajectory", "alignment_uniformity", "crafting_curve", "metric_bars"]
    assert figures["alignment_uniformity"][1]["alignment"] == [1.0, 0.75, 0.5, 1.0, 0.75]
    assert figures["crafting_curve"][1]["period"] == [0, 1, 1, 2]
    starts = {x for x, _ in lines(figures["crafting_curve"][0], "surrogate starts anew")}
    assert starts == {20.0}  # of the two restarts the first carries the label
    bars = figures["metric_bars"][1]
    assert bars == {
        "probe": ["linear", "knn"],
        "asr": [0.8, None],
        "low": [0.7, None],
        "high": [0.9, None],
        "asr_clean_twin": [0.1, None],
        "n": [90, 0],
    }


@pytest.mark.parametrize("trajectory", [[], [{"epoch": 1}], [*ROWS, {**ROWS[0], "clean": None, "alignment": None}]])
def test_what_was_not_measured_is_not_drawn(trajectory: list[dict[str, Any]]) -> None:
    assert record_figures(record(trajectory=trajectory, metrics={}, crafting=[])) == {}


def test_a_record_without_a_twin_is_drawn_without_one() -> None:
    figure, data = record_figures(record(trajectory_clean_twin=[]))["alignment_uniformity"]
    assert data["encoder"] == ["poisoned"] * 3
    assert not lines(figure, "clean twin")


def test_floats_read_back_exactly_and_columns_are_equally_long() -> None:
    text = csv_text({"x": np.array([0.1 + 0.2, 1 / 3]), "n": [1, None]})
    assert text == "x,n\n0.30000000000000004,1\n0.3333333333333333,\n"
    with pytest.raises(ConfigError, match="differ in length"):
        csv_text({"x": [1], "y": []})


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_no_cell_is_a_formula_and_no_cell_breaks_the_table(text: str) -> None:
    rows = list(csv.reader(io.StringIO(csv_text({text: [text], f"{text} n": [-1.5]}))))
    assert len(rows) == 2
    assert rows[1][1] == "-1.5"
    assert not rows[0][0].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert rows[0][0] == rows[1][0] == safe_cell(text)


@pytest.mark.parametrize("cell", ["=cmd|'/c calc'!A0", "+1", "-1", "@SUM(A1)"])
def test_formulas_get_a_quote(cell: str) -> None:
    assert safe_cell(cell) == f"'{cell}"
