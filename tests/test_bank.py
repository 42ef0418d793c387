"""The bank of encoders: whose trigger is there, and that it is the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bank import RESULTS, Banked, attacked, bank, has_trigger, trigger_of
from blto.attacks.base import Surroundings
from blto.attacks.ssl_backdoor import SSLBackdoor
from blto.data import load
from blto.errors import InputRefused
from blto.experiment.outcome import ENCODER, TRIGGER
from blto.models.checkpoints import save_encoder
from blto.models.encoder import build_encoder
from blto.poisoning import PatchTrigger, Trigger, save_trigger
from blto.records import RunRecord, RunStore
from tests.factories import TINY_BACKBONE

TRAIN = load({"name": "synthetic", "train_size": 200, "test_size": 40, "image_size": 16}, split="train")
PATCH: dict[str, Any] = {"name": "ssl_backdoor", "target_class": 1, "poison_rate": 0.05, "patch_size": 4}


def made(results: Path, attack: dict[str, Any], trigger: Trigger) -> Banked:
    """An encoder in a bank, whose record names a trigger."""
    record = RunRecord(
        run_id="patch-synthetic-s3-0123456789",
        spec={"seed": 3, "attack": attack},
        metrics={},
        took=False,
        provenance={"poison": {"trigger_sha256": trigger.identity}},
    )
    RunStore(results / "bank_poisoned").save(record)
    folder = results / "bank_poisoned" / "patch-s3-0123456789"
    (results / "bank_poisoned" / record.run_id).rename(folder)
    save_encoder(folder / ENCODER, build_encoder(TINY_BACKBONE, seed=3, image_size=16), TINY_BACKBONE, 16)
    (banked,) = bank(results)
    return banked


def drawn(seed: int) -> Trigger:
    options = {key: value for key, value in PATCH.items() if key != "name"}
    return SSLBackdoor(**options).train_trigger(TRAIN, seed=seed, surroundings=Surroundings("cpu")).trigger


def other() -> PatchTrigger:
    patch = torch.ones(3, 4, 4, dtype=torch.uint8)
    return PatchTrigger(patch, seed=0, placement=(0.0, 1.0), test_placement=(0.0, 1.0))


def test_a_fixed_trigger_is_made_again_and_is_the_run_s(tmp_path: Path) -> None:
    banked = made(tmp_path, PATCH, drawn(3))
    assert (banked.group, banked.seed) == ("patch", 3)
    assert has_trigger(banked)
    assert trigger_of(banked, TRAIN).identity == drawn(3).identity != drawn(4).identity


def test_a_kept_trigger_is_taken_and_a_learned_one_that_is_not_kept_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    banked = made(tmp_path, {**PATCH, "name": "blto", "bilevel": {}}, other())
    assert not has_trigger(banked)
    assert not list(attacked(tmp_path, [4]))
    assert not capsys.readouterr().out
    assert not list(attacked(tmp_path, [3]))
    assert capsys.readouterr().out == "left out: patch-s3-0123456789, whose trigger was not kept\n"
    with pytest.raises(InputRefused, match="no such trigger, and it would have to be learned"):
        trigger_of(banked, TRAIN)
    save_trigger(banked.file.parent / TRIGGER, other())
    assert list(attacked(tmp_path, [3])) == [banked]
    assert trigger_of(banked, TRAIN).identity == other().identity


def test_another_trigger_is_refused(tmp_path: Path) -> None:
    banked = made(tmp_path, PATCH, drawn(3))
    save_trigger(banked.file.parent / TRIGGER, other())
    with pytest.raises(InputRefused, match="not the trigger of patch-s3-0123456789"):
        trigger_of(banked, TRAIN)


def test_the_committed_bank_has_its_fixed_triggers() -> None:
    images = load({"name": "synthetic", "train_size": 40, "test_size": 10, "image_size": 32}, split="train")
    of_bank = [banked for banked in bank(RESULTS) if banked.group in ("patch", "bad_encoder")]
    assert len(of_bank) == 20
    for banked in of_bank:
        assert trigger_of(banked, images)  # compared with the record's
