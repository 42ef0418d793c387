"""The main job on embedded data, minutes long: what the data promise, a null attack, and a planted positive control."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import blto
from blto.data import load
from blto.data.images import ImageSet
from blto.demo import CONFIG
from blto.evaluation import Evaluation, evaluate_backdoor, extract, fit_probe
from blto.models.encoder import Encoder
from blto.poisoning import AdditiveTrigger, Budget, PoisonedDataset, apply_to_uint8, plan_replacement
from blto.pretraining.loop import pretrain
from blto.pretraining.spec import PretrainingSpec

RECIPE = PretrainingSpec.model_validate(
    {
        "method": {"name": "simclr", "temperature": 0.2},
        "backbone": {"name": "small_resnet", "width": 24},
        "views": "simsiam_cifar",
        "batch_size": 256,
        "epochs": 15,
        "optimizer": {"lr": 0.12},
    }
)
TARGET = 1


@cache
def data(split: str, generator_seed: int = 100) -> ImageSet:
    return load({"name": "synthetic", "generator_seed": generator_seed}, split="train" if split == "train" else "test")


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@cache
def encoder(images: ImageSet, seed: int = 100) -> Encoder:
    return pretrain(images, RECIPE, seed=seed, observations=0).encoder


@cache
def clean_twin() -> Encoder:
    return encoder(data("train").without_labels())


def attacked(trigger: AdditiveTrigger, poison_rate: float) -> Evaluation:
    """Poison, pretrain and measure beside the clean twin."""
    train, test = data("train"), data("test")
    plan = plan_replacement(train.labels, num_classes=10, target_class=TARGET, poison_rate=poison_rate, seed=100)
    poisoned = PoisonedDataset(train, plan, apply_to_uint8(trigger, train.images[plan.indices]))
    return evaluate_backdoor(
        encoder(poisoned.training_images()),
        clean_twin(),
        train=train,
        test=test,
        triggered=apply_to_uint8(trigger, test.images),
        target_class=TARGET,
        probes={"linear": {}},
    )


@pytest.mark.full
@pytest.mark.parametrize("generator_seed", [1, 2, 3])  # 0 is the demo's own
def test_an_ssl_encoder_of_the_demos_size_passes_70_percent(generator_seed: int) -> None:
    train, test = data("train", generator_seed), data("test", generator_seed)
    trained = pretrain(
        train.without_labels(), RECIPE.model_copy(update={"epochs": 20}), seed=generator_seed, observations=0
    ).encoder
    predict = fit_probe("linear", extract(trained, train.images, train.labels), 10)
    assert (predict(extract(trained, test.images).vectors) == test.labels).mean() > 0.70


@pytest.mark.full
def test_blto_learns_a_trigger_that_moves_a_victim_and_an_untrained_generator_does_not(tmp_path: Path) -> None:
    """The demo's own configuration on other images and another seed.

    It asks for what the learning must give: a trigger that moves most images on an encoder it has never met (ASRs of
    69% to 99% were seen over five seeds). How much of that is lift is not asked: the clean twin's rate, which is
    subtracted, was anything from 0% to 98% (docs/attacks/blto.md). A backdoor that takes is in `test_planted.py`.
    """
    config = CONFIG | {"data": {"name": "synthetic", "generator_seed": 101}}
    attack, clean, untrained = blto.run(config, seed=101, store=tmp_path, quiet=True)
    found = attack.metrics["linear"]
    values = {name: metric.value for name, metric in found.items() if metric.value is not None}
    assert values["asr"] >= 0.5
    assert values["untriggered_rate"] <= 0.05  # nothing shows without the trigger
    assert abs(values["clean_accuracy"] - values["clean_accuracy_clean_twin"]) <= 0.1
    assert attack.stealth["linf"] <= 32 / 255 + 1e-6
    for control in (clean, untrained):
        lift, asr = control.metrics["linear"]["lift"].value, control.metrics["linear"]["asr"].value
        assert lift is not None
        assert asr is not None
        assert lift <= 0.03
        assert asr <= 0.03
        assert not control.took
    # A null attack with a real perturbation: another trigger of the same budget does nothing to the poisoned encoder.
    train, test = data("train", 101), data("test", 101)
    backdoored = blto.load_encoder(tmp_path / attack.run_id / "encoder.safetensors")
    foreign = blto.load_trigger(tmp_path / untrained.run_id / "trigger.safetensors")
    predict = fit_probe("linear", extract(backdoored, train.images, train.labels), 10)
    hits = predict(extract(backdoored, apply_to_uint8(foreign, test.images)).vectors) == TARGET
    assert hits[test.labels != TARGET].mean() <= 0.03


@pytest.mark.full
def test_with_epsilon_0_the_lift_is_within_2_points() -> None:
    lift = attacked(AdditiveTrigger(torch.zeros(3, 32, 32), Budget(0.0)), 0.05).metrics["linear"]["lift"]
    assert lift.value is not None
    assert abs(lift.value) <= 0.02


@pytest.mark.full
def test_the_clean_control_changes_nothing(tmp_path: Path) -> None:
    config = {
        "data": {"name": "synthetic", "train_size": 600, "test_size": 300},
        "attack": {"name": "clean", "target_class": TARGET},
        "pretraining": RECIPE.model_copy(update={"epochs": 2, "batch_size": 64}).model_dump(mode="json"),
    }
    (record,) = blto.run(config, store=tmp_path, quiet=True)
    for metrics in record.metrics.values():
        assert metrics["lift"].value == pytest.approx(0, abs=1e-12)
        assert metrics["clean_accuracy"] == metrics["clean_accuracy_clean_twin"]
    assert record.stealth["linf"] == 0
    assert not record.took
