"""The recipe of one pretraining as a frozen, validated object: what `pretrain` takes and what a record keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from blto.data.views import ViewRecipe, resolve_recipe
from blto.errors import BltoError
from blto.models import BACKBONES
from blto.pretraining import METHODS
from blto.registry import Registry, later_option, validate
from blto.runtime.device import Precision

Engine = Literal["fast", "reference"]


def component(registry: Registry[Any]) -> Any:
    """A field type: a component's name or `{name, **arguments}`, stored with every default filled in."""

    def resolve(given: Any) -> Any:
        if not isinstance(given, str | Mapping):
            raise ValueError(f"should be a name or a mapping with a name, not {type(given).__name__}")
        try:
            return registry.resolve(given)
        except BltoError as error:
            raise ValueError(str(error).rstrip(".")) from error

    return Annotated[dict[str, Any], BeforeValidator(resolve)]


def _recipe(given: Any) -> ViewRecipe:
    """A recipe by name, by name with overrides, or (from a record) with every value spelled out."""
    if isinstance(given, ViewRecipe):
        return given
    if not isinstance(given, str | Mapping):
        raise ValueError(f"should be a recipe's name or a mapping, not {type(given).__name__}")
    try:
        return resolve_recipe(given) if isinstance(given, str) or "name" in given else validate(ViewRecipe, given, "")
    except BltoError as error:
        raise ValueError(str(error).rstrip(".")) from error


ViewsField = Annotated[ViewRecipe, BeforeValidator(_recipe)]
"""A field type: an augmentation recipe, as `_recipe` takes it."""


class OptimizerSpec(BaseModel):
    """Optimiser and peak learning rate, for the recipe's batch size: nothing is scaled behind your back.

    Biases and norms get no weight decay and, under LARS, no layer-wise adaptation (SimCLR, appendix B.6).

    Attributes:
        name: SGD with momentum, LARS, or AdamW.
        lr: peak learning rate.
        momentum: of SGD and LARS.
        weight_decay: L2 penalty; decoupled under AdamW.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.06
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


class RecipeSpec(BaseModel):
    """What is trained and how each step looks; how long is the caller's business. A surrogate is described by this.

    Attributes:
        method: name and arguments of an entry of METHODS.
        backbone: name and arguments of an entry of BACKBONES, or `timm/...`, `torchvision/...`.
        views: an augmentation recipe by name, or `{name, **overrides}`.
        optimizer: optimiser and peak learning rate.
        batch_size: images a step; each gives two views.
        precision: "auto" is bf16 where the device multiplies it natively, else fp32; fp32 under engine "reference".
        engine: "fast", or "reference": plain torch throughout, which the fast one is tested against.
        normalise: false trains and evaluates on pixels in [0, 1] as they are, as CTRL's code does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    method: component(METHODS) = "simclr"  # type: ignore[valid-type]  # the field's type is made from the registry
    backbone: component(BACKBONES) = "resnet18"  # type: ignore[valid-type]  # likewise
    views: ViewsField = "simclr_cifar"  # type: ignore[assignment]  # a name stands for its recipe
    optimizer: OptimizerSpec = OptimizerSpec()
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = 256
    precision: Precision = "auto"
    engine: Engine = "fast"
    normalise: Annotated[bool, later_option(True)] = True


class PretrainingSpec(RecipeSpec):
    """One whole pretraining.

    Attributes:
        epochs: passes over the training images; the last, incomplete batch of an epoch is left out.
        warmup_epochs: linear warm-up to the peak rate; a cosine to zero follows.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 200
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
