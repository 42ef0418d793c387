"""The order of the stages: who trains on which images, what a stage is a function of, what a record says of whom."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blto import experiment
from blto.attacks.base import Surroundings, TrainedTrigger, poison_with
from blto.attacks.bilevel_spec import learned_from
from blto.attacks.untrained_generator import UntrainedGenerator
from blto.data.images import ImageSet
from blto.errors import ConfigError, Interrupted
from blto.experiment import Data, Environment, ExperimentSpec, craft_stage, load_data, outcome, pretrain_stage, stages
from blto.files import read_json
from blto.poisoning import apply_to_uint8, load_trigger
from blto.pretraining import trainer
from blto.pretraining.loop import Pretrained, pretrain
from blto.pretraining.spec import PretrainingSpec
from blto.pretraining.trainer import arithmetic
from blto.records import RunRecord, RunStore, StageFolder, load_record
from blto.runtime.interrupts import stop_requests, stopping_at
from tests.tiny_experiment import TINY_EXPERIMENT

SHARE = 0.25  # 3 of the 12 training images of each class
CONFIG: dict[str, Any] = {
    **TINY_EXPERIMENT,
    "attacker_share": SHARE,
    "attack": {
        "name": "untrained_generator",
        "target_class": 1,
        "poison_rate": 0.05,
        "generator": {"name": "unet", "width": 4},
    },
    "probes": {"linear": {}, "knn": {"k": 1}},
}


def parse(**changes: Any) -> ExperimentSpec:
    return ExperimentSpec.parse(CONFIG | changes)


def somewhere(root: Path) -> Environment:
    return Environment(store=RunStore(root), device="cpu")


def pixels(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.images}


@dataclass
class Seen:
    """A whole run, and the images that each of its trainings was given."""

    record: RunRecord
    folder: Path
    data: Data
    crafted_on: list[ImageSet] = field(default_factory=list)
    pretrained_on: dict[str, ImageSet] = field(default_factory=dict)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    environment, spec = somewhere(tmp_path_factory.mktemp("store")), parse()
    crafted_on: list[ImageSet] = []
    pretrained_on: dict[str, ImageSet] = {}
    train_trigger = UntrainedGenerator.train_trigger

    def crafting(self: Any, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        crafted_on.append(images)
        return train_trigger(self, images, seed=seed, surroundings=surroundings)

    def pretraining(images: ImageSet, *args: Any, **options: Any) -> Pretrained:
        pretrained_on[options["title"]] = images
        return pretrain(images, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UntrainedGenerator, "train_trigger", crafting)
        patch.setattr(stages, "pretrain", pretraining)
        record = experiment.run(spec, environment)
    folder = environment.store.folder(record.run_id)
    return Seen(record, folder, load_data(spec, environment), crafted_on, pretrained_on)


def test_the_attacker_s_images_and_the_victim_s_divide_every_class(tmp_path: Path) -> None:
    data, whole = (load_data(parse(attacker_share=share), somewhere(tmp_path)) for share in (SHARE, 0.0))
    assert (len(whole.train), len(data.train), len(data.attacker)) == (120, 90, 30)
    assert not pixels(data.train) & pixels(data.attacker)
    assert pixels(data.train) | pixels(data.attacker) == pixels(whole.train)
    assert len(pixels(whole.train)) == 120
    label_of = dict(zip((image.tobytes() for image in whole.train.images), whole.train.labels.tolist(), strict=True))  # type: ignore[union-attr]
    for part, of_each in ((data.train, 9), (data.attacker, 3)):
        assert part.labels is not None
        assert np.bincount(part.labels, minlength=10).tolist() == [of_each] * 10
        assert [label_of[image.tobytes()] for image in part.images] == part.labels.tolist()
    assert len({part.content_hash for part in (data.train, data.attacker, whole.train)}) == 3
    assert data.test.content_hash == whole.test.content_hash
    other = load_data(parse(seed=4), somewhere(tmp_path))
    assert pixels(other.attacker) != pixels(data.attacker)


def test_without_a_share_the_attacker_has_the_victim_s_images(tmp_path: Path) -> None:
    data = load_data(parse(attacker_share=0.0), somewhere(tmp_path))
    assert data.attacker.content_hash == data.train.content_hash


def test_held_out_images_take_the_test_set_s_place_and_nobody_trains_on_them(tmp_path: Path) -> None:
    whole = load_data(parse(attacker_share=0.0), somewhere(tmp_path))
    parts = [load_data(parse(held_out=20, seed=seed), somewhere(tmp_path)) for seed in (3, 4)]
    assert len({data.test.content_hash for data in parts}) == 1
    for data in parts:
        assert len(data.test) == 20
        assert pixels(data.test) < pixels(whole.train)
        assert pixels(data.train) | pixels(data.attacker) == pixels(whole.train) - pixels(data.test)


def test_too_many_held_out_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"held_out is 120; .* has 120 training images, give fewer"):
        load_data(parse(held_out=120), somewhere(tmp_path))


def test_the_trigger_is_learned_on_the_attacker_s_images_alone(seen: Seen) -> None:
    assert [images.content_hash for images in seen.crafted_on] == [seen.data.attacker.content_hash]


def test_victim_and_twin_see_no_image_of_the_attacker(seen: Seen) -> None:
    twin, victim = (seen.pretrained_on[f"pretrain the {who}"] for who in ("clean twin", "victim"))
    assert twin.content_hash == seen.data.train.without_labels().content_hash
    for images in (twin, victim):
        assert images.labels is None
        assert not pixels(images) & pixels(seen.data.attacker)
    changed = (twin.images != victim.images).any(axis=(1, 2, 3))
    assert seen.data.train.labels is not None
    assert seen.data.train.labels[changed].tolist() == [1] * round(0.05 * 90)
    assert seen.record.provenance["poison"]["images"] == changed.sum()
    assert seen.record.provenance["data"]["train_images"] == 90


def test_stealth_is_that_of_the_trigger_on_the_test_images(seen: Seen) -> None:
    trigger = load_trigger(seen.folder / "trigger.safetensors")
    test = seen.data.test.images
    reach = np.abs(apply_to_uint8(trigger, test).astype(int) - test).max() / 255
    assert 0 < reach <= 8 / 255
    assert seen.record.stealth["linf"] == pytest.approx(reach)
    assert seen.record.stealth["changed"] == 1


def test_each_trajectory_is_that_of_its_own_training(seen: Seen) -> None:
    spec, train = parse(), seen.data.train
    trigger = load_trigger(seen.folder / "trigger.safetensors")
    poisoned = poison_with(experiment.build_attack(spec, seen.data), trigger, train, seed=spec.seed)
    for found, images in (
        (seen.record.trajectory, poisoned.training_images()),
        (seen.record.trajectory_clean_twin, train.without_labels()),
    ):
        again = pretrain(images, spec.pretraining, seed=spec.seed, device="cpu").trajectory
        assert [row["epoch"] for row in found] == [0, 1, 2]
        assert [row.get("loss") for row in found] == [row.get("loss") for row in again]
    victim, twin = seen.record.trajectory, seen.record.trajectory_clean_twin
    assert victim[0] == twin[0], "they start from the same weights"
    assert all(row["trigger"] != other["trigger"] for row, other in zip(victim[1:], twin[1:], strict=True))


def test_what_is_measured_is_the_victim_beside_its_twin(seen: Seen) -> None:
    """The follower's last row of each training is of the encoder whose numbers the record has."""
    last, twin = seen.record.trajectory[-1], seen.record.trajectory_clean_twin[-1]
    assert seen.record.similarity["centred"] == pytest.approx(last["trigger"], abs=1e-4)
    assert seen.record.similarity["centred"] != pytest.approx(twin["trigger"], abs=1e-4)
    metrics = seen.record.metrics["knn"]  # of k = 1: the run's own options, on all images in so small a set
    for row, names in ((last, ("asr", "clean_accuracy")), (twin, ("asr_clean_twin", "clean_accuracy_clean_twin"))):
        assert [row["knn_asr"], row["knn_clean_accuracy"]] == [metrics[name].value for name in names]


