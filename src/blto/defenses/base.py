"""What a defense is, by the stage at which it acts: what it is asked, what it may see, what it answers.

A defense declares how many clean images it needs; the functions below hand it that, without labels, and nothing else.
Scores are larger for what is more suspicious.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blto.data.images import ImageSet
from blto.defenses.evidence import Evidence
from blto.errors import ConfigError, Diverged, InputRefused
from blto.models.encoder import Encoder
from blto.pretraining.spec import PretrainingSpec
from blto.runtime.progress import SILENT, Progress
from blto.runtime.seeds import numpy_generator

Images = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Learned:
    """What a detector has learned of clean encoders, and which it was: to one of other options it means nothing.

    Attributes:
        detector: its class's name; empty where nothing was learned.
        options: its `EncoderDetector.learning`.
        tensors: what its `learn` has returned, on the CPU.
    """

    detector: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


NOTHING = Learned("", {}, {})


@dataclass(frozen=True)
class Conditions:
    """Where a defense runs and what it draws from.

    Attributes:
        seed: of all that is drawn.
        device: "cpu" or "cuda".
        progress: where progress goes.
        learned: what the detector has learned; nothing for those that learn nothing.
    """

    seed: int = 0
    device: str = "cpu"
    progress: Progress = field(default=SILENT)
    learned: Learned = field(default=NOTHING)


class Defense:
    """Constructor keywords are a defense's configuration; `card` says where it comes from.

    Attributes:
        images: how many clean images it is to be shown, without labels; 0 for none.
        evidence: whether it may be relied on, and why.
    """

    images: int = 0
    evidence: ClassVar[Evidence] = Evidence()


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a detector found in an encoder.

    Attributes:
        score: comparable between encoders of one family on images of one kind.
        flagged: by the method's own published threshold; None where it has none.
        measures: what the score was made from, by name.
        trigger: the reconstructed one, where there is one, in [0, 1]: `mask` (1, H, W) and `patch` (3, H, W); or, where
            it differs from image to image, a few images `plain` and `triggered`, (N, 3, H, W) both.
        seconds: of wall time.
    """

    score: float
    flagged: bool | None
    measures: Mapping[str, float] = field(default_factory=dict)
    trigger: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


class EncoderDetector(Defense, ABC):
    """Says how suspicious an encoder is.

    Attributes:
        references: how many encoders of the suspect's family that are known to be clean it learns from; 0 for none.
        learning: the options of which `learn` is a function, so that what it returns can be kept and shared.
    """

    references: int = 0
    learning: Mapping[str, Any] = MappingProxyType({})

    def learn(self, references: Sequence[Encoder], images: Images, conditions: Conditions) -> dict[str, Tensor]:
        """What it has to know of clean encoders of a family, on the CPU; once for all suspects of the family.

        Args:
            references: `self.references` of them, left as they are.
            images: as for `inspect`.
            conditions: where, and from which seed.
        """
        return {}

    def reason_against(self, encoder: Encoder) -> str | None:
        """Why such an encoder cannot be inspected, as a clause; None where it can."""
        return None

    @abstractmethod
    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        """Look at one encoder, in evaluation mode; its weights, statistics and modes are left as they were.

        Args:
            encoder: the suspect.
            images: uint8 (`self.images`, 3, S, S), clean.
            conditions: where, and from which seed.
        """


class EncoderRepair(Defense, ABC):
    """Makes an encoder harmless, or tries to."""

    @abstractmethod
    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """Return the repaired encoder. `encoder` is the defense's own copy, in evaluation mode, and may be changed."""


class DatasetFilter(Defense, ABC):
    """Says how suspicious each image of a training set is.

    Attributes:
        needs_encoder: whether it needs an encoder that was pretrained on the very set.
    """

    needs_encoder: bool = True

    @abstractmethod
    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """One number an image, larger for the more suspicious.

        Args:
            suspects: uint8 (N, 3, S, S), the training set, without labels.
            encoder: pretrained on it, where `needs_encoder`; else None.
            conditions: where, and from which seed.
        """


class InputDetector(Defense, ABC):
    """Says of images that reach an encoder in use how suspicious each is."""

    @abstractmethod
    def score(self, suspects: Images, encoder: Encoder, clean: Images, conditions: Conditions) -> Scores:
        """One number an image, larger for the more suspicious.

        Args:
            suspects: uint8 (N, 3, S, S).
            encoder: in evaluation mode, left as it was.
            clean: uint8 (`self.images`, 3, S, S), to compare with.
            conditions: where, and from which seed.
        """


class RecipeChange(Defense, ABC):
    """Changes the recipe by which a victim is pretrained; a victim that was trained with it tells what it is worth."""

    @abstractmethod
    def change(self, spec: PretrainingSpec) -> PretrainingSpec:
        """The changed recipe; `spec` stays as it is.

        Raises:
            ConfigError: it cannot change such a recipe.
        """


