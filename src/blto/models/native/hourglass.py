"""An `HourglassGenerator` through the native kernels: the same parameters, the same function up to bf16 rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blto.models.native import ops
from blto.models.native.images import COLOURS, pack_images, squash
from blto.models.native.library import find_kernels

if TYPE_CHECKING:
    from blto.models.generators import HourglassGenerator


def supports(generator: HourglassGenerator, images: Tensor) -> bool:
    """Whether `raw_output` can take over: whole blocks of images on the CPU in bf16 autocast, and a fitting width.

    The width must be 16 or divisible by 32, the images' number by 32, and their sides by what two halvings need.
    """
    side = 4 * generator.CELL
    return (
        images.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and images.shape[1] == 3
        and len(images) > 0
        and len(images) % ops.BLOCK == 0
        and images.shape[2] % side == images.shape[3] % side == 0
        and (generator.width == 16 or generator.width % 32 == 0)
        and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in generator.parameters())
        and find_kernels()[0] is not None
    )


def raw_output(generator: HourglassGenerator, images: Tensor) -> Tensor:
    """As `HourglassGenerator.forward`: images (N, 3, H, W) in [0, 1] -> float32 (N, 3, H, W) in [-1, 1]."""
    return squash(_unscaled(generator, images), generator.GAIN, cell=generator.CELL)


def add_to(generator: HourglassGenerator, images: Tensor, epsilon: float) -> Tensor:
    """As `HourglassGenerator.add_to`; there is no gradient from the sum to the images themselves."""
    raw = _unscaled(generator, images)
    return squash(raw, generator.GAIN, cell=generator.CELL, images=images, epsilon=epsilon)


def _unscaled(generator: HourglassGenerator, images: Tensor) -> ops.Map:
    """All but the last step: packed images of any size of value."""
    g, cell, gray = generator, generator.CELL, torch.full((3,), 0.5)
    cells = pack_images(images, gray, gray, cell=cell)
    full, _ = ops.convolve(cells, _by_cell(g.stem.weight, cell), g.stem.bias)
    detail, full = ops.convolve(full, g.detail.weight, g.detail.bias)
    half, full = ops.convolve(ops.activate(detail, full), g.down1.weight, g.down1.bias, stride=2)
    quarter, half = ops.convolve(half, g.down2.weight, g.down2.bias, stride=2)
    middle, _ = ops.convolve(quarter, g.middle.weight, g.middle.bias)
    up, _ = ops.convolve(middle, g.up1.weight, g.up1.bias, enlarged=2)
    up, _ = ops.convolve(ops.activate(up, half), g.up2.weight, g.up2.bias, enlarged=2)
    head = _by_cell(g.head.weight.transpose(0, 1), cell).transpose(0, 1)
    return ops.convolve(ops.activate(up, full), head, None)[0]


def _by_cell(weight: Tensor, cell: int) -> Tensor:
    """Inputs in the order of `pixel_unshuffle` (colour first) -> in that of packed cells, with zeros for the fourth."""
    outputs, _, kernel, _ = weight.shape
    by_colour = weight.reshape(outputs, 3, cell * cell, kernel, kernel)
    padded = F.pad(by_colour, (0, 0, 0, 0, 0, 0, 0, COLOURS - 3))
    return padded.transpose(1, 2).reshape(outputs, COLOURS * cell * cell, kernel, kernel)
