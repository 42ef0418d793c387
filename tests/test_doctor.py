"""`blto craft --check` on an experiment of seconds: which images and encoders it takes, what it writes and says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import blto
from blto import doctor
from blto.attacks import crafting
from blto.attacks.base import Surroundings
from blto.attacks.bilevel import BilevelOptimisation
from blto.attacks.frozen_surrogate import FrozenSurrogate
from blto.cli import main
from blto.doctor import BANK, check_file, split, surrogate_recipe
from blto.errors import ConfigError, InputRefused
from blto.experiment import Data, Environment, ExperimentSpec
from blto.files import read_json, sha256_file
from blto.files.yaml import dump_yaml
from blto.models.checkpoints import load_encoder
from blto.poisoning import AdditiveTrigger, Budget, FrequencyTrigger, save_trigger
from blto.pretraining.spec import PretrainingSpec
from blto.records import RunStore
from tests.factories import random_images, tiny_bilevel
from tests.tiny_experiment import TINY_EXPERIMENT

COUNT = 30
GATES = ["gate 2 (surrogate)", "gate 3 (transfer)", "the budget"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def trigger(store: Path) -> Path:
    out = store.parent / "mine.safetensors"
    return blto.craft(TINY_EXPERIMENT, out, check=True, count=COUNT, store=store, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def found(trigger: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(check_file(trigger))
    return found


def trainings(store: Path) -> set[str]:
    return {path.parent.name for path in (store / "stages").glob("*/stage.json")}


def attack(**changes: Any) -> dict[str, Any]:
    return {**TINY_EXPERIMENT, "attack": changes}


def test_the_findings_lie_beside_the_trigger(trigger: Path, found: dict[str, Any]) -> None:
    assert check_file(trigger) == trigger.parent / "mine.check.json"
    assert found["trigger_sha256"] == blto.load_trigger(trigger).identity
    assert list(found["gates"]) == GATES
    assert found["gates"]["gate 3 (transfer)"]["passes"] is None
    assert found["gates"]["the budget"]["passes"] is True
    assert 0 < found["reach"]["mean"] < found["reach"]["max"] <= found["reach"]["levels"] == 8
    for encoder in found["encoders"]:
        edits = ["as they are", "JPEG 90", "JPEG 75", "JPEG 50", "resized to 12"]
        assert [edit["name"] for edit in encoder["edits"]] == edits
        for edit in encoder["edits"]:
            assert set(edit["similarity"]) == {"triggered", "clean", "target"}
            assert set(edit["metrics"]) == {"linear", "knn"}


def test_it_measures_what_test_images_get(store: Path) -> None:
    options: dict[str, Any] = {"magnitude": 0.0, "test_magnitude": 100.0, "window": 16, "positions": [7, 15]}
    file = store.parent / "ctrl.safetensors"
    save_trigger(file, FrequencyTrigger(**options))
    config = attack(name="ctrl", target_class=1, poison_rate=0.05, **options)
    found = blto.check_trigger(config, file, count=COUNT, store=store, device="cpu", quiet=True)
    assert found["reach"]["max"] > 20, "the poisons' magnitude is 0"


def test_the_encoders_are_the_last_surrogate_and_the_clean_twin_of_the_next_seed(
    store: Path, found: dict[str, Any]
) -> None:
    assert {encoder["name"]: encoder["origin"] for encoder in found["encoders"]} == {
        "surrogate": "the last surrogate of the trigger's own training",
        "unseen 1": "the victim's recipe, on clean images, seed 4",
    }
    before = trainings(store)
    assert len(before) == 2
    blto.pretrain(TINY_EXPERIMENT, seed=TINY_EXPERIMENT["seed"] + 1, store=store, device="cpu", quiet=True)
    assert trainings(store) == before


def test_images_are_held_out_from_the_training_set(found: dict[str, Any]) -> None:
    assert found["images"]["count"] == len(set(found["images"]["rows"])) == COUNT
    assert max(found["images"]["rows"]) < 120
    assert "training images of synthetic, held out from the probes (fitted on 90 others)" in found["images"]["what"]


def test_rows_are_held_out_class_by_class() -> None:
    labels = np.repeat(np.arange(4), (40, 40, 16, 4))
    measured, bank, references = split(labels, 25, 2, seed=0)
    assert np.bincount(labels[measured]).tolist() == [10, 10, 4, 1]
    assert set(measured) | set(bank) == set(range(100))
    assert not set(measured) & set(bank)
    assert set(references) == set(np.flatnonzero(labels == 2)) - set(measured)
    assert not np.array_equal(measured, split(labels, 25, 2, seed=1).measured)
    half = split(labels, 10_000, 2, seed=0).measured
    assert np.bincount(labels[half]).tolist() == [20, 20, 8, 2]
    many = np.arange(30_000) % 3
    assert len(split(many, 2000, 0, seed=0).bank) == BANK


def test_a_class_of_one_image_cannot_be_the_target() -> None:
    with pytest.raises(ConfigError, match="class 0 has fewer than 2"):
        split(np.array([0, 1, 1, 1]), 4, 0, seed=0)


def test_given_encoders_are_asked_instead_of_a_new_one(store: Path, trigger: Path, tmp_path: Path) -> None:
    twins = [blto.pretrain(TINY_EXPERIMENT, seed=seed, store=store, device="cpu", quiet=True) for seed in (4, 5)]
    found = blto.check_trigger(
        TINY_EXPERIMENT, trigger, encoder=twins, count=COUNT, store=tmp_path, device="cpu", quiet=True
    )
    assert len(trainings(tmp_path)) == 1, "the stand-in for the surrogate, which is not beside this copy of the trigger"
    assert [encoder["name"] for encoder in found["encoders"]] == ["surrogate", "unseen 1", "unseen 2"]
    assert found["encoders"][0]["origin"].startswith("a stand-in, since none was kept: its recipe")
    assert [encoder["origin"] for encoder in found["encoders"][1:]] == [
        f"{twin.name} ({sha256_file(twin)[:12]})" for twin in twins
    ]
    assert "on unseen 1, " in found["gates"]["gate 3 (transfer)"]["finding"]


def test_a_wrong_encoder_file_or_count_shows_before_anything_is_learned(tmp_path: Path) -> None:
    with pytest.raises(InputRefused):
        blto.craft(TINY_EXPERIMENT, check=True, encoder=[tmp_path / "no"], store=tmp_path / "s", quiet=True)
    with pytest.raises(ConfigError, match="count is 0; give"):
        blto.craft(TINY_EXPERIMENT, check=True, count=0, store=tmp_path / "s", quiet=True)
    assert not (tmp_path / "s").exists()


def test_an_encoder_without_a_check_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml(TINY_EXPERIMENT))
    assert main(["craft", str(path), "--encoder", "e.safetensors"]) == 2
    assert "give check as well" in capsys.readouterr().err


def test_the_identity_fails_on_a_stand_in_and_is_within_every_budget(tmp_path: Path) -> None:
    config = attack(name="clean", target_class=1)
    file = blto.craft(config, tmp_path / "t.safetensors", check=True, store=tmp_path, device="cpu", quiet=True)
    found = read_json(check_file(file))
    assert found["reach"] == {"max": 0.0, "mean": 0.0, "levels": 0}
    assert [gate["passes"] for gate in found["gates"].values()] == [False, None, True]
    surrogate, unseen = found["encoders"]
    assert surrogate["origin"].startswith("a stand-in, since the attack has none: the victim's")
    for edit in unseen["edits"]:
        assert edit["similarity"]["triggered"] == edit["similarity"]["clean"]
        assert all(each["asr"] == each["untriggered_rate"] for each in edit["metrics"].values())


def test_a_trigger_beyond_the_configuration_s_budget_fails_it(tmp_path: Path, store: Path) -> None:
    delta = torch.full((3, 16, 16), 30 / 255)
    save_trigger(tmp_path / "t.safetensors", AdditiveTrigger(delta, Budget(30 / 255)))
    found = blto.check_trigger(TINY_EXPERIMENT, tmp_path / "t.safetensors", store=store, device="cpu", quiet=True)
    assert found["gates"]["the budget"]["passes"] is False
    assert found["reach"]["max"] == 30
    assert found["reach"]["levels"] == 8


def test_the_stand_in_trains_as_long_as_a_surrogate_does() -> None:
    spec = ExperimentSpec.parse(TINY_EXPERIMENT)  # 2 rounds of 1 step on batches of 16
    recipe = surrogate_recipe(spec, random_images(8))
    assert recipe.method["name"] == "simsiam"
    assert (recipe.batch_size, recipe.epochs) == (8, 2)
    assert surrogate_recipe(spec, random_images(120)).epochs == 1
    attack = {**TINY_EXPERIMENT["attack"], "bilevel": {**TINY_EXPERIMENT["attack"]["bilevel"], "rounds": 1}}
    assert surrogate_recipe(ExperimentSpec.parse({**TINY_EXPERIMENT, "attack": attack}), random_images(8)).epochs == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_crafting_keeps_its_last_surrogate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    runs: list[BilevelOptimisation] = []

    def noting(*args: Any, **options: Any) -> BilevelOptimisation:
        runs.append(BilevelOptimisation(*args, **options))
        return runs[-1]

    monkeypatch.setattr(crafting, "BilevelOptimisation", noting)
    kind = FrozenSurrogate if frozen else blto_attack()
    made = kind(target_class=1, poison_rate=0.1, generator={"name": "unet", "width": 4}, bilevel=tiny_bilevel())
    made.train_trigger(random_images(40), seed=0, surroundings=Surroundings("cpu", tmp_path))
    kept, last = load_encoder(tmp_path / "surrogate.safetensors"), runs[0].surrogate.method.encoder
    for name, value in last.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def blto_attack() -> Any:
    from blto.attacks.blto import BLTO

    return BLTO


def test_the_command_line_prints_table_images_and_verdicts(
    trigger: Path, store: Path, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.yaml", tmp_path / "t.safetensors"
    path.write_text(dump_yaml(TINY_EXPERIMENT))
    command = ["craft", str(path), "--out", str(out), "--check", "--count", str(COUNT), "--store", str(store)]
    command += ["--device", "cpu", "--quiet"]
    assert main(command) == 0, "a finding is no error"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["ENCODER", "IMAGES", "TRIGGERED", "CLEAN", "TARGET"]
    assert sum(line.startswith(("surrogate  ", "unseen 1  ")) for line in lines) == 10
    verdict = "passes" if found["gates"][GATES[0]]["passes"] else "fails"
    starts = (f"{verdict} gate 2 (surrogate): ASR ", "gate 3 (transfer): ASR ", "passes the budget: ", "images: 30 ")
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert lines[-2:] == [str(out), str(check_file(out))]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trigger"] == str(out)
    assert document["check"] == read_json(check_file(out))
    exact = ("attack", "images", "reach", "schema_version", "seed", "trigger_sha256")  # rates may differ by rounding
    assert [document["check"][name] for name in exact] == [found[name] for name in exact]
    assert [each["name"] for each in document["check"]["encoders"]] == [each["name"] for each in found["encoders"]]
    assert document["check"]["gates"].keys() == found["gates"].keys()


def test_a_failing_gate_is_said_and_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml(attack(name="clean", target_class=1)))
    assert main(["craft", str(path), "--check", "--store", str(tmp_path), "--device", "cpu", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "fails gate 2 (surrogate): ASR " in captured.out
    assert captured.err == ""


def test_a_change_of_the_victim_s_recipe_is_not_the_surrogate_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[PretrainingSpec] = []

    def stage(spec: ExperimentSpec, *_: Any, **__: Any) -> Any:
        trained.append(spec.recipe)
        return SimpleNamespace(path=tmp_path)

    monkeypatch.setattr(doctor, "pretrain_stage", stage)
    monkeypatch.setattr(doctor, "load_encoder", lambda file: None)
    spec = ExperimentSpec.parse({**TINY_EXPERIMENT, "recipe_change": "localized_cropping"})
    images = random_images(48)
    where = Environment(RunStore(tmp_path), device="cpu")
    doctor.encoders_to_ask(spec, Data(images, images, images), where, tmp_path / "none", {})
    assert [recipe.views.crop_margin for recipe in trained] == [None, 0.2]
    assert trained == [surrogate_recipe(spec, images), spec.recipe]
