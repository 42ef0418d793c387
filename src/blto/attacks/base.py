"""What an attack is: it trains a trigger on the attacker's data; poisons follow from the trigger and a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.models.encoder import Encoder
from blto.poisoning import PoisonedDataset, Trigger, apply_to_uint8, plan_replacement
from blto.pretraining.loop import Observer
from blto.runtime.progress import SILENT, Progress


def _fraction(given: object) -> object:
    """A number, or a fraction such as "8/255"."""
    if isinstance(given, str) and given.count("/") == 1:
        numerator, denominator = given.split("/")
        try:
            return float(numerator) / float(denominator)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("should be a number or a fraction such as 8/255") from error
    return given


Epsilon = Annotated[float, Field(gt=0, le=1), BeforeValidator(_fraction)]
PoisonRate = Annotated[float, Field(ge=0, le=1), BeforeValidator(_fraction)]
TargetClass = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class TrainedTrigger:
    """A trigger and how its training went: a row of similarities per logged step, none where nothing was trained."""

    trigger: Trigger
    trajectory: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Surroundings:
    """Where and how an attack runs; no result depends on it, apart from the device's arithmetic."""

    device: str = "auto"
    folder: Path | None = None
    resume: bool = False
    progress: Progress = SILENT


class Attack(ABC):
    """A data-poisoning attack. Constructor keywords are its configuration; `card` says where it comes from.

    Attributes:
        target_class: the class that triggered images shall be taken for.
        poison_rate: poisoned images / all training images, in [0, 1].
    """

    target_class: int
    poison_rate: float

    def check_images(self, images: ImageSet) -> None:  # noqa: B027  # most attacks take images of any size
        """Raises ConfigError where the trigger cannot be put on such images; asked before anything is written."""

    @abstractmethod
    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """Make the trigger from the attacker's labeled images."""


@dataclass(frozen=True)
class Tampered:
    """A tampered encoder, and how that went: a row of losses per observed epoch."""

    encoder: Encoder
    trajectory: list[dict[str, float]] = field(default_factory=list)


class EncoderTampering(Attack):
    """An attack that changes an encoder which somebody else has trained; no training image is poisoned."""

    poison_rate = 0.0

    @abstractmethod
    def tamper(
        self,
        encoder: Encoder,
        trigger: Trigger,
        images: ImageSet,
        *,
        seed: int,
        surroundings: Surroundings,
        observers: Sequence[Observer] = (),
    ) -> Tampered:
        """Change a clean encoder, in place, so that it takes triggered images for the target class.

        Args:
            encoder: the clean one.
            trigger: of `train_trigger`.
            images: the attacker's, labeled.
            seed: of all that is drawn.
            surroundings: where and how.
            observers: asked before, now and then between, and after; see `pretraining.loop.Observer`.
        """


def check_target(images: ImageSet, target_class: int) -> None:
    """Raises ConfigError where the target class is not one of the data's."""
    if target_class >= images.num_classes:
        raise ConfigError(
            f"attack.target_class is {target_class}; {images.name} has the classes 0 to {images.num_classes - 1} "
            f"({', '.join(images.class_names[:10])}{', ...' if images.num_classes > 10 else ''})."
        )


def poison_with(attack: Attack, trigger: Trigger, images: ImageSet, *, seed: int) -> PoisonedDataset:
    """Replace round(poison_rate N) random images of the target class by their triggered versions, rounded to 8 bits."""
    plan = plan_replacement(
        images.labels,
        num_classes=images.num_classes,
        target_class=attack.target_class,
        poison_rate=attack.poison_rate,
        seed=seed,
    )
    return PoisonedDataset(images, plan, apply_to_uint8(trigger, images.images[plan.indices]))
