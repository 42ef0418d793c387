"""BLTO's outer objective: how near triggered views are to the target class in a surrogate's feature space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        references, clean = (_seen_in(basis, features.detach()) for features in (references, clean))
        centre = clean.mean(dim=0) if centred else torch.zeros_like(clean[0])
        goal = F.normalize(F.normalize(references - centre, dim=1).mean(dim=0), dim=0)
        return cls(centre, goal, *(_cosines(features, centre, goal) for features in (clean, references)))

    def similarities(self, triggered: Tensor, basis: Tensor | None = None) -> Similarities:
        """Of features (B, D) of triggered images, through which the gradient flows; `basis` as it was for `at`."""
        return Similarities(_cosines(_seen_in(basis, triggered), self.centre, self.goal), self.clean, self.target)


def _seen_in(basis: Tensor | None, features: Tensor) -> Tensor:
    return features if basis is None else features @ basis


def _cosines(features: Tensor, centre: Tensor, goal: Tensor) -> Tensor:
    return (F.normalize(features - centre, dim=1) @ goal).mean()


def similarities(
    triggered: Tensor,
    references: Tensor,
    clean: Tensor,
    *,
    centred: bool,
    centroid: bool,
    basis: Tensor | None = None,
) -> Similarities:
    """The outer objective (the paper's S, to be maximised in `triggered`), with its two yardsticks.

    Args:
        triggered, references, clean: features (B, D) of the views of g(x), of reference images, and of x itself. The
            gradient flows through `triggered` alone.
        centred: subtract the mean of `clean` first.
        centroid: compare with the references' mean direction instead of one reference each.
        basis: (D, D), multiplied from the right first; that of `whitening_basis` turns the cosine into a discriminant.
    """
    if centroid:
        return Aim.at(references, clean, centred=centred, basis=basis).similarities(triggered, basis)
    triggered, references, clean = (_seen_in(basis, f) for f in (triggered, references.detach(), clean.detach()))
    centre = clean.mean(dim=0) if centred else torch.zeros_like(clean[0])
    triggered, references, clean = (F.normalize(f - centre, dim=1) for f in (triggered, references, clean))
    return Similarities(
        (triggered * references).sum(dim=1).mean(),
        (clean * references).sum(dim=1).mean(),
        (references * references.roll(1, dims=0)).sum(dim=1).mean(),
    )


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


@contextmanager
def held(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient is computed for these trainable parameters; it still flows through where they are used."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm normalises with the batch's own statistics and leaves the running ones alone; all else evaluates."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    module.eval()
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
            norm.track_running_stats = True
