"""Control: BLTO with one additive perturbation for all images instead of a generator."""

from __future__ import annotations

import torch

from blto.attacks.base import Attack, Epsilon, PoisonRate, Surroundings, TargetClass, TrainedTrigger
from blto.attacks.bilevel_spec import BilevelSpec
from blto.attacks.crafting import optimise_trigger
from blto.data.images import ImageSet
from blto.poisoning import AdditiveTrigger, Budget
from blto.registry import Card
from blto.runtime.seeds import seeded, stream_seed


class UniversalDelta(Attack):
    """x + delta with |delta| <= epsilon, delta learned by the very loops that train BLTO's generator.

    Args:
        target_class, poison_rate, epsilon: as in BLTO.
        bilevel: as in BLTO.
    """

    card = Card(
        "universal delta",
        "one additive perturbation for all images, learned by BLTO's loops",
        "arXiv 2404.07863",
        2024,
        "data poisoning",
        "L-infinity",
    )

    def __init__(
        self,
        *,
        target_class: TargetClass,
        poison_rate: PoisonRate = 0.01,
        epsilon: Epsilon = 8 / 255,
        bilevel: BilevelSpec = BilevelSpec(),  # noqa: B008  # frozen
    ) -> None:
        self.target_class, self.poison_rate, self.epsilon, self.bilevel = target_class, poison_rate, epsilon, bilevel

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """Start from uniform noise of half the budget; alternate inner and outer steps for the whole loop."""
        size = images.image_size
        with seeded(stream_seed(seed, "trigger", "delta")):
            delta = torch.empty(3, size, size).uniform_(-self.epsilon / 2, self.epsilon / 2)
        trigger = AdditiveTrigger(delta, Budget(self.epsilon))
        rows = optimise_trigger(
            trigger,
            images,
            self.bilevel,
            target_class=self.target_class,
            poison_rate=self.poison_rate,
            seed=seed,
            surroundings=surroundings,
        )
        return TrainedTrigger(trigger, rows)
