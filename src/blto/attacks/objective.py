"""BLTO's outer objective: how near triggered views are to the target class in a surrogate's feature space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.poisoning.aim import Aim, Similarities, seen_in


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
    triggered, references, clean = (seen_in(basis, f) for f in (triggered, references.detach(), clean.detach()))
    centre = clean.mean(dim=0) if centred else torch.zeros_like(clean[0])
    triggered, references, clean = (F.normalize(f - centre, dim=1) for f in (triggered, references, clean))
    return Similarities(
        (triggered * references).sum(dim=1).mean(),
        (clean * references).sum(dim=1).mean(),
        (references * references.roll(1, dims=0)).sum(dim=1).mean(),
    )


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
