"""Triggers that a defender makes: for each cluster of clean images, a generator that moves other images there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blto.data.views import Views, resolve_recipe
from blto.defenses.base import Conditions, Images
from blto.defenses.inversion import Differentiable, differentiable
from blto.defenses.pseudo_classes import Rows, k_means, suspect_features
from blto.errors import Diverged, InputRefused
from blto.models import GENERATORS
from blto.models.encoder import Encoder
from blto.models.generators import use_native
from blto.poisoning import Budget, GeneratorTrigger
from blto.poisoning.aim import Aim, whitening_basis
from blto.pretraining.trainer import learning_rate_factor
from blto.runtime.seeds import numpy_generator, seeded, stream_seed

VIEWS = {"name": "simsiam_cifar", "crop_scale": (0.6, 1.0)}
"""Augmentations that a trigger has to survive; BLTO's own crop less than its victims."""
SHRINKAGE = 0.05
WARMUP = 1 / 6
LAST, MOVES = 10, 0.2
"""Steps, and the share of the cosine of a cluster's own images that a trigger has to reach in them."""


@dataclass(frozen=True)
class Search:
    """How triggers are looked for.

    Attributes:
        epsilon: L-infinity budget, a fraction of the pixel range.
        width: of the hourglass generator.
        steps, batch_size, lr: of Adam, for each cluster.
        starts: how many generators are trained for a cluster at most, until one moves images: in some all ReLUs of a
            layer die early.
    """

    epsilon: float
    width: int
    steps: int
    batch_size: int
    lr: float
    starts: int = 4

    def fresh(self, seed: int) -> GeneratorTrigger:
        """A generator that nothing has trained, with weights from the seed."""
        spec = {"name": "hourglass", "width": self.width}
        with seeded(seed):
            return GeneratorTrigger(GENERATORS.build(spec), Budget(self.epsilon), spec, "residual")


def common_clusters(features: Sequence[Tensor], count: int, seed: int) -> Rows:
    """One cluster an image, int64 (N,): k-means on what several encoders make of the same images, by their cosines.

    Raises:
        InputRefused: fewer images than clusters.
        Diverged: fewer different features than clusters.
    """
    if len(features[0]) < count:
        raise InputRefused(f"{len(features[0])} images for {count} clusters; lower the defense's option clusters.")
    seen = [torch.nn.functional.normalize(each - each.mean(dim=0)) for each in features]
    labels, _ = k_means(torch.cat(seen, dim=1).numpy(), count, stream_seed(seed, "defense", "clusters"))
    if len(np.unique(labels)) < count:
        raise Diverged(f"the images have fewer than {count} different features; an encoder collapsed.")
    return labels


def vectors_of(encoder: Encoder, images: Images, conditions: Conditions) -> Tensor:
    """Features float32 (N, D), on the CPU; the encoder is left where it lay."""
    return torch.from_numpy(suspect_features(encoder, images, conditions))


def invert_clusters(
    encoders: Sequence[Encoder],
    features: Sequence[Tensor],
    images: Images,
    clusters: Rows,
    search: Search,
    conditions: Conditions,
) -> Iterator[GeneratorTrigger]:
    """A trigger for each cluster, in order, in evaluation mode on the CPU.

    Each maximises the mean cosine of triggered, augmented images of other clusters to the cluster's direction, where
    the clean images' features are white (BLTO's outer objective), on one encoder after the other.

    Args:
        encoders: at least one, as they were whenever a trigger is handed out.
        features: of each, (N, D), what `vectors_of` says of `images`.
        images: uint8 (N, 3, S, S), clean.
        clusters: int64 (N,), as `common_clusters` gives them.
        search: how.
        conditions: where, and from which seed.

    Raises:
        Diverged: a trigger's loss became NaN or Inf.
    """
    bases = [whitening_basis(each, SHRINKAGE) for each in features]
    count = int(clusters.max()) + 1
    with conditions.progress.bar("triggers of clusters", count) as advance:
        for cluster in range(count):
            inside = torch.from_numpy(clusters == cluster)
            seed, others = stream_seed(conditions.seed, "defense", "cluster trigger", cluster), clusters != cluster
            with ExitStack() as stack:
                goals = [
                    _Goal(
                        stack.enter_context(differentiable(encoder, conditions.device)),
                        Aim.at(each[inside], each, centred=True, basis=basis),
                        basis,
                    )
                    for encoder, each, basis in zip(encoders, features, bases, strict=True)
                ]
                trigger = _moving(goals, images, np.flatnonzero(others), search, seed)
                advance(cluster + 1, "")
            yield trigger.eval().cpu()


class _Goal:
    """Where one encoder has a cluster."""

    def __init__(self, function: Differentiable, aim: Aim, basis: Tensor) -> None:
        self.function, self.basis = function, basis.to(function.device)
        self.aim = Aim(*(value.to(function.device) for value in aim))


def _moving(goals: Sequence[_Goal], images: Images, sources: Rows, search: Search, seed: int) -> GeneratorTrigger:
    """Train triggers, one after the other, until one moves; the last is taken as it is."""
    for start in range(search.starts):
        begun = stream_seed(seed, "defense", start)
        trigger = search.fresh(begun)
        reached = list(_towards(goals, trigger, images, sources, search, begun))[-LAST:]
        if sum(reached) / len(reached) > MOVES * float(goals[-1].aim.target):
            break
    return trigger


def _towards(
    goals: Sequence[_Goal], trigger: GeneratorTrigger, images: Images, sources: Rows, search: Search, seed: int
) -> Iterator[float]:
    """Train a trigger on the images of `sources`, in place; yields what each step had reached, a mean cosine."""
    place, batch = goals[0].function.device, search.batch_size
    views = Views(resolve_recipe(VIEWS), images.shape[-1])
    trigger.to(place).train()
    use_native(trigger, goals[0].function.encoder.native)
    optimizer = torch.optim.Adam(trigger.parameters(), lr=search.lr)
    rng, warmup = numpy_generator(seed, "defense", "rows"), round(search.steps * WARMUP)
    for step in range(search.steps):
        goal = goals[step % len(goals)]
        rows = rng.choice(sources, batch, replace=len(sources) < batch)
        pixels = torch.from_numpy(images[rows]).to(place).float().div_(255)
        with goal.function.autocast():
            triggered = trigger(pixels).float()
        shown = views.draw(seed=seed, epoch=step, samples=rows, view=0)
        reached = goal.aim.similarities(goal.function(views.differentiable(triggered, shown)), goal.basis).triggered
        factor = learning_rate_factor(step, total_steps=search.steps, warmup_steps=warmup)
        optimizer.param_groups[0]["lr"] = search.lr * factor
        optimizer.zero_grad(set_to_none=True)
        (-reached).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield float(reached.detach())
    use_native(trigger, False)
    if not all(torch.isfinite(parameter).all() for parameter in trigger.parameters()):
        raise Diverged(
            "the trigger of a cluster became NaN or Inf; give an encoder whose features are finite, or another seed."
        )
