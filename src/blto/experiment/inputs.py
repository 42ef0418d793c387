"""Where a run happens, its images, and its attack checked against them: all that comes before the first stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blto.attacks import ATTACKS
from blto.attacks.base import Attack, EncoderTampering, check_target
from blto.attacks.bilevel_spec import surrogate_poison_rate
from blto.data import load
from blto.data.images import ImageSet, hold_out
from blto.errors import ConfigError
from blto.experiment.preflight import check_backbone
from blto.experiment.spec import ExperimentSpec
from blto.poisoning import Budget, plan_replacement
from blto.records import RunStore
from blto.runtime.distributed import require_one_process
from blto.runtime.progress import SILENT, Progress
from blto.runtime.seeds import numpy_generator


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
    attack.check_images(data.attacker if isinstance(attack, EncoderTampering) else data.train)
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
