"""What the paper leaves open in BLTO's bi-level loop (`bilevel`), as options. The defaults are ours, not its."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blto.pretraining.spec import OptimizerSpec, RecipeSpec, ViewsField
from blto.registry import later_option


class BilevelSpec(BaseModel):
    """The options of the bi-level loop.

    Attributes:
        rounds: N, alternations of inner and outer steps.
        inner_steps: K, surrogate steps a round.
        outer_steps: J, trigger steps a round.
        reinitialise_every: R, rounds after which the surrogate starts anew; its schedule spans one such period.
        warm_start_steps: surrogate steps after each (re-)initialisation before the trigger moves.
        surrogate: method, backbone, views and optimiser of the attacker's own victim (paper: SimSiam, ResNet-18).
        inner_poison_rate: poisoned share of the surrogate's data; None is the attack's own poison rate.
        outer_batch_size: images x, and as many references and clean views where a step takes its own, an outer step.
        outer_views: the augmentation of outer steps; None is the surrogate's. A milder one wins more whole images, but
            is less of what a victim trains on.
        outer_lr: peak learning rate of Adam on the trigger; in each period it rises over the first sixth of the steps,
            without which the generator often stands still for hundreds of them, and falls to zero along half a cosine.
        similarity: "raw" is the cosine of features, the paper's; "centred" subtracts the mean feature of clean images
            first, since features after a ReLU all point the same way; "whitened" also evens out the variance of the
            directions, so that the trigger aims at what sets the target class apart.
        shrinkage: of "whitened", as in `objective.whitening_basis`.
        target: "pairwise" pairs each x with one reference image, drawn anew in each step; "centroid" aims at the
            references' mean direction. That belongs to the surrogate and not to a batch, so with the mean clean feature
            it is estimated from many images every 50 outer steps (with `batch_norm` "batch" in each step).
        feature_layer: the encoder's "features", or the projector's "embeddings" that the surrogate's loss compares.
        batch_norm: of the surrogate in outer steps: "eval" uses its running statistics, "batch" those of the triggered,
            reference and clean views together.
        conceal: what an outer step pays for each standard deviation by which the trigger moves the target class's own
            images the way it moves others; see `concealment`. 0, the paper's: nothing. It compares features of two
            batches, so `batch_norm` has to be "eval".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: Annotated[int, Field(ge=1)] = 4000
    inner_steps: Annotated[int, Field(ge=1)] = 1
    outer_steps: Annotated[int, Field(ge=1)] = 1
    reinitialise_every: Annotated[int, Field(ge=1)] = 1000
    warm_start_steps: Annotated[int, Field(ge=0)] = 0
    surrogate: RecipeSpec = RecipeSpec(
        method="simsiam", views="simsiam_cifar", batch_size=512, optimizer=OptimizerSpec(lr=0.06)
    )
    inner_poison_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    outer_batch_size: Annotated[int, Field(ge=2)] = 128
    outer_views: ViewsField | None = None
    outer_lr: Annotated[float, Field(gt=0)] = 5e-3
    similarity: Literal["raw", "centred", "whitened"] = "whitened"
    shrinkage: Annotated[float, Field(gt=0)] = 2.0
    target: Literal["pairwise", "centroid"] = "centroid"
    feature_layer: Literal["features", "embeddings"] = "features"
    batch_norm: Literal["eval", "batch"] = "eval"
    conceal: Annotated[float, Field(ge=0), later_option(0.0)] = 0.0

    @model_validator(mode="after")
    def _concealed_by_fixed_statistics(self) -> Self:
        if self.conceal and self.batch_norm != "eval":
            raise ValueError(f'conceal is {self.conceal:g} with batch_norm "{self.batch_norm}"; give batch_norm "eval"')
        return self


def surrogate_poison_rate(inner: float | None, own: float) -> float:
    """The poisoned share of a surrogate's data, from `inner_poison_rate` and the attack's own poison rate."""
    return own if inner is None else inner


def learned_from(attack: Mapping[str, Any]) -> dict[str, Any]:
    """What of an attack's resolved spec its trigger depends on: triggers that agree in it are one.

    A bi-level loop sees the poison rate of its surrogate's data alone. With `inner_poison_rate` given, victims of any
    rate share one trigger. (`frozen_surrogate`, whose surrogate sees no poison, is told apart by more than it needs.)
    """
    bilevel = attack.get("bilevel")
    if bilevel is None:
        return dict(attack)
    kept = {key: value for key, value in attack.items() if key != "poison_rate"}
    rate = surrogate_poison_rate(bilevel["inner_poison_rate"], attack["poison_rate"])
    return {**kept, "bilevel": {**bilevel, "inner_poison_rate": rate}}