def test_a_signal_to_a_sweep_is_heard_between_two_measurements_and_the_end_of_its_time_is_not(seen: Seen) -> None:
    made = seen.record.provenance["stages"]
    folder = seen.folder.parent / "stages" / made["victim"]
    victim = StageFolder(folder, "pretrain", read_json(folder / "stage.json")["inputs"])
    measured: list[Any] = []

    def follow(encoder: Any) -> dict[str, float]:
        measured.append(encoder)
        if len(measured) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with stopping_at(0.0), stop_requests() as stop:
        assert [row["epoch"] for row in outcome.trajectory(victim, follow, "cpu")] == [0, 1, 2]  # type: ignore[arg-type]
        with pytest.raises(Interrupted) as caught:
            outcome.trajectory(victim, follow, "cpu")  # type: ignore[arg-type]
    assert len(measured) == 5
    assert stop.signal_number == caught.value.signal_number == signal.SIGTERM


OTHER_ATTACK = {**CONFIG["attack"], "target_class": 2}
OTHER_RECIPE = {**CONFIG["pretraining"], "batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "is_new"),
    [
        ({"seed": 4}, True),
        ({"pretraining": OTHER_RECIPE}, True),
        ({"data": {**CONFIG["data"], "generator_seed": 1}}, True),
        ({"attack": OTHER_ATTACK}, False),
        ({"probes": {"knn": {"k": 3}}}, False),
    ],
    ids=["seed", "recipe", "images", "attack", "probes"],
)
def test_a_pretraining_is_a_function_of_seed_recipe_and_images(
    changes: dict[str, Any], is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def counting(*args: Any, **options: Any) -> Pretrained:
        nonlocal count
        count += 1
        return pretrain(*args, **options)

    monkeypatch.setattr(stages, "pretrain", counting)
    environment = somewhere(tmp_path)
    # One set for both seeds: a share would give another seed other images.
    first, second = (parse(attacker_share=0.0, **each) for each in ({}, changes))
    unlabeled = [(spec, load_data(spec, environment).train.without_labels()) for spec in (first, second)]
    folders = [pretrain_stage(spec, images, environment) for spec, images in unlabeled]
    assert (folders[0].path != folders[1].path) == is_new
    assert count == 1 + is_new
    assert all(stage.complete for stage in folders)


@pytest.mark.parametrize(
    ("changes", "is_new"),
    [
        ({"seed": 4}, True),
        ({"attack": OTHER_ATTACK}, True),
        ({"data": {**CONFIG["data"], "generator_seed": 1}}, True),
        ({"pretraining": OTHER_RECIPE}, False),
        ({"probes": {"knn": {"k": 3}}}, False),
    ],
    ids=["seed", "attack", "images", "recipe", "probes"],
)
def test_a_trigger_is_a_function_of_seed_attack_and_images(
    changes: dict[str, Any], is_new: bool, tmp_path: Path
) -> None:
    environment = somewhere(tmp_path)
    first, second = (parse(attacker_share=0.0, **each) for each in ({}, changes))
    one, other = (craft_stage(spec, load_data(spec, environment), environment) for spec in (first, second))
    assert (one.path != other.path) == is_new


def attack(poison_rate: float, inner: float | None = None) -> dict[str, Any]:
    given = TINY_EXPERIMENT["attack"]
    return {**given, "poison_rate": poison_rate, "bilevel": {**given["bilevel"], "inner_poison_rate": inner}}


@pytest.mark.parametrize(
    ("other", "is_new"),
    [
        (attack(0.1), True),
        (attack(0.1, inner=0.05), False),
        (attack(0.05, inner=0.05), False),
        (attack(0.05, inner=0.1), True),
    ],
)
def test_a_learned_trigger_depends_on_the_rate_that_its_surrogate_sees(
    other: dict[str, Any], is_new: bool, tmp_path: Path
) -> None:
    environment = somewhere(tmp_path)
    first, second = (parse(attacker_share=0.0, attack=each) for each in (attack(0.05), other))
    one, two = (craft_stage(spec, load_data(spec, environment), environment) for spec in (first, second))
    assert (one.path != two.path) == is_new


def test_an_option_that_came_later_left_the_evidence_where_it_was() -> None:
    records = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("gate*/*/record.json"))
    assert records
    for file in records:
        kept = load_record(file)
        assert ExperimentSpec.parse(kept.spec).run_id == kept.run_id, "a sweep would run it again"
    given = {"attack": "clean", "data": "synthetic"}
    spec = ExperimentSpec.parse({**given, "pretraining": {"normalise": False}})
    assert spec.model_dump(mode="json")["pretraining"]["normalise"] is False
    assert spec.run_id != ExperimentSpec.parse(given).run_id


