"""The tables and figures of docs/findings.md from the committed records of the gates; `readme_table` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from blto.analysis import ExposurePath, asr_trajectory, exposure_map, save_figure
from blto.files import read_json
from blto.records import RunRecord, load_record
from blto.report.wording import MISSING, comparison, lookup, percent, points, with_interval

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
NAMES = {"blto": "BLTO", "ctrl": "CTRL", "ssl_backdoor": "SSL-Backdoor", "universal_delta": "Universal delta"}
LAST = 5
"""Snapshots at the end of a training whose ASR is averaged: a single one is a matter of luck."""
COLUMNS = (
    *("Cell", "Seed", "ASR (linear)", "Clean twin", "Lift", "ASR (kNN)", "Clean twin", "Lift"),
    *("Clean accuracy", "Twin", f"kNN ASR, last {LAST}"),
)
Cell = tuple[str, RunRecord]


def cells(gate: Path) -> list[Cell]:
    """(Name, record) of every cell of a gate, in the order of their names and seeds."""
    found = [(file.parent.name.rsplit("-s", 1)[0], load_record(file)) for file in sorted(gate.glob("*/record.json"))]
    return sorted(found, key=lambda cell: (cell[0], cell[1].spec["seed"]))


def table(gate: Path) -> str:
    """A row a cell, and the declared comparison where it is complete."""
    found = cells(gate)
    if not found:
        return "Not run yet."
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- | {' | '.join('---:' for _ in COLUMNS[1:])} |"]
    lines += [f"| {' | '.join(row(*cell))} |" for cell in found]
    lines += ["", f"{described(found)} Intervals: 95% over test images, of one seed each."]
    declared = gate / "comparison.json"
    return "\n".join(lines + (["", f"**{comparison(read_json(declared))}**"] if declared.exists() else []))


def row(name: str, record: RunRecord) -> list[str]:
    """One cell of a table."""
    values: list[str] = []
    for probe in ("linear", "knn"):
        lift = record.metric("lift", probe)
        values += [with_interval(record.metric(of, probe)) for of in ("asr", "asr_clean_twin")]
        values.append(with_interval(lift).replace("%", "", 1) if lift else MISSING)
    accuracy = [record.metric(of) for of in ("clean_accuracy", "clean_accuracy_clean_twin")]
    tail = [entry["asr"] for entry in record.trajectory[-LAST:] if "asr" in entry]
    spread = f"{percent(mean(tail))} (sd {points(stdev(tail)).lstrip('+')})" if len(tail) > 1 else MISSING
    return [name, str(record.spec["seed"]), *values, *(percent(of.value if of else None) for of in accuracy), spread]


def described(found: Sequence[Cell]) -> str:
    """Which images the cells were judged on."""
    held_out = {lookup(record.spec, "held_out") for _, record in found}
    return "; ".join(f"{n:,} held-out training images" if n else "the test set" for n in sorted(held_out)) + "."


def path_of(record: RunRecord) -> ExposurePath | None:
    """A training as a path over exposures; None where its record holds no ASR."""
    twin = {entry["epoch"]: entry.get("asr") for entry in record.trajectory_clean_twin}
    entries = [entry for entry in record.trajectory if entry["epoch"] > 0 and twin.get(entry["epoch"]) is not None]
    if not entries or "asr" not in entries[0]:
        return None
    poisons = record.provenance["poison"]["images"]
    return ExposurePath(
        NAMES.get(record.spec["attack"]["name"], record.spec["attack"]["name"]),
        [poisons * entry["epoch"] for entry in entries],
        [entry["clean_accuracy"] for entry in entries],
        [entry["asr"] - twin[entry["epoch"]] for entry in entries],
    )


def draw_curves(gate: Path) -> None:
    """ASR against epoch of every cell's first seed."""
    for name, group in groupby(cells(gate), key=lambda cell: cell[0]):
        _, record = next(group)
        columns: dict[str, list[Any]] = {
            key: [entry.get(key) for entry in record.trajectory]
            for key in ("epoch", "asr", "untriggered_rate", "clean_accuracy")
        }
        if None in columns["asr"]:
            continue
        twin = [[entry[key] for entry in record.trajectory_clean_twin] for key in ("epoch", "asr")]
        figure = asr_trajectory(*columns.values(), twin=(twin[0], twin[1]))
        save_figure(figure, FIGURES / f"{gate.name}_{name}", {**columns, "asr_clean_twin": twin[1]})


def draw_map(gates: Sequence[Path]) -> None:
    """The main figure: every training of every gate."""
    runs = [(name, record, path_of(record)) for gate in gates for name, record in cells(gate)]
    known = [(f"{name}-s{record.spec['seed']}", path) for name, record, path in runs if path is not None]
    if not known:
        return
    columns: dict[str, list[Any]] = {key: [] for key in ("run", "attack", "exposures", "accuracy", "lift")}
    for run, path in known:
        for point in zip(path.exposures, path.accuracy, path.lift, strict=True):
            for key, value in zip(columns, (run, path.attack, *point), strict=True):
                columns[key].append(value)
    save_figure(exposure_map([path for _, path in known]), FIGURES / "exposure_map", columns)


def draw(results: Path) -> None:
    """Every figure, as SVG with its numbers as CSV."""
    gates = sorted(results.glob("gate*"))
    for gate in gates:
        draw_curves(gate)
    draw_map(gates)
