"""A defense is verified where tests show it, and the tables of results have no other."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

import blto
from benchmarks import detectors
from benchmarks.bank import CLEAN, RESULTS, Banked, bank
from blto.cli import main
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, Defense, EncoderDetector, Inspection
from blto.defenses.evidence import Evidence
from blto.files import append_jsonl, read_jsonl
from blto.models.encoder import Encoder
from tests.factories import random_images

TESTS = Path(__file__).parent.parent / "defenses"
CLAIMS = {name: detectors.evidence(name) for name in DEFENSES.names()}


@cache
def always_run(file: str) -> set[str]:
    """The tests of a file that nothing leaves out; a parametrised one counts, a skipped one or one of minutes not."""
    found = (node for node in ast.parse((TESTS / f"{file}.py").read_text()).body if isinstance(node, ast.FunctionDef))
    return {
        each.name
        for each in found
        if all(ast.unparse(mark).startswith("pytest.mark.parametrize(") for mark in each.decorator_list)
    }


def shown_by(test: str, kind: type) -> bool:
    """Whether there is such a test, in a file that is about such defenses."""
    file, _, name = test.partition("::")
    if not (TESTS / f"{file}.py").exists():
        return False
    return name.startswith("test_") and name in always_run(file) and kind.__name__ in (TESTS / f"{file}.py").read_text()


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_defense_names_as_its_tests_are_tests_of_it(name: str) -> None:
    claim, kind = CLAIMS[name], cast(type, DEFENSES.get(name))
    assert all(shown_by(test, kind) for test in (claim.must_show, claim.positive) if test)
    assert claim.said.endswith(".")
    assert claim.status == "experimental" or claim.must_show != claim.positive
    inherited = "evidence" not in vars(kind)
    assert not inherited or claim.status == "experimental"


def test_a_test_that_is_not_there_or_is_left_out_shows_nothing() -> None:
    good = CLAIMS["decree"].must_show
    decree = cast(type, DEFENSES.get("decree"))
    assert shown_by(good, decree)
    for wrong in (f"{good}_too", "test_nowhere::test_it", "test_decree::inspect", good.partition("::")[2], ""):
        assert not shown_by(wrong, decree)
    assert not shown_by(good, cast(type, DEFENSES.get("clp")))


@pytest.mark.parametrize(
    ("must_show", "positive", "status"),
    [("a", "b", "verified"), ("a", "", "experimental"), ("", "b", "experimental"), ("", "", "experimental")],
)
def test_it_takes_both_tests(must_show: str, positive: str, status: str) -> None:
    assert Evidence("said.", must_show, positive).status == status


def test_a_defense_that_says_nothing_is_experimental() -> None:
    assert Defense.evidence.status == "experimental"
    assert inspect.signature(Evidence).bind().arguments == {}


def test_list_and_show_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    listed = blto.list("defense")["defense"]
    assert {name: card["status"] for name, card in listed.items()} == {
        name: claim.status for name, claim in CLAIMS.items()
    }
    assert "status" not in blto.list("attack")["attack"]["blto"]
    assert main(["list", "defense"]) == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("defense ")}
    assert all(claim.status in rows[name] for name, claim in CLAIMS.items())
    for name in ("spectral", "clp"):
        assert main(["show", name]) == 0
        assert f"{CLAIMS[name].status}: {CLAIMS[name].said}" in capsys.readouterr().out
        assert main(["show", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["card"]["evidence"] == CLAIMS[name].said


def test_the_table_of_detectors_leaves_experimental_ones_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(title: str, name: str) -> list[dict[str, Any]]:
        common = {"detector": title, "spec": {"name": name}, "flagged": True, "seconds": 1.0}
        groups = [("clean", seed) for seed in range(4)] + [("patch", seed) for seed in range(2)]
        return [{**common, "group": group, "seed": seed, "score": float(seed)} for group, seed in groups]

    given = rows("Good", "decree") + rows("Doubtful", "channel_outlier")
    assert "Doubtful" in detectors.table(given)
    monkeypatch.setattr(cast(type, DEFENSES.get("channel_outlier")), "evidence", Evidence())
    found = detectors.table(given)
    assert "| Good | patch |" in found
    assert "Good by its own threshold" in found
    assert "Doubtful" not in found


def test_encoders_that_a_detector_learned_from_choose_no_threshold_and_are_not_judged() -> None:
    def row(name: str, seed: int, group: str, score: float) -> dict[str, Any]:
        common = {"detector": name, "spec": {"name": name}, "flagged": None, "seconds": 1.0}
        return {**common, "group": group, "seed": seed, "score": score}

    def told(name: str, learned_from: float) -> list[str]:
        """The cells of the only row: clean encoders score 0, those that may have been learned from something else."""
        scores = {seed: learned_from if seed in detectors.REFERENCES else 0.0 for seed in range(40)}
        clean = [row(name, seed, "clean", score) for seed, score in scores.items()]
        found = detectors.table([*clean, row(name, 0, "patch", 1.0), row(name, 20, "patch", 1.0)])
        return found.splitlines()[2].split(" | ")

    assert told("generator_inversion", 9.0) == told("generator_inversion", 0.0)
    assert told("decree", 9.0) != told("decree", 0.0), "it learns from none, so all count"
    assert "2, 20 clean" in told("generator_inversion", 0.0)[2]


def test_there_are_clean_encoders_to_learn_from_among_those_that_choose_thresholds() -> None:
    clean = {banked.seed for banked in bank(RESULTS) if banked.group == CLEAN}
    assert set(detectors.REFERENCES) < clean
    assert all(seed % 2 == 0 for seed in detectors.REFERENCES)
    for spec in detectors.DETECTORS.values():
        assert cast(EncoderDetector, DEFENSES.build(spec)).references in {0, len(detectors.REFERENCES)}


def test_what_was_scored_is_known_by_the_resolved_options() -> None:
    rows = [
        {"spec": {"name": "decree"}, "encoder_sha256": "a"},  # before it had further options
        {"spec": DEFENSES.resolve({"name": "decree"}), "encoder_sha256": "b"},
        {"spec": DEFENSES.resolve({"name": "decree", "starts": 3}), "encoder_sha256": "c"},
        {"spec": {"name": "channel_outlier"}, "encoder_sha256": "d"},
    ]
    assert detectors.scored(rows, {"name": "decree", "starts": 1}) == {"a", "b"}
    assert detectors.scored(rows, {"name": "decree", "starts": 3}) == {"c"}
    assert detectors.scored([], {"name": "decree"}) == set()


def test_a_detector_learns_once_for_all_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {("clean", seed): tmp_path / f"clean{seed}" for seed in (3, *detectors.REFERENCES[:2], 30)}
    files["patch", 0] = tmp_path / "patch0"
    for (_, seed), file in files.items():
        file.write_bytes(bytes([seed]) + file.name.encode())
    learned: list[list[int]] = []

    def learn_from(
        detector: EncoderDetector, references: Sequence[Encoder], images: ImageSet, conditions: Conditions
    ) -> Conditions:
        learned.append([file.read_bytes()[0] for file in cast(list[Path], references)])
        return conditions

    def inspect_encoder(*_: Any) -> Inspection:
        return Inspection(0.5, None, {})

    small = {"name": "generator_inversion", "references": 2}
    given = {
        "first": small,
        "other": {**small, "steps": 5},
        "one start": {"name": "decree"},
        "three": {"name": "decree", "starts": 3},
    }
    banked = [Banked(*key, file) for key, file in files.items()]
    monkeypatch.setattr(detectors, "DETECTORS", given)
    monkeypatch.setattr(detectors, "bank", lambda _: iter(banked))
    monkeypatch.setattr(detectors, "learn_from", learn_from)
    monkeypatch.setattr(detectors, "inspect_encoder", inspect_encoder)
    monkeypatch.setattr("blto.data.load", lambda *_, **__: random_images())
    monkeypatch.setattr("blto.models.checkpoints.load_encoder", lambda file: file)
    for _ in range(2):
        detectors.measure(tmp_path, None, banked, tmp_path / detectors.FILE)
        assert learned == [list(detectors.REFERENCES[:2])] * 2 + [[]]
    rows = read_jsonl(tmp_path / detectors.FILE)
    assert [row["detector"] for row in rows] == [name for name in given for _ in files]


def test_the_table_by_class_counts_the_clean_encoders_that_score_as_high(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Not measured" in detectors.by_class_table(tmp_path)

    def row(name: str, seed: int, group: str, score: float) -> dict[str, Any]:
        return {"detector": name, "spec": detectors.DETECTORS[name], "group": group, "seed": seed, "score": score}

    for name in detectors.DETECTORS:
        for seed in range(40):
            score = 1.0 if seed in detectors.REFERENCES else seed / 40
            append_jsonl(tmp_path / detectors.FILE, row(name, seed, "clean", score))
        append_jsonl(tmp_path / detectors.FILE, row(name, 0, "patch", 9.0))
        for group, score in (("frog", 38 / 40), (detectors.TWIN, 0.0)):
            append_jsonl(tmp_path / detectors.CLASSES_FILE, row(name, 50, group, score))

    def told() -> list[dict[str, str]]:
        title, _, *lines = detectors.by_class_table(tmp_path).splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (title, *lines)]
        return [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]

    frog, twin = told()
    assert (frog["Tampered for"], twin["Tampered for"]) == ("frog", detectors.TWIN)
    assert (frog["DECREE"], twin["DECREE"]) == ("7 of 40", "40 of 40")
    assert (frog["generator inversion"], twin["generator inversion"]) == ("2 of 35", "35 of 35")
    monkeypatch.setattr(cast(type, DEFENSES.get("channel_outlier")), "evidence", Evidence())
    assert "strongest channel" in frog
    assert "strongest channel" not in told()[0]


def test_the_encoders_of_each_class_come_with_what_all_of_them_were_before() -> None:
    found = detectors.of_classes(RESULTS)
    assert len(found) == 11
    assert found[-1].group == detectors.TWIN
    assert all(each.file.exists() for each in found)
    assert {each.record.spec["attack"]["target_class"] for each in found[:-1]} == set(range(10))
