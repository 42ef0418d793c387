"""Triggers: what the adversary puts into an image, and the budget that no trigger can leave.

A trigger proposes a candidate image; the base class projects it into the budget, so an attack cannot forget to. The
one generator that skips this is within it by its last layer.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any, ClassVar, Literal

import numpy.typing as npt
import torch
from torch import Tensor, nn

from blto.errors import ConfigError
from blto.files import canonical_json
from blto.models import GENERATORS
from blto.models.generators import HourglassGenerator


@dataclass(frozen=True)
class Budget:
    """How far a trigger may move a pixel.

    Args:
        epsilon: largest change of a channel value, as a fraction of the range [0, 1]; 8/255 in the paper. 0 is the
            control that changes nothing; 1 holds nothing back, see `UNBOUNDED`.
        norm: the norm that epsilon bounds; L-infinity is the only one.

    Raises:
        ConfigError: epsilon outside [0, 1], or another norm.
    """

    epsilon: float
    norm: Literal["linf"] = "linf"

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= 1.0:
            raise ConfigError(
                f"budget: epsilon is {self.epsilon}; give a fraction of the pixel range from 0 to 1, such as 8/255."
            )
        if self.norm != "linf":
            raise ConfigError(f'budget: norm is "{self.norm}"; the only norm is "linf".')

    @property
    def levels(self) -> int:
        """The budget in whole 8-bit steps, rounded down: an image file cannot use the rest."""
        return floor(self.epsilon * 255 + 1e-4)  # 8/255 written as 0.0313725 keeps its 8 steps

    @property
    def declared(self) -> float | None:
        """Epsilon as it may be reported: None where it is 1, which any image keeps and so promises nothing."""
        return None if self.epsilon == 1 else float(self.epsilon)


UNBOUNDED = Budget(1.0)
"""Of a trigger without a budget, such as an opaque patch: only the pixel range binds it, and its change is measured."""


def project(images: Tensor, candidate: Tensor, epsilon: float) -> Tensor:
    """Clip `candidate` to within `epsilon` of `images` and to [0, 1]: clip(clip(candidate, x - eps, x + eps), 0, 1).

    All (B, 3, H, W), `images` in [0, 1]. Differentiable in `candidate`: gradient 1 inside the bounds, 0 outside.
    Source: BLTO (arXiv 2404.07863), the way its released generators are applied.
    """
    low, high = (images - epsilon).clamp_min(0.0), (images + epsilon).clamp_max(1.0)
    clipped: Tensor = (torch.clamp if images.requires_grad else _Clip.apply)(candidate, low, high)
    return clipped


class _Clip(torch.autograd.Function):
    """`torch.clamp` between bounds that need no gradient, of which its own backward pass is several times as slow."""

    @staticmethod
    def forward(ctx: Any, candidate: Tensor, low: Tensor, high: Tensor) -> Tensor:
        clipped = torch.clamp(candidate, low, high)
        ctx.save_for_backward(clipped == candidate)
        return clipped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class Trigger(nn.Module, ABC):
    """Images (B, 3, H, W) float in [0, 1] -> images of the same shape, within `budget` and in [0, 1].

    Calling it makes poisons; `at_test()` is the trigger for test images.
    """

    kind: ClassVar[str]

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    @abstractmethod
    def candidate(self, images: Tensor) -> Tensor:
        """The triggered images before projection, any float values."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain data that, with the weights, rebuilds this trigger: its `kind`, and what that kind needs."""

    def forward(self, images: Tensor) -> Tensor:
        """Apply the trigger as to a poison."""
        return project(images, self.candidate(images), self.budget.epsilon)

    def at_test(self) -> Trigger:
        """What test images get: this trigger, or another one where the attack makes them differ from its poisons."""
        return self

    @torch.no_grad()
    def keep_within_budget(self) -> None:
        """Called after each optimiser step: bring back parameters that left the budget, where no gradient is left."""

    @property
    def identity(self) -> str:
        """The trigger's id: SHA-256 (hex) over its spec and its weights."""
        return trigger_identity(self.spec(), self.arrays())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The weights and buffers by name, on the CPU."""
        return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.state_dict().items()}


def trigger_identity(spec: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 (hex) over a trigger's spec and over the name, type, shape and bytes of each array."""
    digest = hashlib.sha256(canonical_json(dict(spec)))
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(canonical_json([name, str(values.dtype), list(values.shape)]))
        digest.update(values.tobytes())
    return digest.hexdigest()


