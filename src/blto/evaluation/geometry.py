"""Where triggered images lie in feature space: similarity to the target class, displacement, alignment, uniformity.

Functions of feature tensors (N, D) of any scale, computed in float64; all but the displacement on unit vectors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blto.errors import ConfigError, Diverged

_CHUNK = 2**24  # pairs held at a time by `uniformity`: 128 MiB of float64
_RIDGE = 1e-3  # of the mean variance, added by `displacement`


def similarity(*, triggered: Tensor, clean: Tensor, target: Tensor, references: Tensor) -> dict[str, float]:
    """How near triggered images of other classes lie to the target class.

    With c the centroid of the references' unit features and s(X) the mean cosine of X to c:

    - `raw`: s(triggered).
    - `centred`: s(triggered) after the mean of the clean features was taken from all features, so that the direction
      that all images share no longer passes for similarity. About 0 for clean images by construction.
    - `normalised`: (s(triggered) - s(clean)) / (s(target) - s(clean)), from the raw cosines. 0: the trigger has no
      effect; 1: triggered images lie as near the target class as its own do. Left out where target images lie no nearer
      to c than clean ones do (a collapsed or useless encoder), because the scale then has no meaning.

    Args:
        triggered: features of triggered images of other classes (with or without a view's augmentation).
        clean: features of untriggered images of other classes.
        target: features of untriggered images of the target class.
        references: features of further images of the target class, from which c is made. They must not be those of
            `target`: an image is always similar to a mean that it is part of.

    Raises:
        ConfigError: a set that is empty or whose dimension differs.
        Diverged: a feature is not finite.
    """
    sets = {"triggered": triggered, "clean": clean, "target": target, "references": references}
    triggered, clean, target, references = _of_one_encoder(sets)
    mean = clean.mean(dim=0)
    raw, low, high = (_cosine_to_centroid(features, references) for features in (triggered, clean, target))
    result = {"raw": raw, "centred": _cosine_to_centroid(triggered - mean, references - mean)}
    if high > low:
        result["normalised"] = (raw - low) / (high - low)
    return result


def displacement(*, triggered: Tensor, clean: Tensor, bank: Tensor, references: Tensor) -> dict[str, float]:
    """Where a trigger moves an image: towards the target class, or off in a direction of its own.

    Measured where clean images are white, that is in units of their own spread in each direction. With d the mean
    displacement of an image and t the way from the mean of all images to that of the target class:

    - `shift`: |d| over the typical distance of a clean image from the mean. 1: as far as images lie apart.
    - `common`: |d|^2 over the mean squared displacement. 1: the trigger moves all images alike.
    - `advance`: d.t / t.t. 1: an image from the middle comes as far towards the target class as its own images lie.
    - `heading`: cosine of d and t. Beside a clean twin's: a longer shift with a smaller heading says that training on
      the trigger has added a movement which does not lead to the target class.

    Ours. Left out is what has no meaning: `common` and `heading` where nothing moves, `advance` and `heading` where the
    target class lies in the middle of all, all four where nothing varies.

    Args:
        triggered, clean: features of images of other classes with and without the trigger; row i of both is one image.
        bank: features of clean images of all classes, of which the spread is taken. A thousandth of the mean variance
            is added in every direction, without which one that no clean image takes would count without end.
        references: features of clean images of the target class.

    Raises:
        ConfigError: a set that is empty or whose dimension differs, or rows that are not pairs.
        Diverged: a feature is not finite.
    """
    if triggered.shape != clean.shape:
        raise ConfigError(
            f"features {tuple(triggered.shape)} and {tuple(clean.shape)} are not pairs; give equal shapes."
        )
    sets = {"triggered": triggered, "clean": clean, "bank": bank, "references": references}
    triggered, clean, bank, references = _of_one_encoder(sets)
    mean = bank.mean(dim=0)
    covariance = (bank - mean).T @ (bank - mean) / len(bank)
    variance = covariance.diagonal().mean()
    if variance <= _RIDGE**2 * bank.square().mean():  # collapsed: what is left is rounding
        return {}
    ridge = _RIDGE * variance * torch.eye(bank.shape[1], dtype=bank.dtype, device=bank.device)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance + ridge)).T  # of rows
    moved, target = (triggered - clean) @ whitening, (references.mean(dim=0) - mean) @ whitening
    typical = ((bank - mean) @ whitening).square().sum(dim=1).mean().sqrt()
    way = moved.mean(dim=0)
    moves, leads = bool(way.any()), bool(target.any())
    found = {"shift": float(way.norm() / typical)}
    if leads:
        found["advance"] = float(way @ target / target.square().sum())
    if moves:
        found["common"] = float(way.square().sum() / moved.square().sum(dim=1).mean())
    if moves and leads:
        found["heading"] = float(F.cosine_similarity(way, target, dim=0))
    return found


def alignment(first: Tensor, second: Tensor) -> float:
    """E ||f(t1 x) - f(t2 x)||^2 over paired unit features (Wang and Isola, ICML 2020, section 4.2, alpha = 2).

    Args:
        first, second: features (N, D); row i of both is the same image under two views, or with and without a trigger.

    Returns:
        In [0, 4]; 0 where the views of an image coincide.

    Raises:
        ConfigError: shapes differ, or no row.
        Diverged: a feature is not finite.
    """
    if first.shape != second.shape:
        raise ConfigError(f"features {tuple(first.shape)} and {tuple(second.shape)} are not pairs; give equal shapes.")
    difference = _unit(_matrix("first", first)) - _unit(_matrix("second", second))
    return float(difference.square().sum(dim=1).mean())


def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """log E exp(-t ||f(x) - f(y)||^2) over all pairs of distinct rows (Wang and Isola, ICML 2020, section 4.2).

    Args:
        features: (N, D), N at least 2.
        t: inverse width of the kernel, greater than 0.

    Returns:
        In [-4 t, 0]; 0 where all features coincide, lower where they are spread.

    Raises:
        ConfigError: fewer than 2 rows, or t not positive.
        Diverged: a feature is not finite.
    """
    if len(features) < 2 or t <= 0:
        raise ConfigError(f"uniformity of {len(features)} features at t = {t}; give at least 2 features and t > 0.")
    unit = _unit(_matrix("features", features))
    n = len(unit)
    parts = []
    size = max(1, _CHUNK // n)
    for start in range(0, n, size):
        exponent = 2 * t * (unit[start : start + size] @ unit.T - 1)  # -t ||u - v||^2 for unit vectors
        exponent.diagonal(offset=start).fill_(-math.inf)  # a row is no pair with itself
        parts.append(exponent.logsumexp(dim=(0, 1)))
    return float(torch.stack(parts).logsumexp(dim=0)) - math.log(n * (n - 1))


def _cosine_to_centroid(features: Tensor, references: Tensor) -> float:
    """Mean cosine of the rows to the mean of the references' unit vectors."""
    centroid = F.normalize(_unit(references).mean(dim=0), dim=0)
    return float((_unit(features) @ centroid).mean())


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=1)


def _of_one_encoder(sets: dict[str, Tensor]) -> list[Tensor]:
    """Each as `_matrix`, all of one dimension."""
    matrices = [_matrix(name, features) for name, features in sets.items()]
    dimensions = [matrix.shape[1] for matrix in matrices]
    if len(set(dimensions)) != 1:
        raise ConfigError(f"features of dimensions {dimensions}; give those of one encoder.")
    return matrices


def _matrix(name: str, features: Tensor) -> Tensor:
    """The features as float64 (N, D), N at least 1, all finite."""
    if features.ndim != 2 or not len(features):
        raise ConfigError(f"{name} features have shape {tuple(features.shape)}; give (N, D) with N at least 1.")
    if not torch.isfinite(features).all():
        raise Diverged(f"{name} features hold NaN or infinity; the encoder diverged.")
    return features.double()
