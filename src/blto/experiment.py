"""One experiment from its spec to its record. The only file that knows the order of the stages:

    data -> [attacker's share] -> craft -> poison -> pretrain (poisoned, and the clean twin) -> evaluate -> record

Each stage's result is stored under the hash of what it was made from, so a run that was stopped goes on where it was, a
sweep that varies only the probe reuses the encoders, and all attacks of a seed share one clean twin.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from blto import analysis
from blto.attacks import ATTACKS
from blto.attacks.base import Attack, Surroundings, check_target, poison_with
from blto.attacks.crafting import CHECKPOINT
from blto.data import DATASETS, load
from blto.data.images import ImageSet
from blto.data.views import Views
from blto.errors import ConfigError
from blto.evaluation import Follower, evaluate_backdoor, measure_stealth
from blto.files import atomic_write, make_directory, sha256_file, write_json, write_text
from blto.files.yaml import dump_yaml
from blto.models.checkpoints import load_encoder, save_encoder
from blto.poisoning import PoisonedDataset, Trigger, apply_to_uint8, load_trigger, plan_replacement, save_trigger
from blto.poisoning.manifest import Manifest, build_manifest
from blto.pretraining.loop import pretrain
from blto.pretraining.snapshots import SnapshotObserver, snapshots
from blto.pretraining.spec import PretrainingSpec, component
from blto.records import RunRecord, RunStore, StageFolder, took
from blto.registry import validate
from blto.runtime.progress import SILENT, Progress
from blto.runtime.seeds import numpy_generator

TRIGGER, ENCODER = "trigger.safetensors", "encoder.safetensors"


class ExperimentSpec(BaseModel):
    """What a run is a function of.

    Attributes:
        seed: of every choice; victim and clean twin share it.
        data: name and arguments of an entry of DATASETS.
        attack: name and arguments of an entry of ATTACKS.
        pretraining: the victim's recipe.
        attacker_share: 0 (the paper's setting): the attacker learns the trigger on the victim's own training images.
            Above 0: on this share of the training images, of every class, which the victim then never sees.
        probes: probe name -> options; "linear" is the headline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: component(DATASETS)  # type: ignore[valid-type]  # made from the registry
    attack: component(ATTACKS)  # type: ignore[valid-type]  # made from the registry
    pretraining: PretrainingSpec = PretrainingSpec()
    attacker_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    probes: dict[str, dict[str, Any]] = {"linear": {}, "knn": {}}

    @classmethod
    def parse(cls, given: dict[str, Any]) -> ExperimentSpec:
        """Validate plain data. Raises ConfigError with the key."""
        return validate(cls, given, "")

    def with_control(self, control: str | Mapping[str, Any]) -> ExperimentSpec:
        """The same experiment with another attack, which takes over the target class, rate, budget and other options
        that it shares with this one's, except those that `control` gives itself.
        """
        own = {"name": control} if isinstance(control, str) else dict(control)
        known = ATTACKS.schema(own.get("name", "")).model_fields
        shared = {key: value for key, value in self.attack.items() if key in known}
        return self.parse({**self.model_dump(mode="json"), "attack": {**shared, **own}})


@dataclass(frozen=True)
class Environment:
    """Where a run happens; apart from the device's arithmetic no result depends on it."""

    store: RunStore
    data_root: Path | None = None
    device: str = "auto"
    resume: bool = False
    progress: Progress = field(default=SILENT)


@dataclass(frozen=True)
class Data:
    """The images of a run: the victim's training images, the attacker's, and the test images, all labeled."""

    train: ImageSet
    attacker: ImageSet
    test: ImageSet


def load_data(spec: ExperimentSpec, environment: Environment) -> Data:
    """Read the data set and, where the attacker has images of its own, divide the training images."""
    train, test = (load(spec.data, data_root=environment.data_root, split=split) for split in ("train", "test"))
    if spec.attacker_share == 0:
        return Data(train, train, test)
    if train.labels is None:
        raise ConfigError(f"attacker_share: {train.name} has no labels; give a data set with classes.")
    order = numpy_generator(spec.seed, "select", "attacker").permutation(len(train))
    is_attackers = np.zeros(len(train), dtype=bool)
    for label in range(train.num_classes):
        of_class = order[train.labels[order] == label]
        is_attackers[of_class[: round(spec.attacker_share * len(of_class))]] = True
    return Data(train.subset(np.flatnonzero(~is_attackers)), train.subset(np.flatnonzero(is_attackers)), test)


def build_attack(spec: ExperimentSpec, data: Data) -> Attack:
    """The attack of a spec, checked against the data before anything is written."""
    attack = ATTACKS.build(spec.attack)
    check_target(data.train, attack.target_class)
    plan_replacement(  # an impossible poison rate shows now, not after the trigger was learned
        data.train.labels,
        num_classes=data.train.num_classes,
        target_class=attack.target_class,
        poison_rate=attack.poison_rate,
        seed=spec.seed,
    )
    return attack


def craft_stage(spec: ExperimentSpec, data: Data, environment: Environment) -> StageFolder:
    """Learn the trigger, or find it learned. The folder has `trigger.safetensors`; its facts have the trajectory."""
    attack = build_attack(spec, data)
    inputs = {"attack": spec.attack, "images": data.attacker.content_hash, "seed": spec.seed}
    stage = environment.store.stage("craft", inputs)
    if not stage.complete:
        with stage.lock():
            surroundings = Surroundings(environment.device, stage.path, environment.resume, environment.progress)
            started = time.monotonic()
            trained = attack.train_trigger(data.attacker, seed=spec.seed, surroundings=surroundings)
            save_trigger(stage.path / TRIGGER, trained.trigger.cpu())
            stage.discard(CHECKPOINT)
            stage.commit({"crafting": trained.trajectory, "seconds": time.monotonic() - started})
    return stage


def pretrain_stage(
    spec: ExperimentSpec, images: ImageSet, environment: Environment, *, title: str = "pretrain"
) -> StageFolder:
    """Train an encoder on unlabeled images, or find it trained: `encoder.safetensors` and snapshots of its training."""
    recipe = spec.pretraining
    inputs = {"pretraining": recipe.model_dump(mode="json"), "images": images.content_hash, "seed": spec.seed}
    stage = environment.store.stage("pretrain", inputs)
    if not stage.complete:
        with stage.lock():
            started = time.monotonic()
            result = pretrain(
                images,
                recipe,
                seed=spec.seed,
                device=environment.device,
                folder=stage.path,
                resume=environment.resume,
                observers=[SnapshotObserver(stage.path / "snapshots", recipe.backbone, images.image_size)],
                progress=environment.progress,
                title=title,
            )
            save_encoder(stage.path / ENCODER, result.encoder.cpu(), recipe.backbone, images.image_size)
            stage.discard("checkpoint.safetensors")
            stage.commit({"trajectory": result.trajectory, "seconds": time.monotonic() - started})
    return stage


def run(spec: ExperimentSpec, environment: Environment) -> RunRecord:
    """Run one experiment to its record, or return the record of a run that is already there.

    Raises:
        BltoError: of any stage; what the stages before it made is kept.
    """
    resolved = spec.model_dump(mode="json")
    run_id = RunStore.run_id(resolved)
    folder = environment.store.folder(run_id)
    if (folder / "record.json").exists():
        return environment.store.load(run_id)
    data = load_data(spec, environment)
    attack = build_attack(spec, data)
    with environment.store.lock(run_id):
        say = environment.progress.say
        say(f"{run_id}: {len(data.train)} training images, {len(data.test)} test images")
        crafted = craft_stage(spec, data, environment)
        trigger = load_trigger(crafted.path / TRIGGER)
        poisoned = poison_with(attack, trigger, data.train, seed=spec.seed)
        say(f"{poisoned.n_poisoned} poisoned images, {poisoned.plan.poison_rate:.2%} of the training set")
        twin = pretrain_stage(spec, data.train.without_labels(), environment, title="pretrain the clean twin")
        victim = pretrain_stage(spec, poisoned.training_images(), environment, title="pretrain the victim")
        say("evaluate")
        stages = {"craft": crafted, "victim": victim, "clean_twin": twin}
        record = _evaluate(spec, folder, data, trigger, poisoned, stages)
        environment.store.save(record)
    return record


def _evaluate(
    spec: ExperimentSpec,
    folder: Path,
    data: Data,
    trigger: Trigger,
    poisoned: PoisonedDataset,
    stages: dict[str, StageFolder],
) -> RunRecord:
    """Measure the victim beside its twin; write figures and artefacts; return the record that vouches for them."""
    target_class = poisoned.plan.target_class
    encoder, twin = (load_encoder(stages[name].path / ENCODER) for name in ("victim", "clean_twin"))
    triggered = apply_to_uint8(trigger, data.test.images)
    found = evaluate_backdoor(
        encoder,
        twin,
        train=data.train,
        test=data.test,
        triggered=triggered,
        target_class=target_class,
        probes=spec.probes,
    )
    views = Views(spec.pretraining.views, data.test.image_size)
    follow = Follower(data.train, data.test, triggered, target_class, views)
    record = RunRecord(
        run_id=folder.name,
        spec=spec.model_dump(mode="json"),
        metrics=found.metrics,
        took=took(found.metrics),
        similarity=found.similarity,
        stealth=measure_stealth(data.test.images, triggered),
        trajectory=_trajectory(stages["victim"], follow),
        trajectory_clean_twin=_trajectory(stages["clean_twin"], follow),
        crafting=stages["craft"].facts["crafting"],
        provenance=_provenance(data, poisoned, trigger, stages),
    )
    figures = analysis.record_figures(record)
    assert data.test.labels is not None  # `evaluate_backdoor` refuses a set without them
    figures |= analysis.test_set_figures(
        data.test.images,
        triggered,
        data.test.labels,
        data.test.class_names,
        target_class,
        features=found.clean.vectors,
        triggered_features=found.triggered.vectors,
    )
    make_directory(folder / "figures")
    for name, (figure, columns) in figures.items():
        analysis.save_figure(figure, folder / "figures" / name, columns)
    for name, stage in ((TRIGGER, stages["craft"]), (ENCODER, stages["victim"])):
        atomic_write(folder / name, (stage.path / name).read_bytes())
    write_json(folder / "poison_manifest.json", _manifest(spec, trigger, poisoned).model_dump(mode="json"))
    write_text(folder / "spec.yaml", dump_yaml(record.spec))
    names = [TRIGGER, ENCODER, "poison_manifest.json", "spec.yaml"]
    names += [f"figures/{name}.{suffix}" for name in figures for suffix in ("svg", "csv")]
    return record.model_copy(update={"artefacts": {name: sha256_file(folder / name) for name in names}})


def _trajectory(stage: StageFolder, follow: Follower) -> list[dict[str, Any]]:
    """Loss and measured values at every snapshot of one training."""
    rows = {int(row["epoch"]): row for row in stage.facts["trajectory"]}
    return [{**rows[epoch], **follow(encoder)} for epoch, encoder in snapshots(stage.path / "snapshots")]


def _manifest(spec: ExperimentSpec, trigger: Trigger, poisoned: PoisonedDataset) -> Manifest:
    return build_manifest(poisoned, trigger, seeds={"run": spec.seed})


def _provenance(
    data: Data, poisoned: PoisonedDataset, trigger: Trigger, stages: dict[str, StageFolder]
) -> dict[str, Any]:
    """Versions, hashes and times: what it takes to trust a number, or to make it again."""
    of_target_class = int(np.count_nonzero(data.train.labels == poisoned.plan.target_class))
    libraries = ("blto", "torch", "torchvision", "lightly", "numpy", "numba", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "data": {
            "name": data.train.name,
            "class_names": list(data.train.class_names),
            "train_images": len(data.train),
            "test_images": len(data.test),
            "train_sha256": data.train.content_hash,
            "test_sha256": data.test.content_hash,
        },
        "poison": {
            "images": poisoned.n_poisoned,
            "poison_rate": poisoned.plan.poison_rate,
            "share_of_target_class": poisoned.n_poisoned / of_target_class,
            "epsilon_reached": poisoned.epsilon_reached,
            "trigger_sha256": trigger.identity,
        },
        "seconds": {name: stage.facts["seconds"] for name, stage in stages.items()},
    }
