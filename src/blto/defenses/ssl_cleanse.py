"""SSL-Cleanse: is one cluster of features reached with a far smaller patch than others? (Zheng et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from blto.defenses.base import Conditions, EncoderDetector, Images, Inspection, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.frequency_screening import MAD_TO_DEVIATION
from blto.defenses.inversion import Differentiable, MaskedPatch, differentiable
from blto.defenses.pseudo_classes import Rows, Vectors, pseudo_classes, suspect_features, unit
from blto.models.encoder import Encoder
from blto.pretraining.loop import batch_rows
from blto.registry import Card
from blto.runtime.seeds import stream_seed

THRESHOLD = 2.0
"""An anomaly index above this is a backdoor (Neural Cleanse's convention; the authors' code applies none)."""
LEARNING_RATE, FACTOR, PATIENCE = 0.1, 1.5, 5
FULL = 1.0
"""The size of a mask that covers all: that of a cluster which was not reached."""
RELEASED_CORRECTION = 0.6745
"""The authors' code divides the spread by this too, which already is in `MAD_TO_DEVIATION`."""


def anomaly_index(sizes: Scores, least_spread: float, *, as_released: bool = False) -> float:
    """How far the smallest lies below the median, in robust standard deviations (1.4826 median absolute deviations).

    Args:
        sizes: (K,).
        least_spread: a standard deviation below this counts as this.
        as_released: with the authors' scale, which makes it 0.6745 of that.
    """
    median = np.median(sizes)
    spread = max(MAD_TO_DEVIATION * float(np.median(np.abs(sizes - median))), least_spread)
    return float(median - sizes.min()) / spread * (RELEASED_CORRECTION if as_released else 1.0)


class Weights:
    """The weights of the masks' sizes, one a cluster: 0 until the cluster was reached in five epochs in a row.

    From then on 1.5 times as much after five such epochs, and as much less after five others.

    Args:
        count: of clusters.
        first: the weight to start from.
    """

    def __init__(self, count: int, first: float) -> None:
        self.values, self._first = np.zeros(count), first
        self._up = self._down = np.zeros(count, np.int64)

    def after(self, reached: npt.NDArray[np.bool_]) -> None:
        """Take note of an epoch: which clusters (K,) were reached."""
        self._up, self._down = np.where(reached, self._up + 1, 0), np.where(reached, 0, self._down + 1)
        rise, fall = self._up >= PATIENCE, self._down >= PATIENCE
        risen = np.where(self.values > 0, self.values * FACTOR, self._first)
        self.values = np.where(rise, risen, np.where(fall, self.values / FACTOR, self.values))
        self._up[rise] = self._down[fall] = 0


class _Clusters:
    """The clusters of the shown images, and who is nearest to whom."""

    def __init__(self, vectors: Vectors, clusters: Sequence[Rows], device: torch.device) -> None:
        self._known = torch.from_numpy(unit(vectors)).to(device)
        self._cluster = torch.empty(len(vectors), dtype=torch.int64, device=device)
        for number, rows in enumerate(clusters):
            self._cluster[torch.from_numpy(rows)] = number
        self.targets = torch.stack([self._known[torch.from_numpy(rows)].mean(dim=0) for rows in clusters])
        self.others = [np.setdiff1d(np.arange(len(vectors)), rows) for rows in clusters]

    def arrived(self, found: Tensor) -> Tensor:
        """Share (K,) of each cluster's stamped images, features of length 1 (K, B, D), whose nearest is of it."""
        nearest = self._cluster[(found @ self._known.T).argmax(dim=2)]
        return (nearest == torch.arange(len(found), device=found.device)[:, None]).float().mean(dim=1)


