"""A scan as SARIF 2.1.0 (OASIS standard), which code hosts and editors read."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from blto.audit.encoder import EncoderScan
from blto.audit.verdict import Verdict

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES = {
    "encoder-backdoor": "A detector scores the encoder higher than clean encoders of the same family.",
    "encoder-file": "The file holds code, or weights that are no numbers.",
    "encoder-inconclusive": "The scan could not have found a backdoor.",
}


def as_sarif(scan: EncoderScan) -> dict[str, Any]:
    """One run with at most one result: nothing found is an empty list."""
    judgement = scan.judgement
    rule = {
        Verdict.SUSPECT: "encoder-backdoor" if scan.outcomes else "encoder-file",
        Verdict.INCONCLUSIVE: "encoder-inconclusive",
        Verdict.CLEAN: None,
    }[judgement.verdict]
    results = []
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


def _uri(name: str) -> str:
    """A file's name as a relative URI reference."""
    return quote(name)
