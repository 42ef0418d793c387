"""A scan as SARIF 2.1.0 (OASIS standard), which code hosts and editors read."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from blto.audit.encoder import EncoderScan
from blto.audit.pile.scan import DataScan
from blto.audit.verdict import Verdict

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES = {
    "encoder-backdoor": "A detector scores the encoder higher than clean encoders of the same family.",
    "encoder-file": "The file holds code, or weights that are no numbers.",
    "encoder-inconclusive": "The scan could not have found a backdoor.",
    "data-poisoned": "A detector finds more suspicious images than among clean ones of the same kind.",
    "data-inconclusive": "The scan could not have found poisoned images.",
}
RELATED = 20
"""Most suspicious images that a result names."""


def as_sarif(scan: EncoderScan | DataScan) -> dict[str, Any]:
    """One run with at most one result: nothing found is an empty list."""
    judgement, rule = scan.judgement, _rule(scan)
    results: list[dict[str, Any]] = []
    if rule is not None:
        properties: dict[str, Any] = {"verdict": judgement.verdict.value}
        if judgement.p_value is not None:
            properties["pValue"] = judgement.p_value
        results.append(
            {
                "ruleId": rule,
                "ruleIndex": list(RULES).index(rule),
                "level": "warning" if judgement.verdict is Verdict.SUSPECT else "note",
                "message": {"text": " ".join(judgement.reasons)},
                "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(scan.file), "index": 0}}}],
                "properties": properties,
            }
        )
        if isinstance(scan, DataScan) and judgement.verdict is Verdict.SUSPECT:
            names = [name for name, _ in scan.leading.top[:RELATED]]
            results[0]["relatedLocations"] = [
                {"physicalLocation": {"artifactLocation": {"uri": f"{_uri(scan.file)}/{_uri(name)}"}}} for name in names
            ]
    driver = {
        "name": "blto",
        "semanticVersion": version("blto"),
        "rules": [{"id": name, "shortDescription": {"text": text}} for name, text in RULES.items()],
    }
    artifact = {"location": {"uri": _uri(scan.file)}, "hashes": {"sha-256": scan.sha256}}
    run = {
        "tool": {"driver": driver},
        "artifacts": [artifact],
        "results": results,
        "properties": {"notTested": list(scan.not_tested)},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(scan: EncoderScan | DataScan) -> str | None:
    """Which of the rules a scan is a result of; None for none."""
    if isinstance(scan, DataScan):
        rules = ("data-poisoned", "data-inconclusive")
    else:
        rules = ("encoder-backdoor" if scan.outcomes else "encoder-file", "encoder-inconclusive")
    suspect, inconclusive = rules
    return {Verdict.SUSPECT: suspect, Verdict.INCONCLUSIVE: inconclusive, Verdict.CLEAN: None}[scan.judgement.verdict]


def _uri(name: str) -> str:
    """A file's name as a relative URI reference."""
    return quote(os.fsencode(name))
