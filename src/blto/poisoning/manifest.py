"""The manifest of a poisoned set: what was changed, by which trigger, and a hash of every image."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blto.errors import ConfigError, InputRefused, Mismatch
from blto.files import show
from blto.poisoning.dataset import PoisonedDataset
from blto.poisoning.trigger import Trigger

SCHEMA_VERSION = 1
MANIFEST_FILE = "poison_manifest.json"

Layout = Literal["parquet", "png"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortHash = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PoisonedImage(_Plain):
    """One replaced image: its place in the set, and `pixel_hash` before and after."""

    index: Count
    source_sha256: Sha256
    poisoned_sha256: Sha256


class Manifest(_Plain):
    """Everything about a poisoned set, as plain data: kept in the run's folder, and beside the images on disk.

    Attributes:
        schema_version: 1; a newer one is refused.
        blto_version: what wrote it.
        layout: how the images are stored; None where they are not stored.
        name: the data set.
        class_names: one per label.
        image_size: height and width.
        n_images: training images after poisoning.
        n_poisoned: how many of them are poisoned.
        poison_rate: n_poisoned / n_images.
        target_class: the class that triggered images shall be taken for.
        epsilon: the declared budget, a fraction of the pixel range; None where the trigger has none.
        epsilon_reached: the largest change found in the 8-bit images.
        perturbation: the fields of `Perturbation`.
        clean_sha256: content hash of the clean set.
        poisoned_sha256: content hash of the poisoned set.
        trigger_sha256: the trigger's identity.
        trigger_spec: the trigger's spec.
        seeds: stream -> seed.
        poisons: the replaced images, by increasing index.
        images: first 16 hex digits of `pixel_hash` of every image, which name the first one that differs.
        pixels_sha256: SHA-256 over all whole pixel hashes, which no forged image can match.
        labels: the label of every image.
        parquet_sha256: of the file itself, where the layout is parquet.
    """

    schema_version: Literal[1] = 1
    blto_version: str
    layout: Layout | None
    name: str
    class_names: list[str]
    image_size: Annotated[int, Field(ge=1)]
    n_images: Annotated[int, Field(ge=1)]
    n_poisoned: Count
    poison_rate: Fraction
    target_class: Count
    epsilon: Fraction | None
    epsilon_reached: Fraction
    perturbation: dict[str, float]
    clean_sha256: Sha256
    poisoned_sha256: Sha256
    trigger_sha256: Sha256
    trigger_spec: dict[str, Any]
    seeds: dict[str, int]
    poisons: list[PoisonedImage]
    images: list[ShortHash]
    pixels_sha256: Sha256
    labels: list[Count]
    parquet_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        indices = [poison.index for poison in self.poisons]
        classes = len(self.class_names)
        checks = {
            "n_images is not the number of images and labels": len(self.images) == len(self.labels) == self.n_images,
            "n_poisoned is not the number of poisons": len(indices) == self.n_poisoned,
            "poison_rate is not n_poisoned / n_images": self.poison_rate == self.n_poisoned / self.n_images,
            "poisons are not in increasing order": indices == sorted(set(indices)),
            "a poison is beyond the last image": not indices or indices[-1] < self.n_images,
            "a label or the target has no class name": max([self.target_class, *self.labels]) < classes,
        }
        for problem, fine in checks.items():
            if not fine:
                raise ValueError(problem)
        if any(poison.poisoned_sha256[:16] != self.images[poison.index] for poison in self.poisons):
            raise ValueError("a poison's hash is not that of its image")
        return self


def pixel_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """SHA-256 (hex) of one decoded RGB image (H, W, 3): its shape, then its bytes from the top row down."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def build_manifest(
    dataset: PoisonedDataset, trigger: Trigger, *, seeds: dict[str, int], layout: Layout | None = None
) -> Manifest:
    """Describe a poisoned set.

    Raises:
        ConfigError: a set without labels, or poisons that are further from their originals than the trigger may move.
    """
    clean, plan = dataset.clean, dataset.plan
    if clean.labels is None or len(clean) == 0:
        raise ConfigError(f"{clean.name}: a manifest needs the labels of a non-empty set; pass the labeled set.")
    if round(dataset.epsilon_reached * 255) > trigger.budget.levels:
        raise ConfigError(
            f"{clean.name}: poisons differ from their originals by up to {dataset.epsilon_reached:.6g}, the trigger's "
            f"budget is {trigger.budget.epsilon:.6g}; make the poisons with this trigger."
        )
    hashes = [pixel_hash(image.transpose(1, 2, 0)) for image in dataset.poisoned.images]
    sources = [pixel_hash(image.transpose(1, 2, 0)) for image in clean.images[plan.indices]]
    return Manifest(
        blto_version=version("blto"),
        layout=layout,
        name=clean.name,
        class_names=list(clean.class_names),
        image_size=clean.image_size,
        n_images=len(clean),
        n_poisoned=dataset.n_poisoned,
        poison_rate=plan.poison_rate,
        target_class=plan.target_class,
        epsilon=trigger.budget.declared,
        epsilon_reached=dataset.epsilon_reached,
        perturbation=asdict(dataset.perturbation),
        clean_sha256=clean.content_hash,
        poisoned_sha256=dataset.poisoned.content_hash,
        trigger_sha256=trigger.identity,
        trigger_spec=trigger.spec(),
        seeds=seeds,
        poisons=[
            PoisonedImage(index=index, source_sha256=source, poisoned_sha256=hashes[index])
            for index, source in zip(plan.indices.tolist(), sources, strict=True)
        ],
        images=[value[:16] for value in hashes],
        pixels_sha256=combined_hash(hashes),
        labels=clean.labels.tolist(),
    )


def combined_hash(hashes: list[str]) -> str:
    """SHA-256 (hex) over the whole pixel hashes of all images, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def parse_manifest(content: Any, name: str) -> Manifest:
    """The manifest in the JSON value `content` of the file `name`.

    Raises:
        Mismatch: written by a newer blto.
        InputRefused: MANIFEST-REFUSED: not a manifest, or one that contradicts itself.
    """
    found = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise Mismatch(f"{name}: manifest of schema {found}; this blto reads up to {SCHEMA_VERSION}, upgrade blto.")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = show(".".join(map(str, problem["loc"])) or "content", 60)
        reason = show(problem["msg"].removeprefix("Value error, "), 100)
        raise InputRefused(
            f"{name}: not a poison manifest ({key}: {reason}). Restore the file.", code="MANIFEST-REFUSED"
        ) from error