def test_a_change_of_the_recipe_is_for_victim_and_twin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: dict[str, PretrainingSpec] = {}

    def pretraining(images: ImageSet, recipe: PretrainingSpec, **options: Any) -> Pretrained:
        trained[options["title"]] = recipe
        return pretrain(images, recipe, **options)

    monkeypatch.setattr(stages, "pretrain", pretraining)
    spec, plain = parse(recipe_change="localized_cropping"), parse()
    record = experiment.run(spec, somewhere(tmp_path))
    assert record.spec["recipe_change"] == {"name": "localized_cropping", "margin": 0.2}
    assert record.run_id != plain.run_id
    assert list(trained) == ["pretrain the clean twin", "pretrain the victim"]
    given = plain.pretraining
    wanted = given.model_copy(update={"views": given.views.model_copy(update={"crop_margin": 0.2})})
    assert set(map(PretrainingSpec.model_dump_json, trained.values())) == {wanted.model_dump_json()}
    assert spec.with_control("clean").recipe == wanted


def test_a_change_of_the_recipe_makes_the_same_encoders_as_its_options_do(tmp_path: Path) -> None:
    environment, views = somewhere(tmp_path), {"name": "simclr_cifar", "crop_margin": 0.2}
    spelled_out = parse(pretraining=CONFIG["pretraining"] | {"views": views})
    asked = [parse(recipe_change="localized_cropping"), spelled_out, parse()]
    images = load_data(asked[0], environment).train.without_labels()
    named, spelled, without = (pretrain_stage(spec, images, environment).path for spec in asked)
    assert named == spelled != without


