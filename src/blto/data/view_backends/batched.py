"""The back end for a GPU and for second derivatives: the fast one's formulas as batched torch operations.

Crop, resize, flip and blur are linear and separable, so each is a product with one matrix per sample and axis. Unlike
`grid_sample` this stays within the crop at its border as torchvision does, gives the image back exactly where nothing
is resampled, and has a backward pass that is deterministic on a GPU. Every sample goes through every operation, so the
shapes are the same for all batches, nothing is read on the host, and `torch.compile` makes a few kernels of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blto.data.view_backends.fast import CONTRAST, HUE, SATURATION

Array = np.ndarray[Any, Any]
COLUMNS = [4, 1, 4, 4, 1, 1, 1]
"""Of each of the arrays of `ViewParameters`, once they are packed."""


def pack(arrays: tuple[Array, ...]) -> Tensor:
    """The arrays of `ViewParameters` as one float32 (B, 16), which holds all of them exactly."""
    count = len(arrays[0])
    return torch.from_numpy(np.concatenate([array.reshape(count, -1).astype(np.float32) for array in arrays], axis=1))


def apply(images: Tensor, parameters: Tensor, *, size: int, blur_radius: int, blurs: bool) -> Tensor:
    """Views (B, 3, S, S) of float images (B, 3, H, W) in [0, 1].

    Args:
        images: float64 stays, other types become float32.
        parameters: of `pack`, on the images' device.
        size: side S of the views.
        blur_radius: half the width of the blur's kernel, in pixels.
        blurs: whether any of the samples is blurred.
    """
    kind = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        x = images.to(kind)
        height, width = x.shape[2:]
        box, flip, order, factors, gray, sigma, threshold = torch.split(parameters.to(kind), COLUMNS, dim=1)
        y, left, h, w = box.unbind(1)
        down, across = resampling(y, h, height, size), resampling(left, w, width, size)
        across = torch.where(flip[:, :, None] > 0, across.flip(1), across)
        x = jitter(separable(x, down, across), order.long(), factors)
        x = torch.where(gray[:, :, None, None] > 0, luma(x), x)
        if blurs:
            matrix = blur_matrix(sigma, blur_radius, size)
            x = separable(x, matrix, matrix)
        return torch.where(x >= threshold[:, :, None, None], 1 - x, x)


def resampling(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """(B, S, H) weights of the source pixels in each output pixel, bilinear, clamped to the crop."""
    device, kind = start.device, start.dtype
    at = (torch.arange(size, device=device, dtype=kind) + 0.5) * (length / size)[:, None] - 0.5
    place = start[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
    distance = place[:, :, None] - torch.arange(source, device=device, dtype=kind)
    return (1 - distance.abs()).clamp(min=0)


def separable(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`down @ x @ across^T` for each sample and channel."""
    return down[:, None] @ x @ across[:, None].mT


def luma(x: Tensor) -> Tensor:
    """torchvision's gray value, (B, 1, H, W)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Color jitter in each sample's own order: four rounds, in each of which every sample takes one step.

    Brightness, contrast and saturation are one blend whose other image is black, the mean gray value or the gray image;
    hue is turned for all, and kept for those whose turn it is.
    """
    for step in range(4):
        op = order[:, step : step + 1]
        factor = factors.gather(1, op)
        is_hue = op == HUE
        own = torch.where(is_hue, 1, factor)
        own, to_mean, to_gray = (
            part[:, :, None, None] for part in (own, (1 - own) * (op == CONTRAST), (1 - own) * (op == SATURATION))
        )
        gray = luma(x)
        mean = gray.mean(dim=(1, 2, 3), keepdim=True)
        x = (own * x + to_mean * mean + to_gray * gray).clamp(0, 1)
        turned = (is_hue & (factor != 0))[:, :, None, None]
        x = torch.where(turned, shift_hue(x, factor[:, :, None]), x)
    return x


def shift_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` (a fraction of the circle) at constant saturation and value of HSV.

    With value V, chroma C and hue h in sixths of the circle, a channel is `V - C clip(2 - d, 0, 1)`, where d is the
    distance on the circle from h to the channel's opposite (3, -1 and 1 for red, green and blue). Everything is kept
    multiplied by C, so nothing is divided and gray pixels (C = 0) have finite gradients.
    """
    r, g, b = x.unbind(1)
    top, bottom = x.amax(1), x.amin(1)
    chroma = top - bottom
    is_red, is_green = r == top, g == top
    within = torch.where(is_red, g - b, torch.where(is_green, b - r, r - g))
    sector = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)).to(x.dtype)
    angle = within + chroma * (sector + 6 * factor)
    channels = []
    for opposite in (3, -1, 1):
        distance = (angle - opposite * chroma).abs()
        distance = torch.minimum(distance, (distance - 6 * chroma).abs())
        drop = torch.minimum((2 * chroma - distance).clamp(min=0), chroma)
        channels.append(top - drop)
    return torch.stack(channels, dim=1).clamp(min=0)


def blur_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """(B, S, S) Gaussian blur along one axis for `sigma` (B, 1), its border reflected; the identity where it is 0."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    pixels = torch.arange(size, device=sigma.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    taken = (pixels[:, None] + offsets).abs()
    taken = torch.minimum(taken, 2 * (size - 1) - taken)
    shifts = (taken[:, :, None] == pixels).to(sigma.dtype)  # (S, K, S)
    return torch.einsum("bk,iks->bis", weights, shifts)
