"""PatchSearch: does a piece of a training image pull other images into its cluster? (Tejankar et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.grad_cam import hottest_windows
from blto.defenses.poison_classifier import ClassifierSpec, poison_probability
from blto.defenses.pseudo_classes import k_means
from blto.errors import InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder
from blto.registry import Card
from blto.runtime.seeds import numpy_generator, stream_seed

Rows = npt.NDArray[np.int64]

PAPER_WINDOW = 60 / 224
"""Side of the window as a share of the image's (the authors' code)."""
IMAGES_PER_CLUSTER, MOST_CLUSTERS = 2500, 1000
TRAINING = ClassifierSpec()
PASTED_BYTES = 2**25
"""Of pasted images that are held at once."""


@dataclass(frozen=True, eq=False)
class Found:
    """What the search knows.

    Attributes:
        scores: int64 (N,), by how many more images the cluster of each grew with its window on them; 0 if not tried.
        cluster_scores: int64 (N,), the best score of each image's cluster.
        tried: int64, the rows of the images that were, the most suspicious first.
        windows: uint8 (len(tried), 3, w, w), in that order.
        flip_images: how many images each window was pasted on.
    """

    scores: Rows
    cluster_scores: Rows
    tried: Rows
    windows: Images
    flip_images: int


class PatchSearch(DatasetFilter):
    """Look for the piece of an image that makes others look like it, then for all images that hold such a piece.

    Tejankar et al., "Defending Against Patch-based Backdoor Attacks on Self-Supervised Learning", CVPR 2023, arXiv
    2304.01482, section 3. Images are clustered by their features. The hottest window of an image, for its assignment
    to its cluster, is pasted at random places on images near the clusters' centres; its poison score is by how many
    these its cluster grows. A round tries a few images of every cluster and drops the clusters whose best score is
    lowest. A classifier learns the windows of the highest scores; its probability is the score of every image (above
    0.5 the paper removes it).

    Where this differs from the authors' code: clusters are fewer and more images of each are tried, on fewer flip
    images; Grad-CAM takes the inner product with the cluster's centre, not the cosine, whose gradient fades in a tight
    cluster; the cosine assigns images as they are and pasted ones alike; rounds go on until no cluster is left. For the
    classifier see `poison_probability`.

    Args:
        clusters: null is one for 2,500 images, 2 to 1,000 (the authors': 1,000 on ImageNet-100). A window counts for
            its own cluster alone, so the poisons should not lie in many.
        window: side in pixels; null is the authors' share of the image, 60 of 224 (9 of 32). It has to be larger than
            the trigger: theirs has 50 pixels.
        flip_images: images that a window is pasted on (the authors': 1,000).
        samples: images of a cluster that a round tries (2).
        dropped: share of the clusters that a round drops. About samples x clusters / dropped images are tried.
        top: windows that the classifier learns.
        classifier: false leaves it out: the score is then the poison score, 0 for an image that was not tried.
        training: of the classifier, see `ClassifierSpec`.
    """

    card = Card(
        "PatchSearch",
        "finds images whose hottest piece, pasted on others, pulls them into its cluster",
        "arXiv 2304.01482",
        2023,
        "the training set without labels and the encoder pretrained on it",
    )
    evidence = Evidence(
        "With a window larger than the patch its 20 highest scores are poisons, on two of two sets; not BLTO.",
        must_show="test_patch_search::test_top_20_precision_on_a_planted_patch_is_above_90_percent",
        positive="test_patch_search::test_the_whole_filter_scores_every_image_and_repeats_itself",
    )

    def __init__(
        self,
        *,
        clusters: Annotated[int, Field(ge=2)] | None = None,
        window: Annotated[int, Field(ge=1)] | None = None,
        flip_images: Annotated[int, Field(ge=1)] = 200,
        samples: Annotated[int, Field(ge=1)] = 5,
        dropped: Annotated[float, Field(gt=0, le=1)] = 0.25,
        top: Annotated[int, Field(ge=1)] = 20,
        classifier: bool = True,
        training: ClassifierSpec = TRAINING,
    ) -> None:
        self.clusters, self.window, self.flip_images = clusters, window, flip_images
        self.samples, self.dropped, self.top = samples, dropped, top
        self.classifier, self.training = classifier, training

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`."""
        assert encoder is not None
        found = self.search(suspects, encoder, conditions)
        if not self.classifier:
            return found.scores.astype(np.float64)
        if len(found.tried) < 2 * self.top:
            raise InputRefused(
                f"patch_search: {len(found.tried)} images were tried, and with top at {self.top} the classifier needs "
                f"{2 * self.top}; raise clusters or samples, or lower top."
            )
        judged, windows = np.r_[found.tried[: self.top], found.tried[-self.top :]], found.windows[: self.top]
        return poison_probability(suspects, found.cluster_scores, judged, windows, self.training, conditions)

    def search(self, images: Images, encoder: Encoder, conditions: Conditions) -> Found:
        """The first part: poison scores of the images that were tried. Raises InputRefused for what does not fit."""
        count, side = len(images), images.shape[-1]
        clusters = min(max(2, count // IMAGES_PER_CLUSTER), MOST_CLUSTERS) if self.clusters is None else self.clusters
        size = max(1, round(PAPER_WINDOW * side)) if self.window is None else self.window
        if clusters > count or size >= side:
            raise InputRefused(
                f"patch_search: clusters is {clusters} and window {size} for {count} images of {side} pixels a side; "
                "give at most as many clusters as images, and a smaller window than an image."
            )
        seed = stream_seed(conditions.seed, "defense", "patch_search")
        suspect = deepcopy(encoder).eval().requires_grad_(False).to(conditions.device)
        suspect.native = False
        centres, own, cosines = cluster(extract(suspect, images).vectors, clusters, seed=seed)
        near = nearest_in_turn(own, cosines, self.flip_images)
        flips, before = images[near], np.bincount(own[near], minlength=clusters)
        order = numpy_generator(seed, "defense", "sample").permutation(count)
        queues = [order[own[order] == each] for each in range(clusters)]
        scores, best = np.zeros(count, np.int64), np.full(clusters, -len(flips) - 1)
        tried: list[Rows] = []
        windows: list[Images] = []
        alive = np.arange(clusters)
        with conditions.progress.bar("PatchSearch", clusters) as advance:
            while len(alive):
                begin = len(tried) * self.samples
                rows = np.concatenate([queues[each][begin : begin + self.samples] for each in alive])
                if not len(rows):
                    break
                tried.append(rows)
                windows.append(hottest_windows(suspect, images[rows], centres[own[rows]], size))
                seeds = [stream_seed(seed, "defense", int(row)) for row in rows]
                after = members(suspect, centres, flips, windows[-1], own[rows], seeds)
                scores[rows] = after - before[own[rows]]
                np.maximum.at(best, own[rows], scores[rows])
                left = len(alive) - max(1, int(self.dropped * len(alive)))
                alive = alive[np.argsort(-best[alive], kind="stable")][:left]
                advance(clusters - left, f"best score {best.max()} of {len(flips)}")
        rows = np.concatenate(tried)
        ranks = np.argsort(-scores[rows], kind="stable")
        return Found(scores, best[own], rows[ranks], np.concatenate(windows)[ranks], len(flips))


def cluster(features: Tensor, count: int, *, seed: int) -> tuple[Tensor, Rows, npt.NDArray[np.float32]]:
    """k-means on the unit vectors of (N, D): unit centres (count, D), and each image's nearest one with its cosine."""
    unit = F.normalize(features)
    centres = F.normalize(torch.from_numpy(k_means(unit.numpy(), count, seed)[1]))
    cosines, own = (unit @ centres.T).max(dim=1)
    return centres, own.numpy(), cosines.numpy()


def nearest_in_turn(own: Rows, cosines: npt.NDArray[np.float32], count: int) -> Rows:
    """Rows of at most `count` images: the nearest to every centre, then the second nearest to every one, and so on."""
    order = np.lexsort((-cosines, own))
    sorted_own = own[order]
    rank = np.arange(len(own)) - np.searchsorted(sorted_own, sorted_own)
    return order[np.lexsort((sorted_own, rank))][:count]


def paste(images: Images, window: Images, draw: np.random.Generator) -> Images:
    """A copy of (B, 3, S, S) with the window (3, w, w) on each, at a place of its own that is uniform."""
    pasted, size = images.copy(), window.shape[-1]
    corners = draw.integers(0, images.shape[-1] - size + 1, (len(images), 2))
    for image, (y, x) in zip(pasted, corners, strict=True):
        image[:, y : y + size, x : x + size] = window
    return pasted


def members(
    encoder: Encoder, centres: Tensor, images: Images, windows: Images, own: Rows, seeds: Sequence[int]
) -> Rows:
    """How many of the images lie in cluster `own[i]` with `windows[i]` on them, its places drawn from `seeds[i]`."""
    counts, together = [], max(1, PASTED_BYTES // images.nbytes)
    for begin in range(0, len(windows), together):
        part = range(begin, min(begin + together, len(windows)))
        pasted = [paste(images, windows[i], numpy_generator(seeds[i], "defense", "paste")) for i in part]
        cosines = F.normalize(extract(encoder, np.concatenate(pasted)).vectors) @ centres.T
        nearest = cosines.argmax(dim=1).view(len(part), len(images)).numpy()
        counts += (nearest == own[part, None]).sum(axis=1).tolist()
    return np.array(counts)
