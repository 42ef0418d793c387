"""Whether a recipe fits the images, found out before anything is trained or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blto.data.images import ImageSet
from blto.errors import BltoError, ConfigError
from blto.files.text import show
from blto.models.encoder import build_encoder
from blto.pretraining.spec import PretrainingSpec


def check_recipe(recipe: PretrainingSpec, images: ImageSet) -> None:
    """Raises ConfigError where the images are fewer than a batch, or of a size that the backbone does not take."""
    if recipe.batch_size > len(images):
        raise ConfigError(
            f"pretraining.batch_size is {recipe.batch_size}, but there are {len(images)} training images; "
            "give at most that many."
        )
    check_backbone(recipe.backbone, images.image_size, "pretraining.backbone")


def check_backbone(backbone: Mapping[str, Any], image_size: int, key: str) -> None:
    """Build a library's network once: nothing else tells whether it has a classifier to remove or takes such images."""
    if "/" in backbone["name"]:
        try:
            build_encoder(backbone, seed=0, image_size=image_size)
        except (BltoError, RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{key}: {backbone['name']} cannot be used on images of {image_size} pixels ({show(error, 100)}); "
                "give another one."
            ) from error
