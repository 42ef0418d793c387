"""The benchmark of retraining: what it removes, trains and writes, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import retraining
from benchmarks.bank import METRICS, bank, poisoned_set
from blto.data import load
from blto.evaluation import PROBES
from blto.files import read_jsonl
from blto.records import RunStore
from tests.tiny_experiment import TINY_EXPERIMENT, export_run

ATTACK = {"name": "ssl_backdoor", "target_class": 1, "poison_rate": 0.05, "patch_size": 4}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A bank of a victim and its twin, as an export leaves it."""
    out = tmp_path / "results" / "bank_poisoned"
    export_run(RunStore(tmp_path / "runs"), {**TINY_EXPERIMENT, "attack": ATTACK}, out, "patch")
    return tmp_path / "results"


def test_a_victim_is_trained_on_what_is_left_and_not_again(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "FILTERS", {"f": {"name": "spectral"}})
    monkeypatch.setattr(retraining, "FILTERED", {"patch": ("f", retraining.RANDOM)})
    train, test = (load(TINY_EXPERIMENT["data"], split=split) for split in ("train", "test"))
    (banked,) = bank(results)
    poisoned = poisoned_set(banked, train)

    def known(spec: Any, encoder: Any, suspects: Any) -> Any:
        """All poisons but one come first."""
        scores = poisoned.mask.astype(np.float64)
        scores[poisoned.plan.indices[0]] = -1
        return scores

    monkeypatch.setattr(retraining, "ranking", known)
    retraining.measure(results, tmp_path / "store", [3], train, test)
    row, control = read_jsonl(results / retraining.FILE)
    assert row["removed"] == control["removed"] == pytest.approx(0.075)
    assert row["poisons_left"] == 1 / poisoned.n_poisoned
    assert control["filter"] == retraining.RANDOM
    assert control["poisons_left"] > 0.5
    for when in ("before", "after"):
        assert set(row[when]) == set(PROBES)
        assert set(row[when]["linear"]) == set(METRICS)
    assert row["before"] == control["before"] != row["after"]

    retraining.measure(results, tmp_path / "store", [3], train, test)
    assert read_jsonl(results / retraining.FILE) == [row, control]
    retraining.measure(results, tmp_path / "store", [1], train, test)  # a seed of which there is none
    assert read_jsonl(results / retraining.FILE) == [row, control]


def test_the_table_has_victims_as_they_were_and_after_each_filter() -> None:
    def row(seed: int, name: str, lift: float) -> dict[str, Any]:
        before, after = ({probe: dict.fromkeys(METRICS, value) for probe in PROBES} for value in (0.9, lift))
        told = {"filter": name, "removed": 0.15, "group": "patch", "seed": seed, "encoder_sha256": str(seed)}
        return {**told, "poisons_left": 0.25 * seed, "before": before, "after": after}

    lines = retraining.table([row(0, "f", 0.1), row(1, "f", 0.3), row(0, "g", 0.2)]).splitlines()[2:5]
    assert lines[0].startswith("| patch | none |  | 2 | 100% | 90.0% | 90.0 [90.0, 90.0] |")
    assert lines[1].startswith("| patch | f | 15.0% | 2 | 12.5% | 20.0% | 20.0 [")
    assert lines[2].startswith("| patch | g | 15.0% | 1 | 0.0% | 20.0% | 20.0 |")


def test_before_anything_is_measured_the_table_says_how(tmp_path: Path) -> None:
    assert retraining.retraining_table(tmp_path) == "Not measured yet: `python -m benchmarks.retraining`."
