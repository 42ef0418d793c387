"""Control: BLTO without its inner problem."""

from __future__ import annotations

from blto.attacks.base import Attack, Epsilon, PoisonRate, Surroundings, TargetClass, TrainedTrigger
from blto.attacks.bilevel_spec import BilevelSpec
from blto.attacks.crafting import optimise_trigger
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.data.images import ImageSet
from blto.models import GENERATORS
from blto.poisoning.trigger import Parametrisation
from blto.pretraining.spec import component
from blto.registry import Card


class FrozenSurrogate(Attack):
    """The same generator and the same number of trigger steps against one surrogate trained on clean data and frozen.

    What BLTO has beyond this is the inner problem: a surrogate that trains on the poisons, again and again.

    Args:
        target_class, poison_rate, epsilon, generator, parametrisation: as in BLTO.
        bilevel: as in BLTO; the surrogate trains for one period (`warm_start_steps + reinitialise_every * inner_steps`
            steps) on clean data before the first step of the trigger, and never after.
    """

    card = Card(
        "frozen surrogate",
        "BLTO without the inner problem: the trigger is learned on one clean, frozen surrogate",
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
        generator: component(GENERATORS) = "unet",  # type: ignore[valid-type]  # made from the registry
        parametrisation: Parametrisation = "residual",
        bilevel: BilevelSpec = BilevelSpec(),  # noqa: B008  # frozen
    ) -> None:
        self.target_class, self.poison_rate, self.epsilon = target_class, poison_rate, epsilon
        self.generator, self.parametrisation, self.bilevel = generator, parametrisation, bilevel

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """One clean surrogate, then trigger steps alone."""
        trigger = fresh_generator_trigger(self.generator, self.epsilon, self.parametrisation, seed=seed)
        rows = optimise_trigger(
            trigger,
            images,
            self.bilevel,
            target_class=self.target_class,
            poison_rate=self.poison_rate,
            seed=seed,
            surroundings=surroundings,
            frozen=True,
        )
        return TrainedTrigger(trigger, rows)