class SSLCleanse(EncoderDetector):
    """Invert a mask and a patch for each cluster of features; one mask far smaller than the others is suspicious.

    Zheng et al., "SSL-Cleanse: Trojan Detection and Mitigation in Self-Supervised Learning", ECCV 2024, arXiv
    2303.09079; the detection. k-means splits the images by their features. For each cluster, minimise
    |u(f(x')) - u(z)|^2 + lambda mean(m) over images x outside it and features z inside it, u(v) = v / |v| and
    x' = (1 - m) x + m p. The smallest mean(m) with which `success` of the stamped images have their nearest neighbour
    in the cluster is its size; 1 where there is none. `score` is how far the smallest size lies below the median, in
    robust standard deviations, and above 2 it is flagged; the trigger is that of the smallest size.

    Where this differs from the authors' code: the clusters are optimised side by side, in one batch; `images` and
    `epochs` are far fewer; k is fixed, where the paper's sliding window picks it; features have length 1 in k-means and
    in the search for neighbours too; z is the mean over the cluster, which is what the random one of theirs is on
    average; success is counted on the steps' own images, none of them of the cluster; the spread is at least a pixel.
    Their first release took mean(m), a later one mean(m p), which a dark patch makes small at any size.

    Args:
        images: clean images to cluster and to stamp (1% of ImageNet-100).
        classes: clusters (12 for ImageNet-100).
        epochs: of every inversion (1,000).
        batch_size: images a cluster and step (32).
        success: share of images that have to arrive (0.99).
        first_lambda: the first weight above 0 (0.1).
        size: what is kept small and compared: "mask" is mean(m), "product" is mean(m p).
        as_released: scale the index as the authors' code does, 0.6745 of the usual one.
    """

    card = Card(
        "SSL-Cleanse",
        "whether one cluster of features is reached with a far smaller patch than the others",
        "arXiv 2303.09079",
        2024,
        "the encoder and clean images without labels",
    )
    evidence = Evidence(
        "It flags none of three BadEncoders, though the attacker's cluster has the smallest mask in each; one of two "
        "patch victims, for a cluster that the patch does not lead to; and none of seven clean encoders.",
        must_show="test_ssl_cleanse::test_the_index_is_the_distance_to_the_median_in_standard_deviations",
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=3)] = 256,
        classes: Annotated[int, Field(ge=3)] = 10,
        epochs: Annotated[int, Field(ge=1)] = 60,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        success: Annotated[float, Field(gt=0, le=1)] = 0.99,
        first_lambda: Annotated[float, Field(gt=0)] = 0.1,
        size: Literal["mask", "product"] = "mask",
        as_released: bool = False,
    ) -> None:
        self.images, self.classes, self.epochs, self.batch_size = images, classes, epochs, batch_size
        self.success, self.first_lambda, self.size, self.as_released = success, first_lambda, size, as_released

    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        """See `EncoderDetector.inspect`. Measures: `smallest` and `median` size, and how many clusters were `reached`.

        Raises:
            InputRefused: fewer images than clusters.
            Diverged: fewer different features than clusters.
        """
        vectors = suspect_features(encoder, images, conditions)
        rows = pseudo_classes(vectors, self.classes, conditions)
        seed = stream_seed(conditions.seed, "defense", "ssl_cleanse")
        sizes, triggers = np.full(len(rows), FULL), [dict[str, Tensor]() for _ in rows]
        with (
            differentiable(encoder, conditions.device) as features,
            conditions.progress.bar("SSL-Cleanse", self.epochs) as advance,
        ):
            clusters = _Clusters(vectors, rows, features.device)
            for epoch, (arrived, found, stamps) in enumerate(self._invert(features, images, clusters, seed)):
                for number in map(int, np.flatnonzero((arrived >= self.success) & (found < sizes))):
                    sizes[number], triggers[number] = found[number], stamps[number].kept()
                advance(epoch + 1, f"{sum(map(bool, triggers))} of {len(rows)} clusters reached")
        smallest, median, reached = int(sizes.argmin()), float(np.median(sizes)), sum(map(bool, triggers))
        score = anomaly_index(sizes, 1 / images.shape[-1] ** 2, as_released=self.as_released)
        measures = {"smallest": float(sizes[smallest]), "median": median, "reached": reached}
        return Inspection(score, score > THRESHOLD, measures, triggers[smallest])

    def _invert(
        self, features: Differentiable, images: Images, clusters: _Clusters, seed: int
    ) -> Iterator[tuple[Scores, Scores, Sequence[MaskedPatch]]]:
        """All clusters side by side: yields each epoch with the share that arrived and the mean size (K,), and stamps.

        Their losses are added up; Adam treats each parameter alone, so it is as if each was optimised by itself.
        """
        count, fewest = len(clusters.others), min(map(len, clusters.others))
        batch_size = min(self.batch_size, fewest)
        seeds = [stream_seed(seed, "defense", number) for number in range(count)]
        stamps = [MaskedPatch(images.shape[-1], torch.Generator().manual_seed(each)) for each in seeds]
        parameters = nn.ModuleList(stamps).to(features.device).parameters()
        optimizer = torch.optim.Adam(parameters, LEARNING_RATE, betas=(0.5, 0.9))
        weights = Weights(count, self.first_lambda)
        for epoch in range(self.epochs):
            arrived, sizes, steps = np.zeros(count), np.zeros(count), fewest // batch_size
            for batch in range(steps):
                stamped = []
                for own, others, stamp in zip(seeds, clusters.others, stamps, strict=True):
                    rows = others[batch_rows(len(others), batch_size, seed=own, epoch=epoch, batch=batch)]
                    stamped.append(stamp(torch.from_numpy(images[rows]).to(features.device).float().div_(255)))
                found = nn.functional.normalize(features(torch.cat(stamped))).view(count, batch_size, -1)
                size = torch.stack([self._size(stamp) for stamp in stamps])
                distance = 2 - 2 * (found.mean(dim=1) * clusters.targets).sum(dim=1)
                optimizer.zero_grad(set_to_none=True)
                (distance + size.new_tensor(weights.values) * size).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                arrived += clusters.arrived(found.detach()).cpu().numpy()
                sizes += size.detach().cpu().numpy()
            weights.after(arrived / steps >= self.success)
            yield arrived / steps, sizes / steps, stamps

    def _size(self, stamp: MaskedPatch) -> Tensor:
        return stamp.mask.mean() if self.size == "mask" else (stamp.mask * stamp.patch).mean()
