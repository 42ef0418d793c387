"""The second part of PatchSearch: a small net learns what suspicious windows look like and scores every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import expit
from torch import Tensor, nn

from blto.data.views import ViewRecipe, Views
from blto.defenses.base import Conditions, Images, Scores
from blto.errors import Diverged, InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder, build_encoder
from blto.pretraining.loop import batch_rows
from blto.pretraining.method import SSLMethod
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer, plain
from blto.runtime.seeds import numpy_generator, seeded, stream_seed

Rows = npt.NDArray[np.int64]

CROP = ViewRecipe(flip=0, jitter_probability=0, grayscale_probability=0, blur_probability=(0, 0))
COLOR = ViewRecipe(crop_scale=(1, 1), crop_ratio=(1, 1), blur_probability=(0, 0))
"""The authors' augmentation, in two parts: the window is pasted between them."""
SIZES, MARGIN = (20 / 60, 80 / 60), 10 / 224
"""Of a pasted window, shares of its own, and what is kept free along the border, a share of the image's side."""
STEPS_BETWEEN_LOOKS, LOOKS = 20, 10


class ClassifierSpec(BaseModel):
    """How the classifier is trained; but for `width` the values are the authors'.

    Attributes:
        models: nets that vote.
        iterations: of each, at most: it stops when its verdict on the held-out images has not changed for 200.
        batch_size: half of it with a window.
        lr: peak learning rate of SGD, which falls along half a cosine.
        width: of the net's first stage (the authors': a ResNet of four stages, the first with 64).
        spared: share of the images, of the clusters with the highest scores, that are not shown as clean ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    models: Annotated[int, Field(ge=1, le=100)] = 5
    iterations: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    lr: Annotated[float, Field(gt=0)] = 0.01
    width: Annotated[int, Field(ge=4, le=512)] = 16
    spared: Annotated[float, Field(ge=0, lt=1)] = 0.1


class PoisonClassifier(SSLMethod):
    """Tells images with a window from images without.

    Args:
        encoder: trained from scratch.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.feature_dim, 2)

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of two batches: clean images, then images with a window."""
        logits = self.project(self.encoder(torch.cat(tuple(views))))
        truth = torch.arange(2, device=logits.device).repeat_interleave(len(logits) // 2)
        return {"loss": F.cross_entropy(logits.float(), truth)}

    def project(self, features: Tensor) -> Tensor:
        """Logits (B, 2): clean, poisoned."""
        logits: Tensor = self.head(features)
        return logits

    @torch.no_grad()
    def evidence(self, images: Images) -> Scores:
        """Log-odds that there is a window on each of uint8 (N, 3, S, S)."""
        with plain(self.encoder):
            features = extract(self.encoder, images).vectors
        logits = self.project(features.to(self.head.weight)).double().cpu()
        return (logits[:, 1] - logits[:, 0]).numpy()


def poison_probability(
    images: Images, suspicion: Rows, judged: Rows, windows: Images, spec: ClassifierSpec, conditions: Conditions
) -> Scores:
    """Train on windows pasted on unsuspicious images, and give every image a probability.

    Where this differs from the authors' code: exactly half of a batch has a window; the net is narrower and has three
    stages; biases and norms are not decayed; the suspicion of an image that was not tried is its cluster's, where
    theirs is 0; windows are scaled by their own side, so that larger ones are pasted larger.

    Args:
        images: uint8 (N, 3, S, S).
        suspicion: (N,), larger for what is less likely shown as clean.
        judged: rows of the k most and then the k least poisonous of the images that were tried, to stop by.
        windows: uint8 (k, 3, w, w), of the former.
        spec: the training.
        conditions: where, and from which seed.

    Raises:
        InputRefused: too few images.
        Diverged: a loss became NaN or Inf.
    """
    seed = stream_seed(conditions.seed, "defense", "poison_classifier")
    shuffled = numpy_generator(seed, "defense", "ties").permutation(len(images))
    ranked = shuffled[np.argsort(-suspicion[shuffled], kind="stable")]
    clean = np.setdiff1d(ranked[int(spec.spared * len(images)) :], judged)
    if len(clean) < spec.batch_size:
        raise InputRefused(
            f"patch_search: {len(clean)} of {len(images)} images are left to train the classifier on in batches of "
            f"{spec.batch_size}; give more images, or lower training.spared or training.batch_size."
        )
    odds = np.zeros(len(images))
    with conditions.progress.bar("poison classifier", spec.models) as advance:
        for number in range(spec.models):
            own_seed = stream_seed(seed, "defense", number)
            model = train(images, clean, windows, images[judged], spec, seed=own_seed, device=conditions.device)
            odds += model.evidence(images) / spec.models
            advance(number + 1, "")
    probabilities: Scores = expit(odds)
    return probabilities


def train(
    images: Images, clean: Rows, windows: Images, held_out: Images, spec: ClassifierSpec, *, seed: int, device: str
) -> PoisonClassifier:
    """One net: windows pasted on the images at `clean`, until the verdict on `held_out` (half and half) rests."""
    side = images.shape[-1]
    encoder = build_encoder({"name": "small_resnet", "width": spec.width}, seed=seed, image_size=side)
    with seeded(seed):
        model = PoisonClassifier(encoder)
    optimizer = OptimizerSpec(lr=spec.lr, weight_decay=1e-4)
    trainer = Trainer(model, optimizer=optimizer, total_steps=spec.iterations, device=device)
    crop, color, looks = Views(CROP, side), Views(COLOR, side), []
    resized, draw = enlargements(windows, side), numpy_generator(seed, "defense", "paste")
    per_epoch = len(clean) // spec.batch_size
    for step in range(spec.iterations):
        epoch, batch = divmod(step, per_epoch)
        rows = clean[batch_rows(len(clean), spec.batch_size, seed=seed, epoch=epoch, batch=batch)]
        pixels = crop.fast(images, rows, crop.draw(seed=seed, epoch=epoch, samples=rows, view=0))
        stamp(pixels[len(rows) // 2 :], resized, draw)
        views = color.differentiable(pixels, color.draw(seed=seed, epoch=epoch, samples=rows, view=1))
        trainer.train_step(views.to(trainer.fabric.device).chunk(2))
        if (step + 1) % STEPS_BETWEEN_LOOKS == 0:
            if int(trainer.first_bad_step) >= 0:
                raise Diverged("patch_search: the classifier's loss became NaN or Inf; lower training.lr.")
            looks.append(verdict(model.evidence(held_out)))
            if len(looks) > LOOKS and len(set(looks[-LOOKS:])) == 1:
                break
    return model


def enlargements(windows: Images, side: int) -> list[Tensor]:
    """The windows in every size in which they are pasted on images of `side` pixels: float32 (k, 3, s, s) in [0, 1]."""
    pixels = torch.from_numpy(windows).float() / 255
    low, high = (max(1, round(share * windows.shape[-1])) for share in SIZES)
    high = min(high, side - 2 * round(MARGIN * side))
    return [
        F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        for size in range(low, high + 1)
    ]


def stamp(pixels: Tensor, resized: Sequence[Tensor], draw: np.random.Generator) -> None:
    """Paste on each of (B, 3, S, S), in place, one window in one size at one place."""
    side = pixels.shape[-1]
    margin = round(MARGIN * side)
    for image in pixels:
        windows = resized[int(draw.integers(len(resized)))]
        size = windows.shape[-1]
        y, x = draw.integers(margin, side - size - margin + 1, 2).tolist()
        image[:, y : y + size, x : x + size] = windows[draw.integers(len(windows))]


def verdict(evidence: Scores) -> int:
    """F1, in whole percent, of evidence whose first half should be above 0 and whose second half below."""
    says = evidence > 0
    half = len(says) // 2
    return int(100 * 2 * says[:half].sum() / max(1, says.sum() + half))
