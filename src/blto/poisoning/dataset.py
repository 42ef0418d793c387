"""The poisoned training set: what the adversary knows of it, and the part that a victim may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning.plan import PoisonPlan


@dataclass(frozen=True)
class Perturbation:
    """How far the poisons are from their originals, over the poisoned images; all 0 where there are none.

    Attributes:
        linf_min: smallest over images of the largest change of a value, a fraction of the pixel range [0, 1].
        linf_mean: its mean.
        linf_max: its largest.
        l2_mean: mean over images of the Euclidean norm of the change, in units of the pixel range.
        changed_mean: mean fraction of values (3 * H * W) that changed.
    """

    linf_min: float = 0.0
    linf_mean: float = 0.0
    linf_max: float = 0.0
    l2_mean: float = 0.0
    changed_mean: float = 0.0


@dataclass(frozen=True, eq=False)
class PoisonedDataset:
    """A clean set, the plan, and what replaces the planned images. No other image can change.

    Args:
        clean: the training images before poisoning, N of them.
        plan: which of them are replaced.
        replacements: uint8 (P, 3, H, W), in the order of `plan.indices`.

    Raises:
        ConfigError: a plan made for a set of another size, or replacements of another type, number or size.
    """

    clean: ImageSet
    plan: PoisonPlan
    replacements: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.plan.train_size != len(self.clean):
            raise ConfigError(
                f"{self.clean.name}: the poison plan is for {self.plan.train_size} images and the set has "
                f"{len(self.clean)}; plan again on this set."
            )
        wanted = (self.n_poisoned, *self.clean.images.shape[1:])
        if self.replacements.dtype != np.uint8 or self.replacements.shape != wanted:
            raise ConfigError(
                f"{self.clean.name}: replacements are {self.replacements.dtype} {self.replacements.shape}; "
                f"accepted are uint8 {wanted}, one per planned image."
            )

    @property
    def n_poisoned(self) -> int:
        """Number of poisoned images."""
        return len(self.plan.indices)

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Ground truth, bool (N,): True where the image is poisoned."""
        mask = np.zeros(len(self.clean), dtype=np.bool_)
        mask[self.plan.indices] = True
        return mask

    @cached_property
    def poisoned(self) -> ImageSet:
        """The whole poisoned set, labels kept: for whoever evaluates or writes it, not for a victim."""
        return self.clean.replace(self.plan.indices, self.replacements)

    def training_images(self) -> ImageSet:
        """All that a victim sees: the images, without labels, class names or mask."""
        return self.poisoned.without_labels()

    @property
    def epsilon_reached(self) -> float:
        """Largest change of any value, as a fraction of the pixel range; 0 without poisons."""
        return self.perturbation.linf_max

    @cached_property
    def perturbation(self) -> Perturbation:
        """Size of the change, measured on the 8-bit images."""
        if self.n_poisoned == 0:
            return Perturbation()
        originals = self.clean.images[self.plan.indices]
        change = (self.replacements.astype(np.int16) - originals).reshape(self.n_poisoned, -1)
        linf = np.abs(change).max(axis=1) / 255
        return Perturbation(
            linf_min=float(linf.min()),
            linf_mean=float(linf.mean()),
            linf_max=float(linf.max()),
            l2_mean=float(np.linalg.norm(change / 255, axis=1).mean()),
            changed_mean=float((change != 0).mean()),
        )