@pytest.mark.parametrize(
    ("pretraining", "change", "message"),
    [
        ({}, "i_cutmixx", r'^recipe_change.name: unknown defense "i_cutmixx"; did you mean "i_cutmix"'),
        ({}, "clp", "^recipe_change: clp does not change a recipe; give one of i_cutmix, localized_cropping, strong_"),
        ({}, {"name": "i_cutmix", "alpha": 0}, r"^recipe_change.alpha: input should be greater than 0 \(given: 0\)\.$"),
        ({"method": "byol"}, "i_cutmix", r"^recipe_change: i_cutmix is not for method byol; give one of moco, simclr"),
        ({"method": "byoll"}, "i_cutmix", "^pretraining.method.name: unknown method"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_in_one_line(
    pretraining: dict[str, Any], change: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(pretraining=CONFIG["pretraining"] | pretraining, recipe_change=change)


def test_a_fixed_trigger_keeps_its_rate() -> None:
    fixed = {"name": "ctrl", "target_class": 1, "poison_rate": 0.05}
    assert learned_from(fixed) == fixed


def test_a_trigger_of_other_images_is_learned_anew(tmp_path: Path) -> None:
    """The attacker's share decides which images those are."""
    environment = somewhere(tmp_path)
    specs = [parse(attacker_share=share) for share in (0.0, SHARE)]
    assert len({craft_stage(spec, load_data(spec, environment), environment).path for spec in specs}) == 2


def test_a_trigger_learned_on_a_gpu_was_learned_without_cuda_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "uses_cuda_graphs", lambda engine, device: True)
    spec, environment = ExperimentSpec.parse(TINY_EXPERIMENT), somewhere(tmp_path)
    data = load_data(spec, environment)
    crafted, victim = craft_stage(spec, data, environment), arithmetic(spec.pretraining, "cpu", data.train.image_size)
    assert victim["engine"] == trainer.GRAPHS
    assert crafted.facts["arithmetic"]["engine"] == "plain torch"
