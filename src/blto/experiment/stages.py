"""The stages of one experiment, and their order. The only file that knows it:

    data -> [attacker's share] -> craft -> poison -> pretrain (poisoned, and the clean twin) -> evaluate -> record
                                        `or, after the clean twin: tamper with it -------^

Each stage's result is stored under the hash of what it was made from, so a run that was stopped goes on where it was, a
sweep that varies only the probe reuses the encoders, and all attacks of a seed share one clean twin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from blto.attacks.base import EncoderTampering, Surroundings, poison_with
from blto.attacks.bilevel_spec import learned_from
from blto.attacks.crafting import CHECKPOINT
from blto.data.images import ImageSet
from blto.experiment.inputs import Data, Environment, build_attack, load_data
from blto.experiment.outcome import ENCODER, TRIGGER, conclude
from blto.experiment.preflight import check_recipe
from blto.experiment.spec import ExperimentSpec
from blto.files import sha256_file
from blto.models.checkpoints import load_encoder, save_encoder
from blto.poisoning import Trigger, load_trigger, save_trigger
from blto.pretraining.loop import pretrain
from blto.pretraining.snapshots import SnapshotObserver
from blto.pretraining.spec import RecipeSpec
from blto.pretraining.trainer import arithmetic
from blto.records import RunRecord, StageFolder
from blto.runtime.device import resolve_device


def say_engine(what: str, recipe: RecipeSpec, images: ImageSet, environment: Environment) -> None:
    """One line on the precision, the processor and the path through the code that a training takes there."""
    how = arithmetic(recipe, environment.device, images.image_size)
    environment.progress.say(f"{what} in {how['precision']} on {how['processor']}, {how['engine']}")


def craft_stage(spec: ExperimentSpec, data: Data, environment: Environment) -> StageFolder:
    """Learn the trigger, or find it learned. The folder has `trigger.safetensors`; its facts have the trajectory."""
    attack = build_attack(spec, data)
    inputs = {"attack": learned_from(spec.attack), "images": data.attacker.content_hash, "seed": spec.seed}
    stage = environment.store.stage("craft", inputs)
    with stage.making(environment.progress.say) as needed:
        if needed:
            surroundings = Surroundings(environment.device, stage.path, environment.resume, environment.progress)
            started = time.monotonic()
            trained = attack.train_trigger(data.attacker, seed=spec.seed, surroundings=surroundings)
            save_trigger(stage.path / TRIGGER, trained.trigger.cpu())
            stage.discard(CHECKPOINT)
            surrogate = getattr(getattr(attack, "bilevel", None), "surrogate", None)
            size = data.attacker.image_size
            facts = arithmetic(surrogate, environment.device, size, cuda_graphs=False) if surrogate else {}
            seconds = time.monotonic() - started
            stage.commit({"crafting": trained.trajectory, "arithmetic": facts, "seconds": seconds})
    return stage


def pretraining_inputs(spec: ExperimentSpec, images: ImageSet) -> dict[str, Any]:
    """What an encoder is a function of, as the stage's inputs."""
    return {"pretraining": spec.recipe.model_dump(mode="json"), "images": images.content_hash, "seed": spec.seed}


def pretrain_stage(
    spec: ExperimentSpec, images: ImageSet, environment: Environment, *, title: str = "pretrain"
) -> StageFolder:
    """Train an encoder on unlabeled images, or find it trained: `encoder.safetensors` and snapshots of its training."""
    recipe = spec.recipe
    check_recipe(recipe, images)
    stage = environment.store.stage("pretrain", pretraining_inputs(spec, images))
    with stage.making(environment.progress.say) as needed:
        if needed:
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
            facts = arithmetic(recipe, environment.device, images.image_size)
            seconds = time.monotonic() - started
            stage.commit({"trajectory": result.trajectory, "arithmetic": facts, "seconds": seconds})
    return stage


