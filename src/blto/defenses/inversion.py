"""What trigger inversions have in common: an encoder that images can be optimised through, and a mask with a patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from blto.models.encoder import Encoder
from blto.pretraining.trainer import training_precision
from blto.runtime.device import fabric

WINDOWS_A_SIDE = 3


class Differentiable:
    """An encoder's features with a gradient to the images and none to the weights, in the device's fast precision."""

    def __init__(self, encoder: Encoder, device: str) -> None:
        self.encoder = encoder
        self.precision = training_precision("auto", "fast", device)
        self._fabric = fabric(device, self.precision)
        self.device = self._fabric.device

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> float32 features (B, D)."""
        with self.autocast():
            features: Tensor = self.encoder(images)
        return features.float()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision in which features are computed, for a generator before them."""
        found: AbstractContextManager[None] = self._fabric.autocast()
        return found


@contextmanager
def differentiable(encoder: Encoder, device: str) -> Iterator[Differentiable]:
    """The encoder as it is inside an inversion; afterwards it is as it was."""
    modes = [(part, part.training) for part in encoder.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    native, place = encoder.native, encoder.mean.device
    try:
        encoder.eval().requires_grad_(False)
        function = Differentiable(encoder, device)
        encoder.to(function.device)
        encoder.native = function.precision == "bf16" and device == "cpu"
        yield function
    finally:
        encoder.native = native
        encoder.to(place)
        for part, training in modes:
            part.training = training
        for parameter, requires in wanted:
            parameter.requires_grad_(requires)


class MaskedPatch(nn.Module):
    """A patch p and a mask m with values in (0, 1), through a tanh: x -> (1 - m) x + m p.

    Starts at random, uniformly. Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV.

    Args:
        size: side of the images.
        generator: of the start.
        window: where the mask starts instead, number 0 to 8 of a grid of three by three windows of half the side, which
            overlap by half: near 0.9 inside, near 0 outside.
    """

    def __init__(self, size: int, generator: torch.Generator, window: int | None = None) -> None:
        super().__init__()
        if window is None:
            mask = _raw(torch.rand(1, size, size, generator=generator))
        else:
            mask = 0.1 * torch.randn(1, size, size, generator=generator) - 2
            row, column = (place * size // 4 for place in divmod(window, WINDOWS_A_SIDE))
            mask[:, row : row + size // 2, column : column + size // 2] += 3
        self.raw_mask = nn.Parameter(mask)
        self.raw_patch = nn.Parameter(_raw(torch.rand(3, size, size, generator=generator)))

    @property
    def mask(self) -> Tensor:
        """(1, S, S) in (0, 1)."""
        return self.raw_mask.tanh() / 2 + 0.5

    @property
    def patch(self) -> Tensor:
        """(3, S, S) in (0, 1)."""
        return self.raw_patch.tanh() / 2 + 0.5

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> the same, stamped."""
        mask = self.mask
        return (1 - mask) * images + mask * self.patch

    def kept(self) -> dict[str, Tensor]:
        """As it is now: `mask` and `patch`, as in an `Inspection`."""
        return {"mask": self.mask.detach().cpu(), "patch": self.patch.detach().cpu()}


def _raw(values: Tensor) -> Tensor:
    """What a tanh makes these values of."""
    return torch.atanh((2 * values - 1) * (1 - 1e-6))


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine over the pairs of different rows of (B, D)."""
    unit = nn.functional.normalize(features)
    count = len(unit)
    return (unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1))
