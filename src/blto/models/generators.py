"""Trigger generators: image in, raw image out; `poisoning.GeneratorTrigger` turns it into a bounded trigger.

A generator maps images (B, 3, H, W) in [0, 1] to a raw output of the same shape in [-1, 1].
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from blto.models.native import hourglass
from blto.registry import Card

GAIN = 2.0
"""Root mean square of what enters the tanh of `squash`."""


def squash(raw: Tensor, gain: float) -> Tensor:
    """(B, 3, H, W), any values -> [-1, 1]: the tanh of `gain` times each image divided by its root mean square."""
    scale = raw.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-8).rsqrt()
    return torch.tanh(gain * scale * raw)


class ResidualBlock(nn.Module):
    """Reflection-padded residual block of the ResNet generator; the sum is not followed by a ReLU."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = x + self.layers(x)
        return out


class ResNetGenerator(nn.Module):
    """The generator of the published BLTO checkpoints, by way of Naseer et al. (NeurIPS 2019, arXiv 1905.11736).

    7x7 stem, two stride-2 convolutions, residual blocks at 4x width, two transposed convolutions, 7x7 head, tanh.
    The released CIFAR-10 generator has 6 blocks at width 64 and dropout 0.5 also at 32x32.

    Args:
        blocks: residual blocks; 6 ("high") or 2 ("low") in the published code.
        width: channels after the stem.
        dropout: probability inside each residual block.
    """

    card = Card(
        "ResNet generator", "encoder-decoder with residual blocks, as in the released BLTO", "arXiv 1905.11736", 2019
    )

    def __init__(
        self,
        *,
        blocks: Annotated[int, Field(ge=1, le=16)] = 6,
        width: Annotated[int, Field(ge=4, le=256)] = 64,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__()
        w = width
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
        for inputs in (w, 2 * w):
            layers += [
                nn.Conv2d(inputs, 2 * inputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(2 * inputs),
                nn.ReLU(),
            ]
        layers += [ResidualBlock(4 * w, dropout) for _ in range(blocks)]
        for inputs in (4 * w, 2 * w):
            layers += [
                nn.ConvTranspose2d(inputs, inputs // 2, 3, stride=2, padding=1, output_padding=1, bias=False),
                nn.BatchNorm2d(inputs // 2),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [-1, 1]; H and W divisible by 4."""
        out: Tensor = self.layers(images)
        return out


class UNetGenerator(nn.Module):
    """A small U-Net for CPU work: it sees 2x2 blocks of pixels as channels, and has no batch norm and no dropout.

    Without batch norm the trigger of an image does not depend on the images beside it, nor on train or eval mode.
    Before the final tanh each image's output is divided by its root mean square: an L-infinity budget pulls every value
    to its bounds, and an output that could grow without limit would be stuck there within a few hundred steps, one
    colour on all images. Scaled, a value can come back, and about 0.7 of the budget is used on
    average. With parametrisation "image" this scale cannot propose a flat gray image; the ResNet generator can.

    Args:
        width: channels at half resolution; 2x below.
    """

    card = Card(
        "small U-Net generator", "U-Net on 2x2 blocks, cheap enough for two CPU cores", "arXiv 1505.04597", 2015
    )

    def __init__(self, *, width: Annotated[int, Field(ge=4, le=256)] = 24) -> None:
        super().__init__()
        w = width
        self.stem = nn.Conv2d(12, w, 3, padding=1)
        self.down1 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.up1 = nn.Conv2d(4 * w, 2 * w, 3, padding=1)
        self.up2 = nn.Conv2d(3 * w, w, 3, padding=1)
        self.head = nn.Conv2d(w, 12, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
        height, width = images.shape[-2:]
        if height % 2 or width % 2:  # one more row or column, and off again
            padded: Tensor = self(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"))
            return padded[..., :height, :width]
        blocks = F.pixel_unshuffle(2 * images - 1, 2).contiguous(memory_format=torch.channels_last)
        full = F.leaky_relu(self.stem(blocks), 0.1)
        half = F.leaky_relu(self.down1(full), 0.1)
        quarter = F.leaky_relu(self.down2(half), 0.1)
        quarter = F.leaky_relu(self.middle(quarter), 0.1)
        up = F.interpolate(quarter, size=half.shape[-2:], mode="nearest")
        half = F.leaky_relu(self.up1(torch.cat((up, half), dim=1)), 0.1)
        up = F.interpolate(half, size=full.shape[-2:], mode="nearest")
        full = F.leaky_relu(self.up2(torch.cat((up, full), dim=1)), 0.1)
        return squash(F.pixel_shuffle(self.head(full), 2).float(), GAIN)


class HourglassGenerator(nn.Module):
    """`UNetGenerator` rebuilt for the native kernels, a third of its cost there and nearly as good (docs/engine.md).

    As there, 2x2 blocks of pixels are channels, there is neither batch norm nor dropout, and each image's output is
    scaled before the tanh. Skips are sums and activations ReLU. `models.native.hourglass` runs the same net in bf16: a
    change here is a change there.

    Args:
        width: channels at half resolution; 2x and 4x below. 16 or divisible by 32 to be fast.

    Attributes:
        native: use the native kernels in bf16 autocast, where they fit; whoever trains it switches it on.
    """

    card = Card(
        "hourglass generator", "a U-Net with sums as skips, the cheapest generator on CPUs", "arXiv 1505.04597", 2015
    )
    CELL, GAIN = 2, GAIN
    SHRINKAGE = 0.4
    """Of the first weights, which `squash` makes good: Adam's steps are larger beside them, and training is faster."""

    def __init__(self, *, width: Annotated[int, Field(ge=4, le=256)] = 16) -> None:
        super().__init__()
        self.width, self.native = width, False
        w, inputs = width, 3 * self.CELL**2
        self.stem = nn.Conv2d(inputs, w, 3, padding=1)
        self.detail = nn.Conv2d(w, w, 3, padding=1)
        self.down1 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.up1 = nn.Conv2d(4 * w, 2 * w, 3, padding=1)
        self.up2 = nn.Conv2d(2 * w, w, 3, padding=1)
        self.head = nn.Conv2d(w, inputs, 3, padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                module.weight.data.mul_(self.SHRINKAGE)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
        if self.native and hourglass.supports(self, images):
            return hourglass.raw_output(self, images)
        height, width = images.shape[-2:]
        if height % self.CELL or width % self.CELL:  # whole blocks, and off again
            more = (0, -width % self.CELL, 0, -height % self.CELL)
            padded: Tensor = self(F.pad(images, more, mode="replicate"))
            return padded[..., :height, :width]
        full = self.stem(F.pixel_unshuffle(2 * images - 1, self.CELL).contiguous(memory_format=torch.channels_last))
        full = F.relu(full + self.detail(F.relu(full)))
        half = self.down1(full)
        quarter = F.relu(self.middle(F.relu(self.down2(F.relu(half)))))
        half = F.relu(half + self.up1(F.interpolate(quarter, size=half.shape[-2:], mode="nearest")))
        full = F.relu(full + self.up2(F.interpolate(half, size=full.shape[-2:], mode="nearest")))
        return squash(F.pixel_shuffle(self.head(full), self.CELL).float(), self.GAIN)

    def add_to(self, images: Tensor, epsilon: float) -> Tensor:
        """images + epsilon * forward(images), clipped to [0, 1]; one pass where the kernels run."""
        if self.native and hourglass.supports(self, images) and not images.requires_grad:
            return hourglass.add_to(self, images, epsilon)
        return torch.add(images, self(images), alpha=epsilon).clamp(0, 1)


def use_native(module: nn.Module, native: bool) -> None:
    """Switch the native kernels on or off in every generator in `module` that has a way through them."""
    for part in module.modules():
        if isinstance(part, HourglassGenerator):
            part.native = native
