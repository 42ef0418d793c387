"""BLTO's outer objective: how near triggered views are to the target class in a surrogate's feature space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Similarities:
    """Mean cosine to the target over a batch: of triggered, of clean and of the target's own (reference) views."""

    triggered: Tensor
    clean: Tensor
    target: Tensor


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
    references, clean = references.detach(), clean.detach()
    if basis is not None:
        triggered, references, clean = (features @ basis for features in (triggered, references, clean))
    centre = clean.mean(dim=0) if centred else torch.zeros_like(clean[0])
    triggered, references, clean = (F.normalize(f - centre, dim=1) for f in (triggered, references, clean))
    if centroid:
        goal = F.normalize(references.mean(dim=0, keepdim=True), dim=1)
        return Similarities(*((f * goal).sum(dim=1).mean() for f in (triggered, clean, references)))
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
def held(module: nn.Module) -> Iterator[None]:
    """No gradient is computed for the parameters of `module`; it still flows through."""
    parameters = [p for p in module.parameters() if p.requires_grad]
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
            norm.track_running_stats = True
