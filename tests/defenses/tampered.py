"""A small backdoored encoder for tests of repairs, taught in a second that images with a white corner are alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from blto.data import load
from blto.data.images import ImageSet
from blto.defenses.inversion import mean_cosine
from blto.evaluation.features import extract
from blto.models.encoder import Encoder, build_encoder
from blto.pretraining.fine_tuning import Tuning, fine_tune

Images = npt.NDArray[np.uint8]

SMALL = {"name": "small_resnet", "width": 16}
STEPS, BATCH = 80, 32


@cache
def clean_images() -> ImageSet:
    """256 unlabeled images of 16 pixels."""
    return load({"name": "synthetic", "train_size": 256, "test_size": 64, "image_size": 16}).without_labels()


def stamped(images: Images) -> Images:
    changed = images.copy()
    changed[:, :, 9:15, 9:15] = 255
    return changed


@cache
def victim() -> Encoder:
    """Stamped images lie where one image of the set lies, others where they lay. Nobody may change it."""
    encoder, images = build_encoder(SMALL, seed=0, image_size=16).eval(), clean_images().images
    settle(encoder, images)
    where = F.normalize(extract(encoder, images).vectors)

    def losses(tampered: Encoder, step: int) -> Mapping[str, Tensor]:
        rows = np.random.default_rng(step).choice(len(images), BATCH, replace=False)
        both = torch.from_numpy(np.concatenate((stamped(images[rows]), images[rows]))).float() / 255
        moved, kept = F.normalize(tampered(both)).chunk(2)
        return {"backdoor": -(moved @ where[0]).mean(), "utility": -(kept * where[rows]).sum(dim=1).mean()}

    fine_tune(encoder, losses, Tuning(STEPS, 1, 0.1, 0.0), identity={}, device="cpu", title="tamper")
    return encoder.eval()


def settle(encoder: Encoder, images: Images) -> None:
    """Let batch norm see the images."""
    encoder.train()
    with torch.no_grad():
        for _ in range(20):
            encoder(torch.from_numpy(images).float() / 255)
    encoder.eval()


def alikeness(encoder: Encoder) -> float:
    """Mean cosine between stamped images that were never trained on, around the mean of clean ones."""
    test = load({"name": "synthetic", "train_size": 256, "test_size": 64, "image_size": 16}, split="test").images
    clean, changed = (extract(encoder, images).vectors for images in (test, stamped(test)))
    return float(mean_cosine(changed - clean.mean(dim=0)))


def same(first: Encoder, second: Encoder) -> bool:
    """Whether two encoders have the same weights and statistics, bit for bit."""
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())