def shown(defense: Defense, images: ImageSet | None, conditions: Conditions) -> Images:
    """As many of the clean images as the defense asks for, drawn from the seed, without labels.

    Raises:
        InputRefused: there are fewer than it needs.
    """
    there = 0 if images is None else len(images)
    if there < defense.images:
        raise InputRefused(
            f"{'no clean images' if images is None else images.name}: {there} images, and the defense needs "
            f"{defense.images}; give more, or lower its option images."
        )
    if images is None or not defense.images:
        return np.empty((0, 3, 1, 1), np.uint8)
    draw = numpy_generator(conditions.seed, "defense", "images")
    return np.ascontiguousarray(images.images[np.sort(draw.choice(there, defense.images, replace=False))])


def learn_from(
    detector: EncoderDetector, references: Sequence[Encoder], images: ImageSet | None, conditions: Conditions
) -> Conditions:
    """The conditions under which a detector inspects, with what it learned of clean encoders.

    Raises:
        InputRefused: too few images, or fewer clean encoders than it learns from.
    """
    if len(references) < detector.references:
        raise InputRefused(
            f"{len(references)} clean encoders, and the defense learns from {detector.references}; give more, or lower "
            "its option references."
        )
    if not detector.references:
        return conditions
    taken = [encoder.eval() for encoder in references[: detector.references]]
    return taught(detector, detector.learn(taken, shown(detector, images, conditions), conditions), conditions)


def taught(detector: EncoderDetector, tensors: Mapping[str, Tensor], conditions: Conditions) -> Conditions:
    """The conditions with what `learn` of such a detector has returned, now or before it was kept."""
    return replace(conditions, learned=Learned(type(detector).__name__, detector.learning, tensors))


def inspect_encoder(
    detector: EncoderDetector, encoder: Encoder, images: ImageSet | None, conditions: Conditions
) -> Inspection:
    """Let a detector look at an encoder, and take the time.

    Raises:
        InputRefused: too few images, or the detector learns from clean encoders and nothing was learned.
        ConfigError: what was learned is another detector's, or one's of other options.
    """
    _require_own(detector, conditions.learned)
    given, started = shown(detector, images, conditions), time.monotonic()
    found = detector.inspect(encoder.eval(), given, conditions)
    return replace(found, seconds=time.monotonic() - started)


def _require_own(detector: EncoderDetector, learned: Learned) -> None:
    """Raises as `inspect_encoder` says where such a detector cannot use what was learned."""
    name = type(detector).__name__
    if not detector.references:
        return
    if not learned.detector:
        raise InputRefused(f"{name}: compares with clean encoders of the family; give some, by learn_from.")
    if learned.detector != name:
        raise ConfigError(f"{name}: was given what {learned.detector} has learned; let it learn for itself.")
    if differ := [key for key, value in detector.learning.items() if learned.options.get(key) != value]:
        given, own = ({key: each.get(key) for key in differ} for each in (learned.options, detector.learning))
        raise ConfigError(f"{name}: has {own}, and was given what was learned with {given}; let it learn again.")


def repair_encoder(repair: EncoderRepair, encoder: Encoder, images: ImageSet | None, conditions: Conditions) -> Encoder:
    """A repaired copy of an encoder, in evaluation mode.

    Raises:
        InputRefused: too few images.
        Diverged: a weight became NaN or Inf.
    """
    repaired = repair.repair(deepcopy(encoder).eval(), shown(repair, images, conditions), conditions).eval()
    if not all(torch.isfinite(value).all() for value in repaired.state_dict().values()):
        raise Diverged("the repaired encoder holds NaN or Inf; lower the repair's learning rate.")
    return repaired


def score_dataset(
    filtering: DatasetFilter, suspects: ImageSet, encoder: Encoder | None, conditions: Conditions
) -> Scores:
    """Scores of a training set, one an image; the filter sees no label.

    Raises:
        InputRefused: it needs an encoder and there is none.
    """
    if filtering.needs_encoder and encoder is None:
        raise InputRefused(f"{suspects.name}: the filter needs an encoder pretrained on them; give one.")
    given = encoder.eval() if encoder is not None and filtering.needs_encoder else None
    return filtering.score(suspects.images, given, conditions)


def score_inputs(
    detector: InputDetector, suspects: ImageSet, encoder: Encoder, clean: ImageSet | None, conditions: Conditions
) -> Scores:
    """Scores of images that reach an encoder in use. Raises InputRefused for too few clean images."""
    return detector.score(suspects.images, encoder.eval(), shown(detector, clean, conditions), conditions)
