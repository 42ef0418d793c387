"""The figures that a run's record is enough for, with the numbers behind each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from blto.analysis.bars import metric_bars
from blto.analysis.curves import (
    ProbeTrajectory,
    alignment_uniformity,
    asr_trajectory,
    crafting_curve,
    displacement_trajectory,
    similarity_trajectory,
)
from blto.records import HEADLINE_PROBE, Metric, RunRecord

Columns = dict[str, list[Any]]
Entries = Sequence[dict[str, Any]]

SIMILARITIES = ("trigger", "clean", "target")
JUDGED = ("asr", "untriggered_rate", "clean_accuracy")


def record_figures(record: RunRecord) -> dict[str, tuple[Figure, Columns]]:
    """Name -> (figure, plotted columns) for everything that `record` has measured; what it has not is left out.

    Entries of `trajectory` and `trajectory_clean_twin` are read under "epoch", "alignment", "uniformity" and the
    similarities to the target class of triggered, clean and target-class images: "trigger", "clean" and "target"; and,
    which older records lack, the trigger's "shift" and "advance" (see `evaluation.displacement`) and each probe's
    "linear_asr", "linear_untriggered_rate" and "linear_clean_accuracy". Those of `crafting` are read under "step", the
    similarities, and "period", which changes when the surrogate starts anew.
    """
    makers: dict[str, Callable[[RunRecord], tuple[Figure, Columns] | None]] = {
        "asr_trajectory": _success,
        "similarity_trajectory": _similarity,
        "displacement_trajectory": _displacement,
        "alignment_uniformity": _alignment,
        "crafting_curve": _crafting,
        "metric_bars": _bars,
    }
    made = {name: maker(record) for name, maker in makers.items()}
    return {name: pair for name, pair in made.items() if pair is not None}


def _success(record: RunRecord) -> tuple[Figure, Columns] | None:
    """A panel a probe, of the epochs that it has judged; the columns have a row for each encoder, epoch and probe."""
    panels: dict[str, tuple[ProbeTrajectory, ProbeTrajectory | None]] = {}
    data: Columns = {name: [] for name in ("probe", "encoder", "epoch", *JUDGED)}
    for probe in sorted(record.metrics, key=lambda name: (name != HEADLINE_PROBE, name)):
        poisoned, twin = (
            [
                [entry["epoch"], *(entry[f"{probe}_{name}"] for name in JUDGED)]
                for entry in entries
                if f"{probe}_asr" in entry
            ]
            for entries in (record.trajectory, record.trajectory_clean_twin)
        )
        if not poisoned:
            continue
        panels[probe] = (
            ProbeTrajectory(*zip(*poisoned, strict=True)),
            ProbeTrajectory(*zip(*twin, strict=True)) if twin else None,
        )
        for encoder, rows in (("poisoned", poisoned), ("clean twin", twin)):
            for row in rows:
                for name, value in zip(data, (probe, encoder, *row), strict=True):
                    data[name].append(value)
    return (asr_trajectory(panels), data) if panels else None


def _similarity(record: RunRecord) -> tuple[Figure, Columns] | None:
    poisoned = _columns(record.trajectory, "epoch", *SIMILARITIES)
    if poisoned is None:
        return None
    twin = _columns(record.trajectory_clean_twin, "epoch", "trigger")
    figure = similarity_trajectory(*poisoned.values(), twin=tuple(twin.values()) if twin else None)  # type: ignore[arg-type]
    return figure, _stacked(poisoned, twin)


def _alignment(record: RunRecord) -> tuple[Figure, Columns] | None:
    return _both(record, alignment_uniformity, "epoch", "alignment", "uniformity")


def _displacement(record: RunRecord) -> tuple[Figure, Columns] | None:
    names = ("epoch", "shift", "advance")  # a collapsed encoder on the way has none
    rows = {
        key: [entry for entry in getattr(record, key) if all(name in entry for name in names)]
        for key in ("trajectory", "trajectory_clean_twin")
    }
    return _both(record.model_copy(update=rows), displacement_trajectory, *names)


def _both(record: RunRecord, figure: Callable[..., Figure], *names: str) -> tuple[Figure, Columns] | None:
    """The figure of the named values of the victim, beside the twin's where there are any."""
    poisoned, twin = _columns(record.trajectory, *names), _columns(record.trajectory_clean_twin, *names)
    if poisoned is None:
        return None
    return figure(*poisoned.values(), twin=tuple(twin.values()) if twin else None), _stacked(poisoned, twin)


def _crafting(record: RunRecord) -> tuple[Figure, Columns] | None:
    crafted = _columns(record.crafting, "step", *SIMILARITIES)
    if crafted is None:
        return None
    periods = [entry.get("period", 0) for entry in record.crafting]
    fresh = [before != after for before, after in pairwise(periods)]
    restarts = [number for number, new in zip(crafted["step"][1:], fresh, strict=True) if new]
    return crafting_curve(*crafted.values(), restarts=restarts), {**crafted, "period": periods}


def _bars(record: RunRecord) -> tuple[Figure, Columns] | None:
    """ASR of each probe, with the clean twin's."""
    unknown = Metric(value=None, n=0)
    rows: Columns = {"probe": [], "asr": [], "low": [], "high": [], "asr_clean_twin": [], "n": []}
    for probe, metrics in record.metrics.items():
        asr, twin = metrics.get("asr", unknown), metrics.get("asr_clean_twin", unknown)
        for name, value in zip(rows, (probe, asr.value, asr.low, asr.high, twin.value, asr.n), strict=True):
            rows[name].append(value)
    if all(value is None for value in rows["asr"]):
        return None
    figure = metric_bars(
        [f"{probe} probe" for probe in rows["probe"]],
        [_number(value) for value in rows["asr"]],
        [_number(value) for value in rows["low"]],
        [_number(value) for value in rows["high"]],
        twin=[_number(value) for value in rows["asr_clean_twin"]],
        unit="Attack success rate",
    )
    return figure, rows


def _columns(entries: Entries, *names: str) -> Columns | None:
    """The named values of all entries as columns, or None if there are no entries or one lacks a value."""
    if not entries or any(entry.get(name) is None for entry in entries for name in names):
        return None
    return {name: [entry[name] for entry in entries] for name in names}


def _stacked(poisoned: Columns, twin: Columns | None) -> Columns:
    """Both encoders' rows under each other, told apart by the column "encoder"; what the twin lacks stays empty."""
    count = len(poisoned["epoch"])
    other = len(twin["epoch"]) if twin else 0
    columns: Columns = {"encoder": ["poisoned"] * count + ["clean twin"] * other}
    for name, values in poisoned.items():
        columns[name] = [*values, *((twin or {}).get(name, [None] * other))]
    return columns


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
