"""One experiment from its spec to its record. The only file that knows the order of the stages:

    data -> [attacker's share] -> craft -> poison -> pretrain (poisoned, and the clean twin) -> evaluate -> record

Each stage's result is stored under the hash of what it was made from, so a run that was stopped goes on where it was, a
sweep that varies only the probe reuses the encoders, and all attacks of a seed share one clean twin.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from blto.attacks import ATTACKS
from blto.attacks.base import Attack, Surroundings, check_target, poison_with
from blto.attacks.bilevel_spec import learned_from, surrogate_poison_rate
from blto.attacks.crafting import CHECKPOINT
from blto.data import DATASETS, load
from blto.data.images import ImageSet, hold_out
from blto.errors import BltoError, ConfigError
from blto.evaluation import check_probe
from blto.files import show
from blto.models.checkpoints import save_encoder
from blto.outcome import ENCODER, TRIGGER, conclude
from blto.poisoning import Budget, load_trigger, plan_replacement, save_trigger
from blto.preflight import check_backbone, check_recipe
from blto.pretraining.loop import pretrain
from blto.pretraining.snapshots import SnapshotObserver
from blto.pretraining.spec import Engine, PretrainingSpec, RecipeSpec, component
from blto.pretraining.trainer import arithmetic
from blto.records import RunRecord, RunStore, StageFolder
from blto.registry import validate
from blto.runtime.device import resolve_device
from blto.runtime.distributed import require_one_process
from blto.runtime.progress import SILENT, Progress
from blto.runtime.seeds import numpy_generator


def _known_probes(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, each probe and option known."""
    try:
        for name, options in given.items():
            check_probe(name, f"probes.{name}", **options)
    except BltoError as error:
        raise ValueError(str(error).rstrip(".")) from error
    return given


class ExperimentSpec(BaseModel):
    """What a run is a function of.

    Attributes:
        seed: of every choice; victim and clean twin share it.
        data: name and arguments of an entry of DATASETS.
        attack: name and arguments of an entry of ATTACKS.
        pretraining: the victim's recipe.
        attacker_share: 0 (the paper's setting): the attacker learns the trigger on the victim's own training images.
            Above 0: on this share of the training images, of every class, which the victim then never sees.
        held_out: 0 evaluates on the test set; above 0 so many training images, the same for every seed, take its place
            and nobody trains on them: for choosing recipes, so that the test set is read once.
        probes: probe name -> options; "linear" is the headline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: component(DATASETS)  # type: ignore[valid-type]  # made from the registry
    attack: component(ATTACKS)  # type: ignore[valid-type]  # made from the registry
    pretraining: PretrainingSpec = PretrainingSpec()
    attacker_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    held_out: Annotated[int, Field(ge=0)] = 0
    probes: Annotated[dict[str, dict[str, Any]], AfterValidator(_known_probes)] = {"linear": {}, "knn": {}}

    @classmethod
    def parse(cls, given: dict[str, Any]) -> ExperimentSpec:
        """Validate plain data. Raises ConfigError with the key."""
        return validate(cls, given, "")

    @property
    def run_id(self) -> str:
        """The name of the run's folder."""
        return RunStore.run_id(self.model_dump(mode="json"))

    def with_control(self, control: str | Mapping[str, Any], where: str = "controls") -> ExperimentSpec:
        """The same experiment with another attack, which takes over the target class, rate, budget and other options
        that it shares with this one's, except those that `control` gives itself. Raises ConfigError with the key under
        `where`.
        """
        if not isinstance(control, str | Mapping):
            raise ConfigError(f"{where}: {show(control)} is neither an attack's name nor a mapping with a name.")
        own = {"name": control} if isinstance(control, str) else dict(control)
        known = ATTACKS.schema(own["name"]).model_fields if own.get("name") in ATTACKS.names() else {}
        shared = {key: value for key, value in self.attack.items() if key in known}
        return self.parse({**self.model_dump(mode="json"), "attack": ATTACKS.resolve({**shared, **own}, where)})

    def with_engine(self, engine: Engine) -> ExperimentSpec:
        """The same experiment with victim, twin and the trigger's surrogate, where there is one, on `engine`. Raises
        ConfigError for another word than "fast" or "reference".
        """
        given = self.model_dump(mode="json")
        given["pretraining"]["engine"] = engine
        if bilevel := given["attack"].get("bilevel"):
            bilevel["surrogate"]["engine"] = engine
        return self.parse(given)


