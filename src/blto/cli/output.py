"""Results on standard output: a table for a reader, JSON for a program. Text from outside is never read as markup."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from blto.files.atomic import read_json
from blto.files.text import show

if TYPE_CHECKING:
    from blto.audit.encoder import EncoderScan
    from blto.audit.pile.scan import DataScan
    from blto.records import Metric, RunRecord
    from blto.sweep.queue import CellState
    from blto.sweep.running import SweepResult

SWEEP_METRICS = {
    "asr": "ASR",
    "asr_clean_twin": "ASR OF TWIN",
    "lift": "LIFT",
    "clean_accuracy": "CLEAN ACCURACY",
}
SUSPICIOUS = 5  # and unreadable images that a terminal names
_WIDTH_OF_A_PIPE = 160  # no terminal says how wide: wide enough for one line a row


def print_json(value: Any) -> None:
    """One JSON document; NaN never gets out as a bare word."""
    sys.stdout.write(json.dumps(value, allow_nan=False, indent=1) + "\n")


def print_text(*items: RenderableType) -> None:
    """Text and tables, as wide as the terminal; a plain string is taken literally."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    for item in items:
        # A path must stay in one piece, to be copied: the terminal wraps it, not we.
        console.print(Text(item) if isinstance(item, str) else item, soft_wrap=isinstance(item, str))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], limit: int = 200) -> Table:
    """A borderless table of any values, shown literally, each whole up to `limit` characters."""
    result = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        result.add_row(*(Text(show(cell, limit)) for cell in row))
    return result


def print_records(records: Sequence[RunRecord], *, as_json: bool, page: Path | None = None) -> None:
    """The results of runs: the table, one sentence each on whether the attack took, and the page."""
    if as_json:
        found = [record.model_dump(mode="json") for record in records]
        print_json({"runs": found, **({"report": str(page)} if page else {})})
        return
    from blto.report import results_table
    from blto.report.wording import is_attack, verdict

    print_text(results_table(records))
    for record in records:
        if is_attack(record):
            print_text(f"{record.run_id}: took: {str(record.took).lower()}. {show(verdict(record)[1], 400)}")
    if page:
        print_text(f"report: {show(page, 1000)}")


def print_metrics(metrics: Mapping[str, Mapping[str, Metric]], *, as_json: bool) -> None:
    """The metrics of one encoder, per probe."""
    if as_json:
        print_json({probe: {name: one.model_dump() for name, one in each.items()} for probe, each in metrics.items()})
        return
    from blto.report.wording import with_interval

    rows = [(probe, name, with_interval(one), one.n) for probe, each in metrics.items() for name, one in each.items()]
    print_text(table(("PROBE", "METRIC", "VALUE [95%]", "N"), rows))


def print_sweep(result: SweepResult, *, as_json: bool) -> None:
    """A row per cell; then what failed, what waits, and what was exported."""
    exported = result.exported
    if as_json:
        document: dict[str, Any] = {"sweep": result.name, "cells": [_cell(cell) for cell in result.cells]}
        if exported:
            copied, unchanged = ([str(path) for path in paths] for paths in (exported.copied, exported.unchanged))
            document["export"] = {"copied": copied, "unchanged": unchanged, "left_out": exported.left_out}
        if result.comparison:
            document["comparison"] = result.comparison.as_json()
        print_json(document)
        return
    from blto.report.wording import comparison, percent

    rows = []
    for cell in result.cells:
        metrics = [cell.result.metric(name) if cell.result else None for name in SWEEP_METRICS]
        values = [percent(one.value if one else None) for one in metrics]
        minutes = f"{cell.result.seconds / 60:.1f}" if cell.result else ""
        rows.append((cell.cell.name, cell.cell.spec.seed, cell.status, *values, minutes))
    cells = table(("CELL", "SEED", "STATUS", *SWEEP_METRICS.values(), "MINUTES"), rows)
    cells.columns[0].overflow = "fold"  # what tells two cells apart often stands at the end of their names
    print_text(cells)
    for cell in result.cells:
        if cell.status == "failed" and cell.result:
            print_text(f"{show(cell.cell.id)}: error[{cell.result.code}]: {show(cell.result.error, 400)}")
    if waiting := result.count("waiting"):
        print_text(f"{waiting} of {len(result.cells)} cells wait; the same command goes on.")
    if result.comparison:
        print_text(f"comparison: {show(comparison(result.comparison.as_json()), 400)}")
    if exported:
        print_text(f"{len(exported.copied)} files copied, {len(exported.unchanged)} unchanged.")
        print_text(*(f"left out: {show(line, 400)}" for line in exported.left_out))


