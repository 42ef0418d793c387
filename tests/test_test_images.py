"""A trigger that test images get in another form than poisons: who uses which, in a run and in an evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blto
from blto import api, experiment
from blto.configuration import environment
from blto.evaluation import evaluate_backdoor
from blto.experiment import ExperimentSpec, load_data, outcome
from blto.poisoning import Trigger, apply_to_uint8, load_trigger
from blto.records import RunRecord
from blto.report.tables import table_rows
from tests.tiny_experiment import TINY_EXPERIMENT

ATTACKS: dict[str, dict[str, Any]] = {
    "ctrl": {"window": 16, "positions": [7, 15]},
    "ssl_backdoor": {},
}


@dataclass
class Seen:
    """A run of one attack, and what its evaluation was given."""

    record: RunRecord
    folder: Path
    config: dict[str, Any]
    trigger: Trigger
    data: experiment.Data
    given: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module", params=sorted(ATTACKS))
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    attack = {"name": request.param, "target_class": 1, "poison_rate": 0.05, **ATTACKS[request.param]}
    config, store = {**TINY_EXPERIMENT, "attack": attack}, tmp_path_factory.mktemp(request.param)
    given: list[dict[str, Any]] = []

    def evaluating(*encoders: Any, **options: Any) -> Any:
        given.append(options)
        return evaluate_backdoor(*encoders, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "evaluate_backdoor", evaluating)
        patch.setattr(api, "evaluate_backdoor", evaluating)
        (record,) = blto.run(config, store=store, device="cpu", quiet=True)
        folder = store / record.run_id
        encoder, trigger = folder / "encoder.safetensors", folder / "trigger.safetensors"
        blto.evaluate(config, encoder=encoder, clean_twin=encoder, trigger=trigger, device="cpu", quiet=True)
    data = load_data(ExperimentSpec.parse(config), environment(store=store, device="cpu"))
    return Seen(record, folder, config, load_trigger(trigger), data, given)


def manifest_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "poison_manifest.json").read_text())
    return found


def test_test_images_get_the_trigger_of_test_images(seen: Seen) -> None:
    wanted = apply_to_uint8(seen.trigger.at_test(), seen.data.test.images)
    assert not np.array_equal(wanted, apply_to_uint8(seen.trigger, seen.data.test.images))
    for options in seen.given:
        assert np.array_equal(options["triggered"], wanted)
    assert len(seen.given) == 2, "once in the run, once by blto.evaluate"


def test_probes_are_fitted_on_images_without_a_trigger(seen: Seen) -> None:
    for options in seen.given:
        assert options["train"].content_hash == seen.data.train.content_hash
        assert options["test"].content_hash == seen.data.test.content_hash


def test_poisons_get_the_trigger_of_poisons(seen: Seen) -> None:
    manifest = manifest_in(seen.folder)
    indices = [poison["index"] for poison in manifest["poisons"]]
    originals = seen.data.train.images[indices]
    on_poisons = np.abs(apply_to_uint8(seen.trigger, originals).astype(int) - originals).max() / 255
    assert len(indices) == 6
    assert manifest["trigger_sha256"] == seen.trigger.identity
    assert manifest["epsilon_reached"] == seen.record.provenance["poison"]["epsilon_reached"] == on_poisons
    folder = blto.poison(seen.config, seen.folder.parent / "set", store=seen.folder.parent, device="cpu", quiet=True)
    assert manifest_in(folder)["pixels_sha256"] == manifest["pixels_sha256"]
    assert blto.verify(folder).epsilon_reached == on_poisons


def test_no_budget_is_claimed_and_what_was_reached_is_told(seen: Seen) -> None:
    assert manifest_in(seen.folder)["epsilon"] is None
    test = seen.data.test.images
    change = np.abs(apply_to_uint8(seen.trigger.at_test(), test).astype(int) - test).max()
    assert seen.record.stealth["linf"] == pytest.approx(change / 255)
    on_poisons = round(seen.record.provenance["poison"]["epsilon_reached"] * 255)
    (row,) = table_rows([seen.record])
    steps = str(change) if on_poisons == change else f"{on_poisons} and {change}"
    assert row.epsilon == f"none: {steps}/255"
