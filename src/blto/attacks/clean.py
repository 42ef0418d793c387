"""The clean run as an attack that does nothing: the twin beside which every other number stands."""

from __future__ import annotations

from blto.attacks.base import Attack, Surroundings, TargetClass, TrainedTrigger
from blto.data.images import ImageSet
from blto.poisoning import IdentityTrigger
from blto.registry import Card


class Clean(Attack):
    """No poison, no trigger.

    Args:
        target_class: the class whose natural rate is reported.
    """

    card = Card("clean", "no poison and no trigger: the twin of every other run", threat_model="none")

    def __init__(self, *, target_class: TargetClass = 0) -> None:
        self.target_class = target_class
        self.poison_rate = 0.0

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """The identity."""
        return TrainedTrigger(IdentityTrigger())