class IdentityTrigger(Trigger):
    """The clean control: gives back the images it was given."""

    kind = "identity"

    def __init__(self) -> None:
        super().__init__(Budget(0.0))

    def candidate(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images

    def spec(self) -> dict[str, Any]:
        """No arguments."""
        return {"kind": self.kind}


Parametrisation = Literal["residual", "image"]


class GeneratorTrigger(Trigger):
    """A network that redraws the image: BLTO's g, projected into the budget.

    Args:
        generator: images (B, 3, H, W) in [0, 1] -> raw output of the same shape in [-1, 1].
        budget: the L-infinity budget.
        generator_spec: the entry of `GENERATORS` that `generator` was built from.
        parametrisation: "residual" reads the raw output r as the candidate x + epsilon r, so every pixel has a
            gradient; "image" as the candidate (r + 1) / 2, which is what the released generator does: there the clip
            stops the gradient of every pixel that is further than epsilon from x.
    """

    kind = "generator"

    def __init__(
        self,
        generator: nn.Module,
        budget: Budget,
        generator_spec: Mapping[str, Any],
        parametrisation: Parametrisation = "residual",
    ) -> None:
        super().__init__(budget)
        self.generator = generator
        self.generator_spec = GENERATORS.resolve(generator_spec)
        self.parametrisation: Parametrisation = parametrisation

    def forward(self, images: Tensor) -> Tensor:
        """Apply the trigger; an hourglass's residual, which its tanh keeps within epsilon, needs no projection but one
        to [0, 1], and its last kernel does that."""
        if self.parametrisation == "residual" and isinstance(self.generator, HourglassGenerator):
            return self.generator.add_to(images, self.budget.epsilon)
        return super().forward(images)

    def candidate(self, images: Tensor) -> Tensor:
        """The image that the generator proposes."""
        raw: Tensor = self.generator(images)
        return (raw + 1) / 2 if self.parametrisation == "image" else torch.add(images, raw, alpha=self.budget.epsilon)

    def spec(self) -> dict[str, Any]:
        """The budget, the parametrisation and the generator's spec."""
        return {
            "kind": self.kind,
            "epsilon": float(self.budget.epsilon),
            "generator": self.generator_spec,
            "parametrisation": self.parametrisation,
        }


class AdditiveTrigger(Trigger):
    """One perturbation for all images: x + delta, projected into the budget.

    Args:
        delta: float (3, H, H), added to every image; becomes a parameter.
        budget: the L-infinity budget.

    Raises:
        ConfigError: delta of another shape, or images of another size than delta.
    """

    kind = "additive"

    def __init__(self, delta: Tensor, budget: Budget) -> None:
        super().__init__(budget)
        if delta.ndim != 3 or delta.shape[0] != 3 or delta.shape[1] != delta.shape[2]:
            raise ConfigError(f"additive trigger: delta is {tuple(delta.shape)}; accepted is (3, H, H).")
        self.delta = nn.Parameter(delta.detach().clone())

    def candidate(self, images: Tensor) -> Tensor:
        """The images with delta added."""
        if images.shape[1:] != self.delta.shape:
            raise ConfigError(
                f"additive trigger: images are {tuple(images.shape[1:])}, the trigger is {tuple(self.delta.shape)}; "
                "use images of the size it was made for."
            )
        return images + self.delta

    @torch.no_grad()
    def keep_within_budget(self) -> None:
        """Clip delta to the budget: beyond it, `project` has no gradient that could lead back."""
        self.delta.clamp_(-self.budget.epsilon, self.budget.epsilon)

    def spec(self) -> dict[str, Any]:
        """The budget and the image size."""
        return {"kind": self.kind, "epsilon": float(self.budget.epsilon), "image_size": self.delta.shape[1]}
