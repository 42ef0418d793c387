"""The tables and figures of docs/findings.md from the committed records of the gates; `readme_table` writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import linregress, t

from blto.analysis import ExposurePath, exposure_map, record_figures, save_figure
from blto.evaluation import PROBES, aggregate
from blto.files import read_json, read_jsonl
from blto.pretraining import METHODS
from blto.records import Metric, RunRecord, load_record
from blto.report.wording import MISSING, comparison, lookup, percent, points, with_interval

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
NAMES = {
    "blto": "BLTO",
    "ctrl": "CTRL",
    "ssl_backdoor": "SSL-Backdoor",
    "universal_delta": "Universal delta",
    "untrained_generator": "Untrained generator",
    "frozen_surrogate": "Frozen surrogate",
}
WANTED = 30
"""Points of lift that were wanted of BLTO at gates 4 and 5."""
FARTHEST = 12
"""Power of ten beyond which no exposures are worth naming."""
LEAST_STEP = 0.2
"""Powers of ten between exposures that count as different ones: a factor of 1.6."""
LAST = 5
"""Snapshots at the end of a training whose ASR is averaged: a single one is a matter of luck."""
COLUMNS = (
    *("Cell", "Seed", "ASR (linear)", "Clean twin", "Lift", "ASR (kNN)", "Clean twin", "Lift"),
    *("Clean accuracy", "Twin", f"ASR (linear), last {LAST}", "Trained on"),
)
Cell = tuple[str, RunRecord]


def cells(gate: Path) -> list[Cell]:
    """(Name, record) of every cell of a gate, in the order of their names and seeds."""
    found = [(file.parent.name.rsplit("-s", 1)[0], load_record(file)) for file in sorted(gate.glob("*/record.json"))]
    return sorted(found, key=lambda cell: (cell[0], cell[1].spec["seed"]))


def header(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table: one column of names, the others of numbers."""
    return [f"| {' | '.join(columns)} |", f"| --- | {' | '.join('---:' for _ in columns[1:])} |"]


def table(gate: Path) -> str:
    """A row a cell, and the declared comparison where it is complete."""
    found = cells(gate)
    if not found:
        return "Not run yet."
    lines = header(COLUMNS)
    lines += [f"| {' | '.join(row(*cell))} |" for cell in found]
    lines += [
        "",
        f"{described(found)} Intervals: 95% over these images, of one seed each. Last {LAST}: mean and standard",
        "deviation over as many snapshots, by a probe fitted on 10,000 images and asked on 2,048.",
    ]
    declared = gate / "comparison.json"
    return "\n".join(lines + (["", f"**{comparison(read_json(declared))}**"] if declared.exists() else []))


def seeds_table(gate: Path) -> str:
    """A row for each name of a gate's cells and each probe: means over its seeds."""
    columns = ("asr", "asr_clean_twin", "lift", "clean_accuracy", "clean_accuracy_clean_twin")
    lines = header(("Cell", "Probe", "Seeds", "ASR", "Clean twin", "Lift", "Clean accuracy", "Twin"))
    for name, group in groupby(cells(gate), key=lambda cell: cell[0]):
        records = [record for _, record in group]
        for probe in PROBES:
            found = [[record.metric(of, probe) for record in records] for of in columns]
            values = [[of.value for of in each if of is not None and of.value is not None] for each in found]
            if min(map(len, values)) < 2:
                continue
            shown = [with_interval(aggregate(each)) for each in values]
            shown[2] = shown[2].replace("%", "", 1)
            lines.append(f"| {' | '.join([name, probe, str(len(values[2])), *shown])} |")
    lines += ["", "Means over seeds, with Student's 95% interval over them."]
    return "\n".join(lines) if len(lines) > 4 else "Not run yet."