def tamper_stage(
    spec: ExperimentSpec, data: Data, trigger: Trigger, twin: StageFolder, environment: Environment
) -> StageFolder:
    """Let the attack change the clean twin, or find it changed; the folder is like that of a pretraining."""
    attack = build_attack(spec, data)
    assert isinstance(attack, EncoderTampering)
    recipe, size = spec.recipe, data.attacker.image_size
    clean = sha256_file(twin.path / ENCODER)
    inputs = {"attack": spec.attack, "images": data.attacker.content_hash, "seed": spec.seed, "encoder": clean}
    stage = environment.store.stage("tamper", inputs)
    with stage.making(environment.progress.say) as needed:
        if needed:
            started = time.monotonic()
            result = attack.tamper(
                load_encoder(twin.path / ENCODER),
                trigger,
                data.attacker,
                seed=spec.seed,
                surroundings=Surroundings(environment.device, stage.path, environment.resume, environment.progress),
                observers=[SnapshotObserver(stage.path / "snapshots", recipe.backbone, size)],
            )
            save_encoder(stage.path / ENCODER, result.encoder.cpu(), recipe.backbone, size)
            stage.discard("checkpoint.safetensors")
            as_tuned = recipe.model_copy(update={"precision": "auto", "engine": "fast"})  # whatever the victim's is
            facts = arithmetic(as_tuned, environment.device, size, cuda_graphs=False)
            seconds = time.monotonic() - started
            stage.commit({"trajectory": result.trajectory, "arithmetic": facts, "seconds": seconds})
    return stage


def run(spec: ExperimentSpec, environment: Environment) -> RunRecord:
    """Run one experiment to its record, or return the record of a run that is already there.

    Raises:
        BltoError: of any stage; what the stages before it made is kept.
    """
    (record,) = run_all([spec], environment)
    return record


def run_all(specs: Sequence[ExperimentSpec], environment: Environment) -> list[RunRecord]:
    """Run experiments that differ in their attack alone, in order; each is checked before the first begins.

    Raises:
        BltoError: as `run`; a ConfigError comes before anything is written.
    """
    missing = [spec for spec in specs if not (environment.store.folder(spec.run_id) / "record.json").exists()]
    if missing:
        data = load_data(missing[0], environment)
        for spec in missing:
            check_recipe(spec.recipe, data.train)
            build_attack(spec, data)
        say_engine("pretraining", missing[0].recipe, data.train, environment)  # which they share
        for spec in missing:
            _run(spec, data, environment)
    return [environment.store.load(spec.run_id) for spec in specs]


def _run(spec: ExperimentSpec, data: Data, environment: Environment) -> None:
    """The stages of one run, and its record."""
    with environment.store.lock(spec.run_id):
        say = environment.progress.say
        say(f"{spec.run_id}: {len(data.train)} training images, {len(data.test)} test images")
        crafted = craft_stage(spec, data, environment)
        trigger = load_trigger(crafted.path / TRIGGER)
        attack = build_attack(spec, data)
        poisoned = poison_with(attack, trigger, data.train, seed=spec.seed)
        say(f"{poisoned.n_poisoned} poisoned images, {poisoned.plan.poison_rate:.2%} of the training set")
        twin = pretrain_stage(spec, data.train.without_labels(), environment, title="pretrain the clean twin")
        if isinstance(attack, EncoderTampering):
            victim = tamper_stage(spec, data, trigger, twin, environment)
        else:
            victim = pretrain_stage(spec, poisoned.training_images(), environment, title="pretrain the victim")
        say("evaluate")
        record = conclude(
            spec.model_dump(mode="json"),
            environment.store.folder(spec.run_id),
            views=spec.recipe.views,
            train=data.train,
            test=data.test,
            trigger=trigger,
            poisoned=poisoned,
            stages={"craft": crafted, "clean_twin": twin, "victim": victim},
            device=resolve_device(environment.device),
        )
        environment.store.save(record)