def _cell(state: CellState) -> dict[str, Any]:
    result = None if state.result is None else state.result.model_dump(mode="json")
    named = {"id": state.cell.id, "name": state.cell.name, "seed": state.cell.spec.seed}
    return {**named, "run_id": state.cell.spec.run_id, "status": state.status, "result": result}


def print_path(what: str, path: Path, *, as_json: bool) -> None:
    """Where the result is."""
    if as_json:
        print_json({what: str(path)})
    else:
        print_text(show(path, 4000))


def print_check(trigger: Path, *, as_json: bool) -> None:
    """What the check of a trigger found: a row per encoder and edit, then which images, and a line for each gate."""
    from blto.doctor import check_file

    found = read_json(check_file(trigger))
    if as_json:
        print_json({"trigger": str(trigger), "check": found})
        return
    from blto.records import HEADLINE_PROBE, Metric
    from blto.report.wording import percent, with_interval

    encoders = found["encoders"]
    probes = sorted(encoders[0]["edits"][0]["metrics"], key=lambda probe: (probe != HEADLINE_PROBE, probe))
    rows = []
    for encoder in encoders:
        for edit in encoder["edits"]:
            near, metrics = edit["similarity"], [edit["metrics"][probe] for probe in probes]
            asr = (with_interval(Metric(**each["asr"])) for each in metrics)
            without = " / ".join(percent(each["untriggered_rate"]["value"]) for each in metrics)
            place = (f"{near[key]:.2f}" for key in ("triggered", "clean", "target"))
            rows.append((encoder["name"], edit["name"], *place, *asr, without))
    names = [probe.upper() for probe in probes]
    columns = ("ENCODER", "IMAGES", "TRIGGERED", "CLEAN", "TARGET", *(f"ASR {name} [95%]" for name in names))
    print_text(table((*columns, f"UNTRIGGERED {' / '.join(names)}"), rows), "")
    print_text(*(f"{encoder['name']}: {show(encoder['origin'], 1000)}" for encoder in encoders))
    print_text(f"images: {show(found['images']['what'], 1000)}", "")
    verdicts = {True: "passes ", False: "fails ", None: ""}
    print_text(*(f"{verdicts[gate['passes']]}{name}: {gate['finding']}" for name, gate in found["gates"].items()))
    print_text("", show(trigger, 4000), show(check_file(trigger), 4000))


