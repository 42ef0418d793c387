"""Concealment: what BLTO's outer objective pays for poisons that stand out of their class (ours; adaptive)."""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor

from blto.poisoning.aim import whitening_basis

SHRINKAGE = 1.0
"""Of the covariance of the class's own images, as for `whitening_basis`."""


class Concealment(NamedTuple):
    """How far a trigger moves the target class's own images along the direction in which it moves all others.

    The carried trigger (`defenses.carried_trigger`) ranks images by their place in that direction: Fisher's
    discriminant between a class's images without and with the trigger. Where an image of the class stays in its place,
    the filter has nothing to see. The attacker has a surrogate, its own trigger, the target class's covariance and
    standard deviation, and augmented views, where the defender has an encoder, a trigger that it inverts, the
    covariance within clusters, the median absolute deviation, and plain images.

    Attributes:
        direction: (D,), such that the class's own images have a standard deviation of 1 along it.
    """

    direction: Tensor

    @classmethod
    def against(cls, own: Tensor, clean: Tensor, triggered: Tensor) -> Self:
        """From features (N, D) of the class's own images, and (M, D) of others without and with the trigger."""
        basis = whitening_basis(own, SHRINKAGE)
        direction = basis @ (basis.T @ (triggered - clean).mean(dim=0))
        return cls(direction / (own @ direction).std().clamp_min(1e-12))

    def shift(self, clean: Tensor, triggered: Tensor) -> Tensor:
        """Mean absolute displacement along the direction of (B, D) images of the class, in standard deviations."""
        return ((triggered - clean) @ self.direction).abs().mean()
