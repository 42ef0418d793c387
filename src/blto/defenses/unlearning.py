"""Unlearning: an encoder forgets the triggers that a defender has found in it (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from blto.defenses.base import Conditions, EncoderRepair, Images
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.defenses.decree import DECREE
from blto.defenses.evidence import Evidence
from blto.errors import ConfigError
from blto.models.encoder import Encoder
from blto.poisoning import apply_to_uint8, quantise
from blto.pretraining.fine_tuning import Tuning, fine_tune
from blto.pretraining.loop import batch_rows
from blto.registry import Card
from blto.runtime.seeds import stream_seed

PATCH_IMAGES = 1000


class Unlearning(EncoderRepair):
    """Fine-tune until the triggers that were found in the encoder no longer move its features.

    Two kinds are looked for in the suspect itself: for each cluster of the clean images a generator within epsilon that
    moves other images there (`cluster_triggers`), and one small patch that makes all images alike (DECREE, begun in
    nine windows). Then the encoder is fine-tuned so that an image with any of them, and without, has the features that
    the image had before: the sum of 1 - cosine of both. Batch norm stays as it is.

    Ours; the second half is SSL-Cleanse's mitigation (Zheng et al., ECCV 2024, arXiv 2303.09079) without the
    self-supervised loss, for which the old features stand in, and BadEncoder's utility loss the other way round.

    Args:
        images: how many clean images it is shown.
        clusters: how many triggers of the first kind; 0 for none, else two or more.
        epsilon: their L-infinity budget, a fraction of the pixel range.
        search_steps: of Adam for each of them.
        patch_epochs: of DECREE in each window; 0 for no patch.
        steps, batch_size, lr: of the fine-tuning (SGD with momentum 0.9).
    """

    card = Card(
        "Unlearning",
        "invert triggers in the encoder, and fine-tune until they move nothing",
        threat_model="the encoder and clean images without labels",
    )
    evidence = Evidence(
        "It does not repair the patch, halves BadEncoder's ASR by the linear probe (97 to 54%) and hardly by kNN, and "
        "halves BLTO's on the victim and on its clean twin alike; one encoder each."
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 5000,
        clusters: Annotated[int, Field(ge=0, le=1000)] = 10,
        epsilon: Annotated[float, Field(gt=0, le=1)] = 8 / 255,
        search_steps: Annotated[int, Field(ge=1)] = 200,
        patch_epochs: Annotated[int, Field(ge=0)] = 100,
        steps: Annotated[int, Field(ge=1)] = 600,
        batch_size: Annotated[int, Field(ge=2)] = 128,
        lr: Annotated[float, Field(gt=0)] = 0.02,
    ) -> None:
        if clusters == 1:
            raise ConfigError("clusters is 1, and a trigger leads from one to another; give 0 for none, or 2 or more.")
        self.images, self.clusters, self.patch_epochs = images, clusters, patch_epochs
        self.search = Search(epsilon=epsilon, width=16, steps=search_steps, batch_size=64, lr=4e-3)
        self.steps, self.batch_size, self.lr = steps, min(batch_size, images), lr

    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """See `EncoderRepair.repair`.

        Raises:
            Diverged: a loss became NaN or Inf.
        """
        before = vectors_of(encoder, images, conditions)
        triggered = self._triggered(encoder, before, images, conditions)
        if not triggered:
            return encoder
        seed = stream_seed(conditions.seed, "defense", "unlearning")
        batches = len(images) // self.batch_size

        def losses(tuned: Encoder, step: int) -> Mapping[str, Tensor]:
            epoch, batch = divmod(step, batches)
            rows = batch_rows(len(images), self.batch_size, seed=seed, epoch=epoch, batch=batch)
            place = tuned.mean.device
            wanted = before[rows].to(place)
            both = torch.cat([torch.from_numpy(source[rows]) for source in (images, triggered[step % len(triggered)])])
            found = tuned(both.to(place).float().div_(255)).float()
            plain, moved = (1 - F.cosine_similarity(each, wanted).mean() for each in found.chunk(2))
            return {"utility": plain, "trigger": moved}

        fine_tune(
            encoder,
            losses,
            Tuning(steps_per_epoch=self.steps, epochs=1, lr=self.lr, weight_decay=0.0),
            identity={"defense": "unlearning", "seed": conditions.seed},
            device=conditions.device,
            progress=conditions.progress,
            title="unlearning",
        )
        return encoder.cpu()

    def _triggered(self, encoder: Encoder, features: Tensor, images: Images, conditions: Conditions) -> list[Images]:
        """The clean images with each trigger that was found; the patch, being one, as often as all others together."""
        found: list[Images] = []
        if self.clusters:
            clusters = common_clusters([features], self.clusters, conditions.seed)
            triggers = invert_clusters([encoder], [features], images, clusters, self.search, conditions)
            found = [apply_to_uint8(trigger, images) for trigger in triggers]
        if self.patch_epochs:
            some = images[:PATCH_IMAGES]
            patch = DECREE(images=len(some), epochs=self.patch_epochs, starts=9, begin="windows")
            stamp = patch.inspect(encoder, some, conditions).trigger
            if stamp:
                pixels = torch.from_numpy(images).float().div_(255)
                stamped = (1 - stamp["mask"]) * pixels + stamp["mask"] * stamp["patch"]
                found += [quantise(stamped).numpy()] * max(1, len(found))
        return found
