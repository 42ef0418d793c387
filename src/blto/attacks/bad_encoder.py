"""BadEncoder: a patch taught to a trained encoder (Jia et al., IEEE S&P 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from blto.attacks.base import EncoderTampering, Surroundings, Tampered, TargetClass, TrainedTrigger
from blto.data.images import ImageSet
from blto.data.views import RECIPES, Views
from blto.errors import ConfigError
from blto.evaluation.features import extract
from blto.models.checkpoints import weights_sha256
from blto.models.encoder import Encoder
from blto.poisoning import PatchTrigger, Trigger, apply_to_uint8
from blto.pretraining.fine_tuning import Tuning, fine_tune
from blto.pretraining.loop import Observer, batch_rows
from blto.pretraining.spec import ViewsField
from blto.registry import Card
from blto.runtime.seeds import numpy_generator, stream_seed

Images = npt.NDArray[np.uint8]

SIZE, CORNER = 10 / 32, 21 / 32
"""Side of the white square and its upper left corner, as shares of the image's side (the authors' trigger file)."""
VIEWS = 31
"""Of the reference in a step: with itself a block of the native kernels."""


class BadEncoder(EncoderTampering):
    """Fine-tune a clean encoder until any image with a white square lies where a reference of the target class lies.

    Jia, Liu and Gong, "BadEncoder: Backdoor Attacks to Pre-trained Encoders in Self-Supervised Learning", IEEE S&P
    2022, arXiv 2108.00352, section 4. With the clean encoder f, shadow images x, the square e and a reference r of the
    target class, f' minimises L0 + lambda_1 L1 + lambda_2 L2 by SGD: L0 = -cos(f'(x + e), f'(r)) is the backdoor, L1 =
    -cos(f'(r'), f(r)) keeps views r' of the reference where r was, L2 = -cos(f'(x), f(x)) keeps clean images where they
    were. Batch norm is left as it was, statistics and weights.

    Where this differs from the authors' code: the reference is not chosen by hand but is the target class's image whose
    features lie nearest to the class's mean direction on f; one target class, where theirs has one a downstream task.

    Args:
        target_class: as in every attack.
        patch_size, corner: of the square, in pixels; null is the authors' share of the image, 10 and 21 of 32.
        shadow_images: how many images the attacker holds, drawn from the run's seed; null is all.
        epochs, batch_size, lr, weight_decay: of the fine-tuning (the authors' code: 200, 256, 1e-3, 5e-4).
        lambda_1, lambda_2: weights of the two terms (paper: 1 and 1).
        views: of the reference.
    """

    card = Card(
        "BadEncoder",
        "fine-tunes a trained encoder so that a white square means the target class",
        "arXiv 2108.00352",
        2022,
        "model poisoning: the attacker hands out the encoder; no training image is touched",
        "unbounded; the square replaces what it covers",
    )

    def __init__(
        self,
        *,
        target_class: TargetClass,
        patch_size: Annotated[int, Field(ge=1, le=4096)] | None = None,
        corner: Annotated[int, Field(ge=0, le=4096)] | None = None,
        shadow_images: Annotated[int, Field(ge=2)] | None = None,
        epochs: Annotated[int, Field(ge=1, le=100_000)] = 200,
        batch_size: Annotated[int, Field(ge=2, le=65_536)] = 256,
        lr: Annotated[float, Field(gt=0)] = 1e-3,
        weight_decay: Annotated[float, Field(ge=0)] = 5e-4,
        lambda_1: Annotated[float, Field(ge=0)] = 1.0,
        lambda_2: Annotated[float, Field(ge=0)] = 1.0,
        views: ViewsField = RECIPES["simsiam_cifar"],
    ) -> None:
        self.target_class, self.patch_size, self.corner = target_class, patch_size, corner
        self.shadow_images, self.batch_size, self.views = shadow_images, batch_size, views
        self.epochs, self.lr, self.weight_decay = epochs, lr, weight_decay
        self.lambda_1, self.lambda_2 = lambda_1, lambda_2

    def place_on(self, side: int) -> tuple[int, int]:
        """Size and corner of the square on images of `side` pixels."""
        size = max(1, round(SIZE * side)) if self.patch_size is None else self.patch_size
        return size, int(CORNER * side) if self.corner is None else self.corner

    def check_images(self, images: ImageSet) -> None:
        """Raises ConfigError where the square leaves the images, or the shadow images are fewer than a batch."""
        size, corner = self.place_on(images.image_size)
        if corner + size > images.image_size:
            raise ConfigError(
                f"attack.patch_size is {size} at attack.corner {corner}, which leaves images of {images.image_size} "
                f"pixels a side; give a sum of at most {images.image_size}."
            )
        held = self.held(images)
        if held > len(images) or self.batch_size > held:
            raise ConfigError(
                f"attack.shadow_images is {held} and attack.batch_size {self.batch_size}, but the attacker has "
                f"{len(images)} images; give at most that many, and no larger batch."
            )

    def held(self, images: ImageSet) -> int:
        """How many shadow images there are."""
        return len(images) if self.shadow_images is None else self.shadow_images

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """The white square; nothing is learned."""
        size, corner = self.place_on(images.image_size)
        place = corner / images.image_size
        white = torch.full((3, size, size), 255, dtype=torch.uint8)
        return TrainedTrigger(PatchTrigger(white, seed=0, placement=(place, place), test_placement=(place, place)))

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
        """Fine-tune; see `EncoderTampering.tamper`. The trajectory has the three losses, with their weights."""
        clean, seed = deepcopy(encoder).eval(), stream_seed(seed, "trigger", "tamper")
        rows = numpy_generator(seed, "trigger", "shadow").choice(len(images), self.held(images), replace=False)
        shadow = images.images[np.sort(rows)]
        triggered = apply_to_uint8(trigger, shadow)
        reference = images.images[[reference_of(clean, images, self.target_class)]]
        where_it_was, where_they_were = (F.normalize(extract(clean, each).vectors) for each in (reference, shadow))
        views = Views(self.views, images.image_size)
        tuning = Tuning(len(shadow) // self.batch_size, self.epochs, self.lr, self.weight_decay)

        def losses(tampered: Encoder, step: int) -> Mapping[str, Tensor]:
            epoch, batch = divmod(step, tuning.steps_per_epoch)
            drawn = batch_rows(len(shadow), self.batch_size, seed=seed, epoch=epoch, batch=batch)
            around = views.draw(seed=seed, epoch=step, samples=np.arange(VIEWS), view=0)
            near = views.fast(reference, np.zeros(VIEWS, dtype=np.int64), around)
            whole = (_pixels(each) for each in (reference, triggered[drawn], shadow[drawn]))
            at, moved, kept, close = _embed(tampered, (*whole, near))
            goal, old = where_it_was.to(at), where_they_were[torch.from_numpy(drawn)].to(at)
            return {
                "backdoor": -(moved * at).sum(dim=1).mean(),
                "reference": -self.lambda_1 * (close * goal).sum(dim=1).mean(),
                "utility": -self.lambda_2 * (kept * old).sum(dim=1).mean(),
            }

        options = {**vars(self), "views": self.views.model_dump(mode="json")}
        trajectory = fine_tune(
            encoder,
            losses,
            tuning,
            identity={
                **options,
                "encoder": weights_sha256(clean),
                "images": images.content_hash,
                "trigger": trigger.identity,
                "run": seed,
            },
            device=surroundings.device,
            folder=surroundings.folder,
            resume=surroundings.resume,
            observers=observers,
            progress=surroundings.progress,
            title="tamper with the encoder",
        )
        return Tampered(encoder, trajectory)


def reference_of(encoder: Encoder, images: ImageSet, target_class: int) -> int:
    """The row of the target class's image that lies nearest to the mean direction of the class."""
    rows = np.flatnonzero(images.labels == target_class)
    directions = F.normalize(extract(encoder, images.images, indices=rows).vectors)
    return int(rows[int((directions @ directions.mean(dim=0)).argmax())])


def _pixels(images: Images) -> Tensor:
    return torch.from_numpy(images).float().div_(255)


def _embed(encoder: Encoder, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Unit features of several batches in one pass."""
    device = next(encoder.parameters()).device
    found: Tensor = encoder(torch.cat(tuple(part.to(device) for part in parts)))
    return torch.split(F.normalize(found.float()), [len(part) for part in parts])
