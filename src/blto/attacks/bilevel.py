"""The bi-level loop of BLTO.

Sun et al., ICLR 2024 (arXiv 2404.07863), section 3 and Algorithm 1. Two problems alternate for N rounds:
- inner: K steps of a surrogate victim on clean data together with the poisoned images, with its own loss and
  augmentations, through the victims' own `Trainer.train_step`;
- outer: J steps of the trigger, which move g(x), for x from the whole data, towards reference images of the target
  class in the surrogate's feature space, both sides augmented. The gradient is first order: it flows through features
  and views only.
Every R rounds the surrogate starts anew, so that the trigger meets the whole trajectory of a training.

This is a re-implementation from the published objective. N, K, J, R, optimisers and batch sizes are not published:
they are options, of `bilevel_spec`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blto.attacks.bilevel_spec import BilevelSpec, surrogate_poison_rate
from blto.attacks.concealment import Concealment
from blto.attacks.feature_space import FeatureSpace
from blto.attacks.objective import similarities
from blto.data.images import ImageSet
from blto.data.views import Array, ViewParameters, Views
from blto.errors import ConfigError, Diverged
from blto.models.generators import use_native
from blto.poisoning import Trigger, apply_to_uint8, plan_replacement
from blto.poisoning.aim import Aim, Similarities, whitening_basis
from blto.pretraining.loop import batch_rows, build_method
from blto.pretraining.trainer import Trainer, learning_rate_factor
from blto.runtime.distributed import require_one_process
from blto.runtime.seeds import numpy_generator, stream_seed

OUTER_STEPS_PER_ESTIMATE = 50
"""How often within a period the whitening and the aim at a centroid follow the surrogate."""
CLEAN_IMAGES, REFERENCE_IMAGES, MOVED_IMAGES = 1024, 512, 256
"""From how many views of each."""


class Place(NamedTuple):
    """Where a run stands: which surrogate, whether it starts now, and the next outer step within its period."""

    period: int
    starts: bool
    outer_step: int
    is_outer: bool
    outer_steps: int
    """How many outer steps the period has."""


class BilevelOptimisation:
    """One run of the loop: surrogate, trigger, their optimisers, and where they stand.

    Attributes:
        position: steps taken, inner and outer.
        outer_steps: those of the trigger among them.
        period: which surrogate, from 0, is at hand.
        basis: the whitening, (D, D), of the last estimate; None where there is none.
        aim: where the target class lies in that basis; None where each step brings its own references.
        concealment: of the last estimate; None where the trigger does not conceal its poisons.
        shift: what the last outer step paid it for, in standard deviations.

    Args:
        trigger: what is learned; trained in place.
        images: the attacker's labeled images.
        spec: the options.
        target_class, poison_rate: the attack's.
        seed: the run's seed; everything drawn here comes from its `trigger` stream.
        device: "auto", "cpu" or "cuda".
        frozen: train the surrogate once, on clean data, for as long as one period lasts, and never again (the
            `frozen_surrogate` control: the same budget of trigger steps without an inner problem).

    Raises:
        ConfigError: a target class or poison rate that the data do not have, or too few images to conceal among.
    """

    def __init__(
        self,
        trigger: Trigger,
        images: ImageSet,
        spec: BilevelSpec,
        *,
        target_class: int,
        poison_rate: float,
        seed: int,
        device: str = "auto",
        frozen: bool = False,
    ) -> None:
        require_one_process("crafting a trigger")
        assert images.labels is not None  # checked by `plan_replacement` for every caller
        self.trigger, self.images, self.spec, self.seed, self.frozen = trigger, images, spec, seed, frozen
        self.device, self.target_class = device, target_class
        inner_rate = surrogate_poison_rate(spec.inner_poison_rate, poison_rate)
        plan = plan_replacement(
            images.labels,
            num_classes=images.num_classes,
            target_class=target_class,
            poison_rate=0.0 if frozen else inner_rate,
            seed=seed,
        )
        self.is_poisoned = np.zeros(len(images), dtype=bool)
        self.is_poisoned[plan.indices] = True
        self.surrogate_images = np.array(images.images)
        self.references = np.flatnonzero(images.labels == target_class)
        if spec.conceal and not 2 <= len(self.references) < len(images):
            raise ConfigError(
                f"bilevel.conceal: {images.name} has {len(self.references)} images of the target class and "
                f"{len(images) - len(self.references)} others; it needs 2 and 1."
            )
        self.views = Views(spec.surrogate.views, images.image_size)
        self.outer_views = Views(spec.outer_views or spec.surrogate.views, images.image_size)
        self.optimizer = torch.optim.Adam(trigger.parameters(), lr=spec.outer_lr)
        self.position = self.outer_steps = self.period = 0
        self.basis: Tensor | None = None
        self.aim: Aim | None = None
        self.concealment: Concealment | None = None
        self.shift = torch.zeros(())
        self.trajectory: list[dict[str, float]] = []
        self.surrogate = self.new_surrogate(0)
        use_native(trigger.to(self.surrogate.fabric.device), self.surrogate.method.encoder.native)

    @property
    def surrogate_steps(self) -> int:
        """Steps of one surrogate: its warm start and its period."""
        return self.spec.warm_start_steps + self.spec.reinitialise_every * self.spec.inner_steps

    @property
    def total_steps(self) -> int:
        """Inner and outer steps of the whole run."""
        spec = self.spec
        if self.frozen:
            return self.surrogate_steps + spec.rounds * spec.outer_steps
        periods = -(-spec.rounds // spec.reinitialise_every)
        return periods * spec.warm_start_steps + spec.rounds * (spec.inner_steps + spec.outer_steps)

    def place(self) -> Place:
        """What the next step is: a function of `position` alone."""
        spec, per_round = self.spec, self.spec.inner_steps + self.spec.outer_steps
        if self.frozen:
            number = self.position - self.surrogate_steps
            return Place(0, self.position == 0, max(0, number), number >= 0, spec.rounds * spec.outer_steps)
        length = spec.warm_start_steps + spec.reinitialise_every * per_round
        period, step = divmod(self.position, length)
        rounds = min(spec.reinitialise_every, spec.rounds - period * spec.reinitialise_every)
        round_in_period, step_in_round = divmod(max(0, step - spec.warm_start_steps), per_round)
        number = round_in_period * spec.outer_steps + max(0, step_in_round - spec.inner_steps)
        is_outer = step >= spec.warm_start_steps and step_in_round >= spec.inner_steps
        return Place(period, step == 0, number, is_outer, rounds * spec.outer_steps)

    def new_surrogate(self, period: int) -> Trainer:
        """A surrogate with fresh weights and a fresh schedule."""
        seed = stream_seed(self.seed, "trigger", "surrogate", period)
        recipe = self.spec.surrogate
        return Trainer(
            build_method(recipe, seed=seed, image_size=self.images.image_size),
            optimizer=recipe.optimizer,
            total_steps=self.surrogate_steps,
            seed=seed,
            device=self.device,
            precision=recipe.precision,
            engine=recipe.engine,
        )

    def inner_step(self, period: int = 0) -> None:
        """One step of the surrogate of `period` on clean images together with freshly triggered poisons."""
        steps_per_epoch = max(1, len(self.images) // self.spec.surrogate.batch_size)
        epoch, batch = divmod(self.surrogate.step, steps_per_epoch)
        seed = stream_seed(self.seed, "trigger", "inner", period)
        size = min(self.spec.surrogate.batch_size, len(self.images))
        rows = batch_rows(len(self.images), size, seed=seed, epoch=epoch, batch=batch)
        poisoned = rows[self.is_poisoned[rows]]
        if len(poisoned):
            self.surrogate_images[poisoned] = apply_to_uint8(self.trigger, self.images.images[poisoned])
        drawn = (self.views.draw(seed=seed, epoch=epoch, samples=rows, view=view) for view in (0, 1))
        device = self.surrogate.fabric.device
        self.surrogate.train_step([self.views.fast(self.surrogate_images, rows, d).to(device) for d in drawn])

    def outer_step(self, number: int, learning_rate: float) -> Similarities:
        """One step of the trigger; `number` counts them from 0 and fixes what is drawn."""
        draw = numpy_generator(self.seed, "trigger", "outer", number)
        size = self.spec.outer_batch_size
        rows = draw.choice(len(self.images), size, replace=len(self.images) < size)
        device = self.surrogate.fabric.device
        view = self._drawn("outer views", number, rows)
        self.trigger.train()
        images = torch.from_numpy(self.images.images[rows]).to(device).float().div_(255)
        with self.surrogate.fabric.autocast():
            triggered = self.outer_views.differentiable(self.trigger(images).float(), view)
        if self.aim is not None:
            found = self.aim.similarities(self.features.differentiable(triggered), self.basis)
        else:
            references = draw.choice(self.references, size, replace=len(self.references) < size)
            reference_view = self._drawn("outer views", number, references, view=1)
            sides = (
                self.outer_views.fast(self.images.images, *of) for of in ((references, reference_view), (rows, view))
            )
            found = similarities(
                *self.features.together(triggered, *(views.to(device) for views in sides)),
                centred=self.spec.similarity != "raw",
                centroid=self.spec.target == "centroid",
                basis=self.basis,
            )
        loss = -found.triggered
        if self.concealment is not None:
            own = draw.choice(self.references, size, replace=len(self.references) < size)
            shift = self.concealment.shift(*self._without_and_with("concealed views", number, own))
            loss, self.shift = loss + self.spec.conceal * shift, shift.detach()
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.trigger.keep_within_budget()
        return Similarities(found.triggered.detach(), found.clean, found.target)

    def _without_and_with(self, purpose: str, number: int, rows: Array) -> tuple[Tensor, Tensor]:
        """Features of the same views without the trigger, and with it as poisons get it, with a gradient to it."""
        self.trigger.eval()
        drawn, device = self._drawn(purpose, number, rows), self.surrogate.fabric.device
        images = torch.from_numpy(self.images.images[rows]).to(device).float().div_(255)
        with self.surrogate.fabric.autocast():
            triggered = self.outer_views.differentiable(self.trigger(images).float(), drawn)
        clean = self.outer_views.fast(self.images.images, rows, drawn).to(device)
        return self.features.fixed(clean), self.features.differentiable(triggered)

    @property
    def features(self) -> FeatureSpace:
        """Of the surrogate as it stands."""
        return FeatureSpace(self.surrogate, self.spec.feature_layer, self.spec.batch_norm)

    def _drawn(self, purpose: str, number: int, rows: Array, view: int = 0) -> ViewParameters:
        seed = stream_seed(self.seed, "trigger", purpose)
        return self.outer_views.draw(seed=seed, epoch=number, samples=rows, view=view)

    def estimate(self, number: int) -> None:
        """Take basis and aim, where the spec wants them, from the surrogate as it stands; `number` fixes the draws.

        Raises:
            Diverged: a feature is NaN or Inf.
        """
        spec = self.spec
        whitened, aimed = spec.similarity == "whitened", spec.target == "centroid" and spec.batch_norm == "eval"
        if whitened or aimed:
            clean = self._sample("basis", number, np.arange(len(self.images)), CLEAN_IMAGES)
        if whitened:
            self.basis = whitening_basis(clean, spec.shrinkage)
        if aimed:
            references = self._sample("aim", number, self.references, REFERENCE_IMAGES)
            self.aim = Aim.at(references, clean, centred=spec.similarity != "raw", basis=self.basis)
        if spec.conceal:
            own = self._sample("own", number, self.references, REFERENCE_IMAGES)
            others = np.flatnonzero(self.images.labels != self.target_class)
            rows = numpy_generator(self.seed, "trigger", "moved", number).choice(
                others, min(MOVED_IMAGES, len(others)), replace=False
            )
            with torch.no_grad():
                moved = self._finite(*self._without_and_with("moved views", number, rows))
            self.concealment = Concealment.against(own, *moved)

    def _sample(self, purpose: str, number: int, rows: Array, count: int) -> Tensor:
        """Features of views of `count` of the rows, or of all if there are fewer."""
        drawn = numpy_generator(self.seed, "trigger", purpose, number)
        rows = drawn.choice(rows, min(count, len(rows)), replace=False)
        views = self.outer_views.fast(self.images.images, rows, self._drawn(f"{purpose} views", number, rows))
        return self._finite(self.features.fixed(views.to(self.surrogate.fabric.device)))[0]

    def _finite(self, *features: Tensor) -> tuple[Tensor, ...]:
        """The same. Raises Diverged where one is NaN or Inf."""
        if all(torch.isfinite(each).all() for each in features):
            return features
        where = f"at step {self.position} of {self.total_steps}"
        raise Diverged(f"the surrogate's features hold NaN or Inf {where}; lower surrogate.optimizer.lr.")

    def step(self) -> Similarities | None:
        """(Re-initialise the surrogate where it is time and) take the next inner or outer step.

        Returns:
            The similarities of an outer step; None after an inner one.
        """
        place, found = self.place(), None
        if place.starts:
            self.period, self.surrogate = place.period, self.new_surrogate(place.period)
        if place.is_outer:
            if place.outer_step % OUTER_STEPS_PER_ESTIMATE == 0:
                self.estimate(self.outer_steps)
            steps = place.outer_steps
            factor = learning_rate_factor(place.outer_step, total_steps=steps, warmup_steps=steps // 6)
            found = self.outer_step(self.outer_steps, self.spec.outer_lr * factor)
            self.outer_steps += 1
        else:
            self.inner_step(place.period)
        self.position += 1
        return found
