"""Control: BLTO's generator as it is before any training, at the same budget."""

from __future__ import annotations

from typing import Any

from blto.attacks.base import Attack, Epsilon, PoisonRate, Surroundings, TargetClass, TrainedTrigger
from blto.data.images import ImageSet
from blto.models import GENERATORS
from blto.poisoning import Budget, GeneratorTrigger
from blto.poisoning.trigger import Parametrisation
from blto.pretraining.spec import component
from blto.registry import Card
from blto.runtime.seeds import seeded, stream_seed


def fresh_generator_trigger(
    generator: dict[str, Any], epsilon: float, parametrisation: Parametrisation, *, seed: int
) -> GeneratorTrigger:
    """A generator trigger with weights from the run's `trigger` stream: where BLTO starts, and where this stays."""
    with seeded(stream_seed(seed, "trigger", "generator")):
        return GeneratorTrigger(GENERATORS.build(generator), Budget(epsilon), generator, parametrisation)


class UntrainedGenerator(Attack):
    """A trigger of the same form and size as BLTO's that no optimisation has touched.

    Args:
        target_class, poison_rate: as in every attack.
        epsilon: L-infinity budget, a fraction of the pixel range.
        generator: name and arguments of an entry of GENERATORS.
        parametrisation: how the generator's output becomes an image; see `GeneratorTrigger`.
    """

    card = Card(
        "untrained generator",
        "BLTO's generator before any training: what a bounded image-dependent pattern does by itself",
        threat_model="data poisoning",
        norm="L-infinity",
    )

    def __init__(
        self,
        *,
        target_class: TargetClass,
        poison_rate: PoisonRate = 0.01,
        epsilon: Epsilon = 8 / 255,
        generator: component(GENERATORS) = "unet",  # type: ignore[valid-type]  # made from the registry
        parametrisation: Parametrisation = "residual",
    ) -> None:
        self.target_class, self.poison_rate, self.epsilon = target_class, poison_rate, epsilon
        self.generator, self.parametrisation = generator, parametrisation

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """Draw the weights and stop there."""
        return TrainedTrigger(fresh_generator_trigger(self.generator, self.epsilon, self.parametrisation, seed=seed))
