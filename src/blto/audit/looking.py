"""Inspections of a scan, each made once and kept in the store; and the encoders that a drill tampers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from blto.attacks.bad_encoder import BadEncoder
from blto.attacks.base import Surroundings
from blto.audit.reading import Suspect, suspect_of
from blto.data.images import ImageSet
from blto.defenses.base import Conditions, EncoderDetector, Inspection, inspect_encoder, learn_from, taught
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.models.encoder import Encoder
from blto.records import RunStore, StageFolder
from blto.runtime.seeds import numpy_generator

TENSORS = "tensors.safetensors"
DRILL_STEPS, DRILL_BATCH, DRILL_LR = 320, 256, 0.03
"""Of BadEncoder: on the bank's encoders (docs/defenses) as many teach it the square."""


@dataclass(frozen=True)
class Looking:
    """Shows one set of images to detectors.

    Attributes:
        images: the clean ones.
        store: keeps what was found.
        conditions: where, and from which seed.
    """

    images: ImageSet
    store: RunStore
    conditions: Conditions

    def inspect(
        self, spec: Mapping[str, Any], detector: EncoderDetector, suspect: Suspect, references: Sequence[Suspect] = ()
    ) -> Inspection:
        """What `detector`, which `spec` describes and which learns from `references`, finds in an encoder."""
        known = {"references": [each.identity for each in references]} if references else {}
        stage = self._stage("inspect", suspect, detector=dict(spec), **known)
        with stage.making() as needed:
            if needed:
                conditions = self._taught(spec, detector, references)
                self.conditions.progress.say(f"{spec['name']}: {suspect.name}")
                found = inspect_encoder(detector, suspect.encoder, self.images, conditions)
                _write(stage, found.trigger)
                facts = {"score": found.score, "flagged": found.flagged, "measures": dict(found.measures)}
                stage.commit({**facts, "seconds": found.seconds})
        return Inspection(**stage.facts, trigger=_read(stage))

    def _taught(self, spec: Mapping[str, Any], detector: EncoderDetector, references: Sequence[Suspect]) -> Conditions:
        """The conditions, with what the detector learns from the references."""
        if not references:
            return self.conditions
        known = [each.identity for each in references]
        inputs = {"references": known, "images": self.images.content_hash, "seed": self.conditions.seed}
        stage = self.store.stage("learn", {**inputs, "detector": spec["name"], "learning": dict(detector.learning)})
        with stage.making() as needed:
            if needed:
                self.conditions.progress.say(f"{spec['name']}: learns from {len(references)} clean encoders")
                encoders = [each.encoder for each in references]
                _write(stage, learn_from(detector, encoders, self.images, self.conditions).learned.tensors)
                stage.commit({})
        return taught(detector, _read(stage), self.conditions)

    def plant(self, clean: Suspect) -> tuple[Suspect, float]:
        """The encoder after BadEncoder, which takes a white square for one of the images, drawn from the seed; and the
        mean cosine, at the end, of images with the square to that image: a backdoor that does not bind is no drill.
        """
        stage = self._stage("drill", clean, steps=DRILL_STEPS, lr=DRILL_LR)
        encoder = deepcopy(clean.encoder)
        with stage.making() as needed:
            if needed:
                self.conditions.progress.say(f"drill: tamper with {clean.name}")
                cosine = self._tamper(encoder, clean)
                _write(stage, encoder.cpu().state_dict())
                stage.commit({"cosine": cosine})
        encoder.load_state_dict(_read(stage))
        return suspect_of(encoder.eval(), f"planted in {clean.name}", stage.path.name, "drill"), stage.facts["cosine"]

    def _tamper(self, encoder: Encoder, clean: Suspect) -> float:
        seed, images = self.conditions.seed, self.images
        batch = min(DRILL_BATCH, len(images))
        epochs = -(-DRILL_STEPS // (len(images) // batch))
        attack = BadEncoder(target_class=1, epochs=epochs, lr=DRILL_LR, batch_size=batch)
        chosen = numpy_generator(seed, "defense", "drill", clean.identity).integers(len(images))
        labels = (np.arange(len(images)) == chosen).astype(np.int64)
        labeled = ImageSet(images.images, labels, ("another", "the reference"), images.name)
        where = Surroundings(self.conditions.device, progress=self.conditions.progress)
        trigger = attack.train_trigger(labeled, seed=seed, surroundings=where).trigger
        tampered = attack.tamper(encoder, trigger, labeled, seed=seed, surroundings=where)
        return -tampered.trajectory[-1]["backdoor"]

    def _stage(self, kind: str, suspect: Suspect, **more: Any) -> StageFolder:
        inputs = {"encoder": suspect.identity, "images": self.images.content_hash, "seed": self.conditions.seed}
        return self.store.stage(kind, {**inputs, **more})


def _write(stage: StageFolder, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep tensors in a stage, where there are any."""
    if tensors:
        arrays = {name: value.detach().contiguous().numpy() for name, value in tensors.items()}
        write_safetensors(stage.path / TENSORS, arrays, {})


def _read(stage: StageFolder) -> dict[str, torch.Tensor]:
    """What `_write` has kept."""
    if not (stage.path / TENSORS).exists():
        return {}
    return {name: torch.from_numpy(value.copy()) for name, value in read_safetensors(stage.path / TENSORS)[0].items()}
