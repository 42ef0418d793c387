"""Small things that many tests need: random images with labels, untrained encoders, recipes that run in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blto.attacks.bilevel_spec import BilevelSpec
from blto.data.images import ImageSet
from blto.models.checkpoints import save_encoder
from blto.models.encoder import build_encoder
from blto.pretraining.spec import OptimizerSpec, PretrainingSpec, RecipeSpec

TINY_BACKBONE = {"name": "small_resnet", "width": 4, "stem_stride": 2}
TINY_METHODS = {
    "simclr": {"name": "simclr", "hidden_dim": 16, "output_dim": 8},
    "simsiam": {"name": "simsiam", "hidden_dim": 16, "output_dim": 16, "predictor_dim": 8},
    "byol": {"name": "byol", "hidden_dim": 16, "output_dim": 8},
    "moco": {"name": "moco", "hidden_dim": 16, "output_dim": 8, "queue_size": 20},  # no multiple of a batch
}


def random_images(count: int = 40, *, size: int = 16, classes: int = 4, seed: int = 0) -> ImageSet:
    """Uniform noise; image i is of class i % classes."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % classes
    return ImageSet(images, labels, tuple(f"class {label}" for label in range(classes)), "noise")


def tiny_encoders(folder: Path, count: int) -> list[Path]:
    """Files of encoders for images of 16 pixels, of the seeds from 0 on."""
    files = [folder / f"{seed:02d}.safetensors" for seed in range(count)]
    for seed, file in enumerate(files):
        save_encoder(file, build_encoder(TINY_BACKBONE, seed=seed, image_size=16), TINY_BACKBONE, 16)
    return files


def tiny_recipe(method: str = "simclr", *, i_cutmix: float = 0.0, **changes: object) -> PretrainingSpec:
    """Ten steps or so of a four-channel net in fp32."""
    given = {
        "method": TINY_METHODS[method] | ({"i_cutmix": i_cutmix} if i_cutmix else {}),
        "backbone": TINY_BACKBONE,
        "epochs": 2,
        "batch_size": 8,
        "precision": "fp32",
    }
    return PretrainingSpec.model_validate(given | changes)


def tiny_bilevel(**changes: object) -> BilevelSpec:
    """A bi-level loop of a second."""
    given = {
        "rounds": 6,
        "reinitialise_every": 3,
        "warm_start_steps": 1,
        "outer_batch_size": 8,
        "surrogate": RecipeSpec(
            method=TINY_METHODS["simsiam"],
            backbone=TINY_BACKBONE,
            views="simsiam_cifar",
            batch_size=8,
            precision="fp32",
            optimizer=OptimizerSpec(lr=0.03),
        ),
    }
    return BilevelSpec.model_validate(given | changes)
