"""BLTO: Bi-Level Trigger Optimization (Sun et al., ICLR 2024, arXiv 2404.07863)."""

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


class BLTO(Attack):
    """A generator g with |g(x) - x| <= epsilon, trained against a surrogate that trains on its poisons.

    The loop and its options are in `bilevel`; docs/attacks/blto.md says what the paper fixes and what it leaves open.

    Args:
        target_class, poison_rate: as in every attack (paper: truck of CIFAR-10, 1%).
        epsilon: L-infinity budget, a fraction of the pixel range (paper: 8/255).
        generator: name and arguments of an entry of GENERATORS ("resnet" with 6 blocks is the released one).
        parametrisation: how the generator's output becomes an image; see `GeneratorTrigger`.
        bilevel: the options of the bi-level loop.
    """

    card = Card(
        "BLTO",
        "learns a trigger generator against a surrogate that trains on its poisons",
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
        """Alternate inner and outer steps for the whole loop."""
        trigger = fresh_generator_trigger(self.generator, self.epsilon, self.parametrisation, seed=seed)
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