def print_listing(listing: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> None:
    """One row per component, then the table of the runs, if there are any."""
    listing = dict(listing)
    runs: dict[str, RunRecord] = dict(listing.get("run", {}))
    if as_json:
        print_json(
            {**listing, **({"run": {name: _summary(one) for name, one in runs.items()}} if "run" in listing else {})}
        )
        return
    cards = [(kind, name, card) for kind, each in listing.items() if kind != "run" for name, card in each.items()]
    if cards:
        rows = [(kind, name, card["summary"], card.get("status", ""), card["paper"]) for kind, name, card in cards]
        print_text(table(("KIND", "NAME", "WHAT IT IS", "STATUS", "PAPER"), rows))
    if runs:
        rows = [("run", name, *_summary(one).values()) for name, one in runs.items()]
        print_text(*([""] if cards else []), table(("KIND", "NAME", "TOOK", "LIFT", "ASR", "ASR OF TWIN"), rows))
    elif not cards:
        print_text("No runs yet.")


def _summary(record: RunRecord) -> dict[str, Any]:
    found = {name: record.metric(name) for name in ("lift", "asr", "asr_clean_twin")}
    values = {name: None if one is None or one.value is None else round(one.value, 4) for name, one in found.items()}
    return {"took": record.took, **values}


def print_component(component: Mapping[str, Any], *, as_json: bool) -> None:
    """The card, then a row per option."""
    if as_json:
        print_json(component)
        return
    card = component["card"]
    source = ", ".join(str(part) for part in (card["paper"], card["year"]) if part)
    facts = [("paper", source), ("threat model", card["threat_model"]), ("norm", card["norm"])]
    lines = [f"{component['name']} ({component['kind']}): {card['title']}, {card['summary']}"]
    lines += [f"{name}: {value}" for name, value in facts if value]
    if "status" in card:
        lines.append(f"{card['status']}: {card['evidence']}")
    print_text(*(show(line, 1000) for line in lines))
    rows = [(option["key"], option["accepts"], _default(option), option["meaning"]) for option in component["options"]]
    if rows:
        print_text("", table(("KEY", "ACCEPTS", "DEFAULT", "MEANING"), rows, limit=2000))


def print_verified(path: Path, found: Mapping[str, Any], *, as_json: bool) -> None:
    """What a verified set is."""
    if as_json:
        print_json(found)
    else:
        print_text(
            f"{show(path, 1000)}: as recorded. {found['n_images']} images, {found['n_poisoned']} of them poisoned "
            f"({100 * found['poison_rate']:.3g}%, class {show(found['target_class_name'])}, "
            f"largest change {255 * found['epsilon_reached']:.3g}/255)."
        )


def _default(option: Mapping[str, Any]) -> str:
    if option["required"]:
        return "(required)"
    value = option["default"]
    if isinstance(value, dict):
        return str(value.get("name", json.dumps(value)))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_scan(found: EncoderScan, *, as_json: bool, page: Path | None) -> None:
    """A scan: the verdict and why, a row a detector, what was not tested."""
    from blto.audit.scan import as_plain

    if as_json:
        print_json({**as_plain(found), **({"page": str(page)} if page else {})})
        return
    judgement = found.judgement
    p_value = "" if judgement.p_value is None else f", p = {judgement.p_value:.3g}"
    print_text(f"{found.file}: {judgement.verdict.value}{p_value}", *judgement.reasons)
    if found.outcomes:
        rows = [
            (
                outcome.title,
                f"{outcome.score:.3f}",
                {True: "backdoor", False: "none", None: "-"}[outcome.flagged],
                len(outcome.clean),
                "-" if outcome.p_value is None else f"{outcome.p_value:.3g}",
                f"{outcome.seconds:.0f}",
            )
            for outcome in found.outcomes
        ]
        print_text(table(("DETECTOR", "SCORE", "BY ITS THRESHOLD", "CLEAN", "P", "SECONDS"), rows))
    print_text(*found.notes, *(f"not tested: {line}" for line in found.not_tested))
    if page:
        print_text(f"page: {page}")


def print_data_scan(found: DataScan, *, as_json: bool, page: Path | None) -> None:
    """A scan of images: the verdict and why, a row a detector and share, the drill, what was not tested."""
    from blto.audit.scan import data_as_plain

    if as_json:
        print_json({**data_as_plain(found), **({"page": str(page)} if page else {})})
        return
    judgement = found.judgement
    p_value = "" if judgement.p_value is None else f", p = {judgement.p_value:.3g}"
    print_text(f"{found.file}: {judgement.verdict.value}{p_value}", *judgement.reasons)
    rows = [
        (
            each.title,
            f"{level.share:.1%}",
            f"{level.threshold:.3g}",
            level.suspects,
            level.clean,
            f"{level.p_value:.3g}",
        )
        for each in found.found
        for level in each.levels
    ]
    if rows:
        print_text(table(("DETECTOR", "OF ALL", "SCORE FROM", "SUSPECTS", "CLEAN", "P BY ITSELF"), rows))
    leading = found.leading
    shown = [f"{show(name, 80)} ({score:.4g})" for name, score in leading.top[:SUSPICIOUS] if score > 0]
    print_text(*([f"most suspicious ({leading.title}): {', '.join(shown)}"] if shown else []))
    for drill in found.drills:
        low, high = (f"{share:.0%}" for share in drill.power[1:3])
        print_text(f"drill: {drill.attack} at {drill.rate:g}: found in {drill.found} of {drill.runs} [{low}, {high}]")
    print_text(*(f"unreadable: {why}" for _, why in found.unreadable[:SUSPICIOUS]))
    print_text(*found.notes, *(f"tested: {line}" for line in found.tested))
    print_text(*(f"not tested: {line}" for line in found.not_tested))
    print_text(f"{found.suspects} beside {found.clean}: {found.seconds:.0f} s")
    if page:
        print_text(f"page: {page}")
