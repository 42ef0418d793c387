"""The report: one HTML file that says what was measured, needs no network and runs no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from blto.errors import ConfigError
from blto.files.atomic import write_text
from blto.files.text import show
from blto.records import HEADLINE_PROBE, RunRecord
from blto.report import wording
from blto.report.svg import inline_svg
from blto.report.tables import METRICS, probes, rows_over_seeds, table_rows
from blto.report.templates import stylesheet, template
from blto.report.wording import lookup

FIGURES: dict[str, tuple[str, str]] = {
    "asr_trajectory": (
        "Attack success over training",
        "Each probe on a part of the test images at every snapshot: one epoch, or one probe, alone may mislead. The "
        "gap between poisoned encoder and clean twin is what the poisons did.",
    ),
    "similarity_trajectory": (
        "Similarity over training",
        "How near triggered images come to the target class while the victim trains. The dashed line is full effect, "
        "the dotted one no effect; the clean twin shows what the trigger does without poisoning.",
    ),
    "displacement_trajectory": (
        "Displacement over training",
        "Where the trigger moves images, measured where clean images spread alike in all directions. What a "
        "victim has beyond its clean twin comes of the poisons or of chance, towards the target class or elsewhere.",
    ),
    "residual_grid": (
        "Original, triggered, residual",
        "What the trigger does to test images, and the difference amplified around gray.",
    ),
    "embedding_map": (
        "Embedding map",
        "t-SNE of the poisoned encoder's features: if the attack took, triggered images sit in the target's cluster. "
        "Distances between clusters mean nothing.",
    ),
    "alignment_uniformity": (
        "Alignment and uniformity",
        "Whether poisoning changes the geometry that contrastive training aims at.",
    ),
    "crafting_curve": (
        "Making the trigger",
        "Similarities on the attacker's surrogate, not on the victim. A dotted line is a surrogate started anew.",
    ),
    "metric_bars": ("Attack success rate", "Each probe's rate with its interval; the diamond is the clean twin."),
}

STEALTH: dict[str, tuple[str, Callable[[float], str]]] = {
    "linf": ("L-inf", lambda value: f"{255 * value:.1f} / 255"),
    "psnr": ("PSNR", "{:.1f} dB".format),
    "ssim": ("SSIM", "{:.3f}".format),
    "l2": ("L2", "{:.2f}".format),
    "changed": ("Images changed", wording.percent),
}

OPEN_RUNS = 3  # with more runs than this their details start folded


def build_report(records: Sequence[RunRecord], figures: Mapping[str, Mapping[str, str]], out: Path) -> Path:
    """Write the report; returns `out`.

    Args:
        records: the runs, in the order of the tables.
        figures: run id -> figure name -> SVG text, as `blto.analysis.save_figure` writes it.
        out: the HTML file.

    Raises:
        ConfigError: no records.
        InputRefused: a figure holds anything but drawing.
        ResourceExhausted: `out` cannot be written.
    """
    write_text(out, render_report(records, figures))
    return out


def render_report(records: Sequence[RunRecord], figures: Mapping[str, Mapping[str, str]]) -> str:
    """The page as text, the same for the same records and figures. Raises as `build_report`."""
    if not records:
        raise ConfigError("no runs to report; run an experiment first, or name another store.")
    return _template().render(
        css=stylesheet(),
        meaning=wording.MEANING,
        headline=HEADLINE_PROBE,
        overall=wording.overall(records),
        runs=[_run(index, record, figures.get(record.run_id, {})) for index, record in enumerate(records, start=1)],
        tables=[(probe, table_rows(records, probe), rows_over_seeds(records, probe)) for probe in probes(records)],
        columns=METRICS,
        definitions=wording.DEFINITIONS,
        open_runs=OPEN_RUNS,
    )


@cache
def _template() -> Template:
    return template(
        "report", "report.html.j2", show=show, percent=wording.percent, interval=wording.interval, unbroken=_unbroken
    )


def _unbroken(sentence: str) -> str:
    """Keep each interval on one line."""
    return re.sub(r"(?<=\d), (?=-?\d)", ",\N{NO-BREAK SPACE}", sentence)


def _run(index: int, record: RunRecord, figures: Mapping[str, str]) -> dict[str, Any]:
    """What the template needs to know about one run."""
    answer, sentence = wording.verdict(record)
    return {
        "index": index,
        "record": record,
        "row": table_rows([record])[0],
        "is_attack": wording.is_attack(record),
        "answer": answer,
        "sentence": sentence,
        "metric_names": list(dict.fromkeys(name for metrics in record.metrics.values() for name in metrics)),
        "figures": _figures(index, figures),
        "stealth": _stealth(record.stealth),
        "spec": "\n".join(show(line, 400) for line in _yaml(record.spec).split("\n")).rstrip(),
        "provenance": [(show(key), show(value, 300)) for key, value in _flat(record.provenance)],
        "command": f"blto run {record.run_id}/spec.yaml{_data_root(record)}",
    }


def _data_root(record: RunRecord) -> str:
    """The option that a data set of files needs; where they lie is not in a record."""
    return "" if lookup(record.spec, "data.name") == "synthetic" else " --data-root DIR"


def _figures(run: int, figures: Mapping[str, str]) -> list[dict[str, Any]]:
    """Known figures in the report's order, then any others by name."""
    names = [name for name in FIGURES if name in figures] + sorted(set(figures) - set(FIGURES))
    shown = []
    for number, name in enumerate(names, start=1):
        title, caption = FIGURES.get(name, (show(name, 60), ""))
        shown.append({"title": title, "caption": caption, "svg": inline_svg(figures[name], f"r{run}f{number}-", title)})
    return shown


def _stealth(stealth: Mapping[str, float]) -> list[tuple[str, str]]:
    """Named and with units: fractions of the range as steps of 255, PSNR in decibels, shares in percent."""
    known = [(name, form(stealth[key])) for key, (name, form) in STEALTH.items() if key in stealth]
    return known + [(show(key, 60), f"{value:.4g}") for key, value in sorted(stealth.items()) if key not in STEALTH]


def _yaml(spec: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True, width=1000)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings and lists with their dotted paths, in order."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return [(path, value)]
