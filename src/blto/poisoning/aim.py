"""Where a trigger is to lead: a direction in an encoder's feature space, with the yardsticks beside it.

BLTO's outer objective asks how near triggered views come to the target class; generator inversion asks it of every
cluster of clean images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Similarities:
    """Mean cosine to the target over a batch: of triggered, of clean and of the target's own (reference) views."""

    triggered: Tensor
    clean: Tensor
    target: Tensor


class Aim(NamedTuple):
    """Where the target class lies, with the two yardsticks: of one batch, or of a larger sample for many batches.

    Attributes:
        centre: (D,), subtracted from features in the basis; the mean of clean ones, or 0.
        goal: (D,) of length 1, the references' mean direction from there.
        clean, target: the mean cosine of clean and of reference features to it.
    """

    centre: Tensor
    goal: Tensor
    clean: Tensor
    target: Tensor

    @classmethod
    def at(cls, references: Tensor, clean: Tensor, *, centred: bool, basis: Tensor | None = None) -> Self:
        """From features (N, D) of reference and (M, D) of clean images; see `similarities`. No gradient is kept."""
        references, clean = (seen_in(basis, features.detach()) for features in (references, clean))
        centre = clean.mean(dim=0) if centred else torch.zeros_like(clean[0])
        goal = F.normalize(F.normalize(references - centre, dim=1).mean(dim=0), dim=0)
        return cls(centre, goal, *(_cosines(features, centre, goal) for features in (clean, references)))

    def similarities(self, triggered: Tensor, basis: Tensor | None = None) -> Similarities:
        """Of features (B, D) of triggered images, through which the gradient flows; `basis` as it was for `at`."""
        return Similarities(_cosines(seen_in(basis, triggered), self.centre, self.goal), self.clean, self.target)


def seen_in(basis: Tensor | None, features: Tensor) -> Tensor:
    """Features (N, D) in a basis; as they are without one."""
    return features if basis is None else features @ basis


def _cosines(features: Tensor, centre: Tensor, goal: Tensor) -> Tensor:
    return (F.normalize(features - centre, dim=1) @ goal).mean()


def whitening_basis(features: Tensor, shrinkage: float) -> Tensor:
    """A basis in which features have nearly equal variance in all directions.

    What many classes share varies most and dominates the cosine, so a trigger that maximises it moves images towards a
    whole group of classes. Whitened, the direction from the mean to the target class is Fisher's discriminant, which
    needs no labels but the references'. `shrinkage` keeps it from the directions that hardly vary at all, where a
    covariance estimate is noise (Ledoit and Wolf, J. Multivariate Analysis 2004).

    Args:
        features: (N, D) of clean images; no gradient is kept.
        shrinkage: the multiple of the mean variance that is added to every direction; greater than 0. The larger it is,
            the less is changed.

    Returns:
        (D, D), the inverse Cholesky factor of the shrunk covariance, transposed.
    """
    features = features.detach()
    covariance = torch.cov(features.T)
    ridge = shrinkage * covariance.diagonal().mean() + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), device=features.device))
    identity = torch.eye(len(factor), device=features.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.T
