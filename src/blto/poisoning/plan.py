"""Which training images are poisoned, and the only definition of the poison rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blto.errors import ConfigError
from blto.runtime.seeds import numpy_generator


@dataclass(frozen=True, eq=False)
class PoisonPlan:
    """Training images that the adversary replaces.

    Args:
        indices: int64 (P,), strictly increasing, each in [0, train_size).
        target_class: the class that triggered images shall be taken for.
        train_size: number of training images after poisoning; replacing leaves it as it was.

    Raises:
        ConfigError: indices of another type, order or range.
    """

    indices: npt.NDArray[np.int64]
    target_class: int
    train_size: int

    def __post_init__(self) -> None:
        indices = self.indices
        if indices.dtype != np.int64 or indices.ndim != 1 or (np.diff(indices) <= 0).any():
            raise ConfigError("poison plan: indices must be int64 (P,) in increasing order, each one once.")
        if len(indices) and not 0 <= indices[0] <= indices[-1] < self.train_size:
            raise ConfigError(
                f"poison plan: indices span [{indices[0]}, {indices[-1]}]; accepted are 0 to {self.train_size - 1}."
            )
        if self.target_class < 0:
            raise ConfigError(f"poison plan: target_class is {self.target_class}; give a class number from 0.")

    @property
    def poison_rate(self) -> float:
        """Poisoned images / all training images after poisoning, as a fraction."""
        return len(self.indices) / self.train_size


def plan_replacement(
    labels: npt.NDArray[np.int64] | None, *, num_classes: int, target_class: int, poison_rate: float, seed: int
) -> PoisonPlan:
    """Choose round(poison_rate * N) random images of the target class, by the run's `select` seed stream.

    One seed shuffles the class once and takes the first ones, so the images of a low rate are among those of a higher.
    A rate of 0 plans nothing: the clean control.

    Args:
        labels: int64 (N,), the training labels.
        num_classes: number of classes.
        target_class: in [0, num_classes).
        poison_rate: poisoned images / all training images, in [0, 1].
        seed: the run's seed.

    Raises:
        ConfigError: no labels; a class or rate out of range; more images asked for than the class has; a positive rate
            that rounds to no image.
    """
    if labels is None or len(labels) == 0:
        raise ConfigError(
            "poison plan: the training set has no labels; the attack must know the target class's images."
        )
    if not 0 <= target_class < num_classes:
        raise ConfigError(f"poison plan: target_class is {target_class}; give a class from 0 to {num_classes - 1}.")
    if not 0.0 <= poison_rate <= 1.0:
        raise ConfigError(f"poison plan: poison_rate is {poison_rate}; give a fraction from 0 to 1.")
    total = len(labels)
    count = round(poison_rate * total)
    of_class = np.flatnonzero(labels == target_class).astype(np.int64)
    if count > len(of_class):
        raise ConfigError(
            f"poison plan: poison_rate {poison_rate} asks for {count} images, but class {target_class} has "
            f"{len(of_class)} of {total}; give a rate of at most {len(of_class) / total:.6g}."
        )
    if count == 0 and poison_rate > 0:
        raise ConfigError(
            f"poison plan: poison_rate {poison_rate} of {total} images rounds to none; "
            f"give 0 for a clean run, or at least {1 / total:.6g}."
        )
    chosen = numpy_generator(seed, "select").permutation(of_class)[:count]
    return PoisonPlan(np.sort(chosen), target_class, total)