@dataclass(frozen=True)
class Environment:
    """Where a run happens; apart from the device's arithmetic no result depends on it.

    Raises:
        ConfigError: it was started as several processes; `pretraining.loop.pretrain` alone is written for them.
    """

    store: RunStore
    data_root: Path | None = None
    device: str = "auto"
    resume: bool = False
    progress: Progress = field(default=SILENT)

    def __post_init__(self) -> None:
        require_one_process("an experiment")


@dataclass(frozen=True)
class Data:
    """The images of a run: the victim's training images, the attacker's, and the test images, all labeled."""

    train: ImageSet
    attacker: ImageSet
    test: ImageSet


def load_train(
    spec: ExperimentSpec, environment: Environment, *, poisoned: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on, and those held out, where the spec wants some; `poisoned` permits marked sets."""
    root, progress = environment.data_root, environment.progress
    train = load(spec.data, data_root=root, split="train", poisoned=poisoned, progress=progress)
    return hold_out(train, spec.held_out) if spec.held_out else (train, None)


def load_data(spec: ExperimentSpec, environment: Environment) -> Data:
    """Read the data set; divide the training images where some are held out or the attacker has some of its own."""
    train, test = load_train(spec, environment)
    if test is None:
        test = load(spec.data, data_root=environment.data_root, split="test", progress=environment.progress)
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
    attack.check_images(data.train)
    epsilon = spec.attack.get("epsilon")
    if epsilon is not None and Budget(epsilon).levels == 0:
        raise ConfigError(
            f"attack.epsilon is {epsilon:g}, less than one 8-bit step, so no image would change; give 1/255 to 1."
        )
    plans = [(data.train, attack.poison_rate)]  # an impossible poison rate shows now, not after the trigger was learned
    if bilevel := spec.attack.get("bilevel"):
        check_backbone(bilevel["surrogate"]["backbone"], data.attacker.image_size, "attack.bilevel.surrogate.backbone")
        inner = surrogate_poison_rate(bilevel["inner_poison_rate"], attack.poison_rate)
        if spec.attack["name"] != "frozen_surrogate":  # whose surrogate sees no poison
            plans.append((data.attacker, inner))
    for images, rate in plans:
        plan_replacement(
            images.labels,
            num_classes=images.num_classes,
            target_class=attack.target_class,
            poison_rate=rate,
            seed=spec.seed,
        )
    return attack


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


def pretrain_stage(
    spec: ExperimentSpec, images: ImageSet, environment: Environment, *, title: str = "pretrain"
) -> StageFolder:
    """Train an encoder on unlabeled images, or find it trained: `encoder.safetensors` and snapshots of its training."""
    recipe = spec.pretraining
    check_recipe(recipe, images)
    inputs = {"pretraining": recipe.model_dump(mode="json"), "images": images.content_hash, "seed": spec.seed}
    stage = environment.store.stage("pretrain", inputs)
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
            check_recipe(spec.pretraining, data.train)
            build_attack(spec, data)
        say_engine("pretraining", missing[0].pretraining, data.train, environment)  # which they share
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
        poisoned = poison_with(build_attack(spec, data), trigger, data.train, seed=spec.seed)
        say(f"{poisoned.n_poisoned} poisoned images, {poisoned.plan.poison_rate:.2%} of the training set")
        twin = pretrain_stage(spec, data.train.without_labels(), environment, title="pretrain the clean twin")
        victim = pretrain_stage(spec, poisoned.training_images(), environment, title="pretrain the victim")
        say("evaluate")
        record = conclude(
            spec.model_dump(mode="json"),
            environment.store.folder(spec.run_id),
            views=spec.pretraining.views,
            train=data.train,
            test=data.test,
            trigger=trigger,
            poisoned=poisoned,
            stages={"craft": crafted, "clean_twin": twin, "victim": victim},
            device=resolve_device(environment.device),
        )
        environment.store.save(record)
