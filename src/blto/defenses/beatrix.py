"""Beatrix: are an image's channels active together as they are on clean images of its class? (Ma et al., NDSS 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from blto.defenses.base import Conditions, Images, InputDetector, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.frequency_screening import MAD_TO_DEVIATION
from blto.defenses.pseudo_classes import Rows, Vectors, k_means, unit
from blto.errors import InputRefused
from blto.evaluation.features import BATCH_ON_CPU, device_of, evaluating
from blto.models.encoder import Encoder
from blto.registry import Card
from blto.runtime.seeds import stream_seed

LIMIT = 10  # median absolute deviations from its class's median that an entry may have (authors' code)
FOLDS, QUANTILE = 5, 0.95
LEAST = 10  # clean images of a class; a smaller cluster is none
TINY = 1e-6  # added to divisors: channels that most clean images leave silent have a limit of 0 (authors' code)

Limits = tuple[Tensor, Tensor]
_Judged = tuple[Scores, Rows, Vectors]  # one of each an input
_Model = tuple[list[Limits], float]  # of every power from 1 on; the threshold


def gram_entries(maps: Tensor, power: int) -> Tensor:
    """Upper triangle, with the diagonal, of (F^p F^p')^(1/p): maps (B, C, h, w) -> float32 (B, C (C + 1) / 2).

    F^p is the C x hw map, each value to the power p, in float64; the root keeps the sign.
    """
    raised = maps.double().flatten(2) ** power
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
    entries = (raised @ raised.mT)[:, first, second]
    return (entries.sign() * entries.abs() ** (1 / power)).float()


def limits(entries: Tensor) -> Limits:
    """The lowest and highest an entry may be: median -/+ LIMIT MAD of the rows (n, E); of even n the lower median."""
    median = entries.median(dim=0).values
    allowed = LIMIT * (entries - median).abs_().median(dim=0).values
    return median - allowed, median + allowed


def deviations(entries: Tensor, allowed: Limits) -> Scores:
    """How far each row's entries leave their limits, as shares of the limit that they pass; the mean over entries."""
    low, high = allowed
    below, above = (low - entries).relu_() / (low.abs() + TINY), (entries - high).relu_() / (high.abs() + TINY)
    mean: Scores = (below + above).mean(dim=1).double().cpu().numpy()
    return mean


def class_anomaly(vectors: npt.NDArray[Any], classes: Rows, suspicious: npt.NDArray[np.bool_]) -> Scores:
    """Which class is infected: how far each one's two-sample statistic is above the median, in robust deviations.

    The statistic of a class is mn / (m + n) times the squared maximum mean discrepancy of its m suspicious vectors
    and its n others, and 0 where there are none of one kind. The kernel is exp(-2d/w) + exp(-d/w) of the squared
    distance d, w its median. The paper calls a class infected from e^2 on. Given are vectors (N, D), one an input,
    classes (N,), counted from 0, and whether each input is suspicious (N,).
    """
    each = [classes == label for label in range(classes.max() + 1)]
    statistics = np.array([_two_samples(vectors[mine & suspicious], vectors[mine & ~suspicious]) for mine in each])
    above = statistics - np.median(statistics)
    index: Scores = above / (MAD_TO_DEVIATION * np.median(np.abs(above)) + TINY)
    return index


def _two_samples(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    m, n = len(one), len(other)
    if not m or not n:
        return 0.0
    points = torch.from_numpy(np.concatenate([one, other])).double()
    squared = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square_()
    width = squared.median() + TINY
    kernel = (-2 * squared / width).exp_() + (-squared / width).exp_()
    return float(m * n / (m + n) * (kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()))


class Beatrix(InputDetector):
    """Ask of every pair of channels whether they are active together as on clean images of the input's class.

    Ma et al., "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS 2023, arXiv 2209.11715.
    Clean images of a class give limits to each entry of G^p = (F^p F^p')^(1/p), p = 1..`powers`, F an image's maps: ten
    median absolute deviations about the median. The score is how far an input's entries leave those of its class, as a
    multiple of the 95th percentile of that class's clean images, each with limits from four fifths of the others; above
    1 it counts as poisoned. It sees inputs alone: an encoder to which no trigger is shown passes.

    Where this differs from the paper: there are no labels, so classes are k-means clusters of the clean images'
    features of length 1, and an input's class is the nearest centre's. The "last" stage is ours. `class_anomaly` has
    the statistic of the authors' code, not regularised, and its index keeps the sign.

    Args:
        stage: the encoder's "last" maps, or those "before", the last of more places (authors' code: into layer4).
        powers: of the maps (8).
        classes: pseudo-classes; a cluster of fewer than 10 clean images is left out.
        images: clean images, at least 10 a class (the authors' code: 30).
    """

    card = Card(
        "Beatrix",
        "whether channels are active together as on clean images",
        "arXiv 2209.11715",
        2023,
        "the encoder, images in use, and clean images without labels",
    )
    evidence = Evidence(
        "It sees the patch and BadEncoder in triggered images, on two of two victims each and on no clean twin; it is "
        "blind to BLTO.",
        must_show="test_beatrix::test_limits_and_deviations_are_those_of_numpy",
        positive="test_beatrix::test_a_planted_reaction_is_found_and_none_without",
    )

    def __init__(
        self,
        *,
        stage: Literal["last", "before"] = "last",
        powers: Annotated[int, Field(ge=1, le=16)] = 8,
        classes: Annotated[int, Field(ge=1)] = 10,
        images: Annotated[int, Field(ge=LEAST)] = 1000,
    ) -> None:
        self.depth, self.powers, self.classes, self.images = 1 if stage == "last" else 2, powers, classes, images

    def score(self, suspects: Images, encoder: Encoder, clean: Images, conditions: Conditions) -> Scores:
        """See `InputDetector.score`. Raises InputRefused: too few clean images a class, or no such maps."""
        return self.judge(suspects, encoder, clean, conditions)[0]

    def judge(self, suspects: Images, encoder: Encoder, clean: Images, conditions: Conditions) -> _Judged:
        """Of each suspect score, pseudo-class and the means of its maps, for `class_anomaly`. Raises as `score`."""
        if len(clean) < LEAST * self.classes:
            raise InputRefused(f"{len(clean)} clean images for {self.classes} classes; give {LEAST} a class or more.")
        with _looking(encoder, conditions.device, self.depth) as look:
            parts = [look(clean[part]) for part in _batches(len(clean))]
            maps, features = torch.cat([part for part, _ in parts]), np.concatenate([part for _, part in parts])
            labels, centres = k_means(features, self.classes, stream_seed(conditions.seed, "defense", "pseudo_classes"))
            centres = centres[np.bincount(labels, minlength=self.classes) >= LEAST]
            nearest = _nearest(features, centres)
            models = [self._model(maps[nearest == label]) for label in range(len(centres))]
            found = [_judged(*look(suspects[part]), centres, models) for part in _batches(len(suspects))]
        scores, classes, vectors = (np.concatenate(column) for column in zip(*found, strict=True))
        return scores, classes, vectors

    def _model(self, maps: Tensor) -> _Model:
        fold, held_out, allowed = np.arange(len(maps)) % FOLDS, np.zeros(len(maps)), []
        for power in range(1, self.powers + 1):
            entries = torch.cat([gram_entries(maps[part], power) for part in _batches(len(maps))])
            allowed.append(limits(entries))
            for held in range(FOLDS):
                held_out[fold == held] += deviations(entries[fold == held], limits(entries[fold != held]))
        return allowed, float(np.quantile(held_out, QUANTILE)) + TINY


def _judged(maps: Tensor, features: Vectors, centres: Vectors, models: Sequence[_Model]) -> _Judged:
    scores, classes = np.zeros(len(maps)), _nearest(features, centres)
    for label in np.unique(classes):
        mine, (allowed, threshold) = classes == label, models[label]
        for power, each in enumerate(allowed, 1):
            scores[mine] += deviations(gram_entries(maps[mine], power), each) / threshold
    return scores, classes, maps.mean(dim=(2, 3)).cpu().numpy()


def _batches(count: int) -> Iterator[slice]:
    return (slice(begin, begin + BATCH_ON_CPU) for begin in range(0, count, BATCH_ON_CPU))


def _nearest(features: Vectors, centres: npt.NDArray[Any]) -> Rows:
    nearest: Rows = (np.square(centres).sum(axis=1) - 2 * features @ centres.T).argmin(axis=1)
    return nearest


@contextmanager
def _looking(encoder: Encoder, device: str, depth: int) -> Iterator[Callable[[Images], tuple[Tensor, Vectors]]]:
    """Maps (B, C, h, w), on the device, and features of length 1; a depth of 2 is the stage before the last."""
    seen: list[Tensor] = []  # square maps, each the last that has more places than the next one

    def keep(_module: nn.Module, _given: Any, out: Any) -> None:
        if isinstance(out, Tensor) and (out.ndim == 3 or (out.ndim == 4 and out.shape[2] != out.shape[3])):
            seen.clear()  # tokens; the features are not made from a map before them
        elif isinstance(out, Tensor) and out.ndim == 4 and (places := out[0, 0].numel()) > 1:
            while seen and seen[-1][0, 0].numel() <= places:
                seen.pop()
            seen.append(out)

    def look(images: Images) -> tuple[Tensor, Vectors]:
        seen.clear()
        features = encoder(torch.from_numpy(np.array(images)).to(device).float().div_(255))
        if len(seen) < depth:
            lacking = "one of more places than its last; give stage last" if seen else "any; give a convolutional one"
            raise InputRefused(f"beatrix: it needs a square feature map, and the encoder does not make {lacking}.")
        return seen[-depth], unit(features.cpu().numpy())

    place = device_of(encoder)
    hooks = [part.register_forward_hook(keep) for part in encoder.modules()]
    try:
        with evaluating(encoder.to(device)), torch.inference_mode():
            yield look
    finally:
        encoder.to(place)
        for hook in hooks:
            hook.remove()