def checks_table(folder: Path) -> str:
    """A row for each encoder in each `blto craft --check`, with what is left of the ASR after JPEG and resizing."""
    columns = ("Trigger", "Encoder", "Similarity, target's", "ASR (linear)", "ASR (kNN)", "Untriggered", "After edits")
    lines = header(columns)
    for file in sorted(folder.glob("*.check.json")):
        for encoder in read_json(file)["encoders"]:
            plain, *edits = encoder["edits"]
            near, metrics = plain["similarity"], plain["metrics"]
            values = [
                file.name.removesuffix(".check.json").replace("_", " "),
                encoder["name"],
                f"{near['triggered']:.2f}, {near['target']:.2f}",
                *(with_interval(Metric(**metrics[probe]["asr"])) for probe in ("linear", "knn")),
                " / ".join(percent(metrics[probe]["untriggered_rate"]["value"]) for probe in ("linear", "knn")),
                ", ".join(f"{edit['name']}: {percent(edit['metrics']['linear']['asr']['value'])}" for edit in edits),
            ]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def levers_table(file: Path) -> str:
    """A row a lever of `benchmarks.levers`: how near its trigger came, and what it wins, there and elsewhere."""
    if not file.exists():
        return "Not run yet."
    columns = (
        "Lever",
        "Similarity, target's",
        "ASR (linear / kNN)",
        "in views",
        "on the other encoder",
        "Core-seconds",
    )
    lines = header(columns)
    for line in read_jsonl(file):
        own, *others = (line["asr"][encoder] for encoder in line["encoders"])
        near = line["similarity"]
        values = [
            line["name"],
            f"{near['triggered']:.2f}, {near['target']:.2f}",
            f"{own['linear']:.1f}% / {own['knn']:.1f}%",
            f"{own['linear, views']:.1f}% / {own['knn, views']:.1f}%",
            "; ".join(f"{other['linear']:.1f}% / {other['knn']:.1f}%" for other in others),
            f"{line['core_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def displacement_table(gates: Sequence[Path]) -> str:
    """A row a cell of any gate: where the trigger moves images at the end, on the victim and on its clean twin."""
    keys = ("shift", "advance", "heading")
    lines = header(
        ("Cell", "Gate", "Seed", *(f"{key}, twin's".capitalize() for key in keys), "ASR (linear)", "ASR (kNN)")
    )
    for folder in gates:
        for name, record in cells(folder):
            ends = [entries[-1] for entries in (record.trajectory, record.trajectory_clean_twin) if entries]
            if len(ends) < 2 or any("heading" not in end for end in ends):
                continue
            values = [name, folder.name, str(record.spec["seed"])]
            values += [", ".join(f"{end[key]:.2f}" for end in ends) for key in keys]
            values += [percent(of.value if of else None) for of in (record.metric("asr", p) for p in ("linear", "knn"))]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def trend_table(gates: Sequence[Path]) -> str:
    """A row an attack and probe: the line through its cells' lifts at the end over the logarithm of their exposures.

    Where its slope's interval is above 0, the exposures at which it comes to `WANTED`: no law, the straightest guess.
    """
    lines = header(
        ("Attack", "Probe", "Cells", "Exposures", "Lift, points for ten times the exposures", f"Lift of {WANTED} at")
    )
    for probe in ("linear", "knn"):
        ends: dict[str, list[tuple[float, float]]] = {}
        for record in (record for gate in gates for _, record in cells(gate)):
            path, lift = path_of(record, probe), record.metric("lift", probe)
            if path is not None and lift is not None and lift.value is not None:
                ends.setdefault(path.attack, []).append((math.log10(path.exposures[-1]), 100 * lift.value))
        for attack, points_ in ends.items():
            x, y = zip(*points_, strict=True)
            if len({round(each / LEAST_STEP) for each in x}) < 3:  # two places make a line, whatever lies there
                continue
            fit = linregress(x, y)
            half = float(t.ppf(0.975, len(x) - 2) * fit.stderr)
            reached = "no rise is established"
            if fit.slope - half > 0:
                digits = (WANTED - fit.intercept) / fit.slope
                reached = f"{10**digits:,.0f}" if digits < FARTHEST else f"more than {10**FARTHEST:,}"
            values = [attack, probe, str(len(x)), f"{10 ** min(x):,.0f} to {10 ** max(x):,.0f}"]
            values += [f"{fit.slope:+.1f} [{fit.slope - half:.1f}, {fit.slope + half:.1f}]", reached]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not enough cells yet."


def draws_table(file: Path) -> str:
    """A row for each encoder and probe of `benchmarks.probe_draws`: its ASR by draws of the probe's images."""
    if not file.exists():
        return "Not run yet."
    measured = read_jsonl(file)
    sizes = sorted(
        {int(size) for line in measured for probes in line["asr"].values() for of in probes.values() for size in of}
    )
    lines = header(("Attack", "Run", "Encoder", "Probe", *(f"{size:,} images" for size in sizes)))
    for line in measured:
        for encoder, probes in line["asr"].items():
            for probe, found in probes.items():
                values = [", ".join(f"{value:.1f}%" for value in found.get(str(size), [])) for size in sizes]
                lines.append(f"| {' | '.join([line['attack'], line['run'][-10:], encoder, probe, *values])} |")
    return "\n".join(lines)


def row(name: str, record: RunRecord) -> list[str]:
    """One cell of a table."""
    values: list[str] = []
    for probe in ("linear", "knn"):
        lift = record.metric("lift", probe)
        values += [with_interval(record.metric(of, probe)) for of in ("asr", "asr_clean_twin")]
        values.append(with_interval(lift).replace("%", "", 1) if lift else MISSING)
    accuracy = [record.metric(of) for of in ("clean_accuracy", "clean_accuracy_clean_twin")]
    tail = [entry["linear_asr"] for entry in record.trajectory[-LAST:] if "linear_asr" in entry]
    spread = f"{percent(mean(tail))} (sd {points(stdev(tail)).lstrip('+')})" if len(tail) > 1 else MISSING
    accuracies = (percent(of.value if of else None) for of in accuracy)
    return [name, str(record.spec["seed"]), *values, *accuracies, spread, trained_on(record)]


def trained_on(record: RunRecord) -> str:
    """The victim's processor; "CPU" stands for the two cores of all other evidence."""
    of = record.provenance.get("trained_on", {}).get("victim", {})
    return of.get("processor", MISSING) if of.get("device") == "cuda" else "CPU"


def described(found: Sequence[Cell]) -> str:
    """Which images the cells were judged on."""
    held_out = {lookup(record.spec, "held_out") for _, record in found}
    return "; ".join(f"{n:,} held-out training images" if n else "The test set" for n in sorted(held_out)) + "."


def path_of(record: RunRecord, probe: str) -> ExposurePath | None:
    """A training as a path over exposures; None where its record holds no ASR over training."""
    asr, untriggered, accuracy = (f"{probe}_{name}" for name in ("asr", "untriggered_rate", "clean_accuracy"))
    twin = {entry["epoch"]: entry[asr] for entry in record.trajectory_clean_twin if asr in entry}
    entries = [entry for entry in record.trajectory if 0 < entry["epoch"] in twin and asr in entry]
    if not entries:
        return None
    poisons = record.provenance["poison"]["images"]
    method = record.spec["pretraining"]["method"]["name"]
    attack = record.spec["attack"]
    label = NAMES.get(attack["name"], attack["name"])
    if attack["name"] == "ctrl":  # whose strength decides what it is
        label += f" {attack['magnitude']:g}/{attack['test_magnitude']:g}"
    if attack.get("patch_size"):  # and that of a patch
        label += f", {attack['patch_size']} pixels"
    return ExposurePath(
        label if method == "simclr" else f"{label}, {METHODS.card(method).title}",
        [poisons * entry["epoch"] for entry in entries],
        [entry[accuracy] for entry in entries],
        [entry[asr] - max(twin[entry["epoch"]], entry[untriggered]) for entry in entries],  # as `metrics` has it
    )


def draw_curves(gate: Path) -> None:
    """ASR and displacement against epoch of every cell's first seed."""
    for name, group in groupby(cells(gate), key=lambda cell: cell[0]):
        _, record = next(group)
        drawn = record_figures(record)
        for figure, short in (("asr_trajectory", "asr"), ("displacement_trajectory", "displacement")):
            if figure in drawn:
                save_figure(drawn[figure][0], FIGURES / f"{gate.name}_{name}_{short}", drawn[figure][1])


def draw_map(gates: Sequence[Path], probe: str) -> None:
    """The main figure: the first seed of every cell of every gate, by one probe; more would hide each other."""
    firsts = [next(group) for gate in gates for _, group in groupby(cells(gate), key=lambda cell: cell[0])]
    runs = [(name, record, path_of(record, probe)) for name, record in firsts]
    known = [(f"{name}-s{record.spec['seed']}", path) for name, record, path in runs if path is not None]
    if not known:
        return
    columns: dict[str, list[Any]] = {key: [] for key in ("run", "attack", "exposures", "accuracy", "lift")}
    for run, path in known:
        for point in zip(path.exposures, path.accuracy, path.lift, strict=True):
            for key, value in zip(columns, (run, path.attack, *point), strict=True):
                columns[key].append(value)
    save_figure(exposure_map([path for _, path in known], probe), FIGURES / f"exposure_map_{probe}", columns)


def draw(results: Path) -> None:
    """Every figure, as SVG with its numbers as CSV."""
    gates = sorted(results.glob("gate*"))
    for gate in gates:
        draw_curves(gate)
    for probe in PROBES:
        draw_map(gates, probe)
