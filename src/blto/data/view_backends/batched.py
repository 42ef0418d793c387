"""The differentiable back end of the views: the fast one's formulas as batched torch operations.

Crop, resize, flip and blur are linear and separable, so each is a product with one matrix per sample and axis. Unlike
`grid_sample` this stays within the crop at its border as torchvision does, gives the image back exactly where nothing
is resampled, and has a backward pass that is deterministic on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blto.data.view_backends.fast import CONTRAST, HUE, SATURATION

Array = np.ndarray[Any, Any]


def apply(
    images: Tensor,
    box: Array,
    flip: Array,
    order: Array,
    factors: Array,
    gray: Array,
    blur_sigma: Array,
    solarize_threshold: Array,
    *,
    size: int,
    blur_radius: int,
) -> Tensor:
    """Views (B, 3, S, S) of float images (B, 3, H, W) in [0, 1]; the arrays are those of `ViewParameters`."""
    kind = torch.float64 if images.dtype == torch.float64 else torch.float32

    def tensor(array: Array) -> Tensor:
        return torch.tensor(array, dtype=kind, device=images.device)

    with torch.autocast(images.device.type, enabled=False):
        x = images.to(kind)
        height, width = x.shape[2:]
        down = resampling(tensor(box[:, 0]), tensor(box[:, 2]), height, size)
        across = resampling(tensor(box[:, 1]), tensor(box[:, 3]), width, size)
        across = torch.where(tensor(flip)[:, None, None] > 0, across.flip(1), across)
        x = separable(x, down, across)
        x = jitter(x, order, factors, tensor)
        x = torch.where(tensor(gray)[:, None, None, None] > 0, luma(x), x)
        blurred = np.flatnonzero(blur_sigma > 0)
        if len(blurred):
            matrix = tensor(blur_matrix(blur_sigma[blurred], blur_radius, size))
            rows = torch.tensor(blurred, device=x.device)
            x = x.index_copy(0, rows, separable(x[rows], matrix, matrix))
        return torch.where(x >= tensor(solarize_threshold)[:, None, None, None], 1 - x, x)


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


def jitter(x: Tensor, order: Array, factors: Array, tensor: Any) -> Tensor:
    """Color jitter in each sample's own order: four rounds, in each of which every sample takes one step.

    Brightness, contrast and saturation are one blend whose other image is black, the mean gray value or the gray image;
    the samples whose turn it is for hue are picked out.
    """
    for step in range(4):
        op = order[:, step]
        factor = np.take_along_axis(factors, op[:, None].astype(np.int64), axis=1)[:, 0]
        factor_blend = np.where(op == HUE, np.float32(1), factor)
        own, to_mean, to_gray = (
            tensor(part)[:, None, None, None]
            for part in (factor_blend, (1 - factor_blend) * (op == CONTRAST), (1 - factor_blend) * (op == SATURATION))
        )
        gray = luma(x)
        mean = gray.mean(dim=(1, 2, 3), keepdim=True)
        x = (own * x + to_mean * mean + to_gray * gray).clamp(0, 1)
        turned = np.flatnonzero((op == HUE) & (factor != 0))
        if len(turned):
            rows = torch.tensor(turned, device=x.device)
            x = x.index_copy(0, rows, shift_hue(x[rows], tensor(factor[turned])[:, None, None]))
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


def blur_matrix(sigma: Array, radius: int, size: int) -> Array:
    """(B, S, S) Gaussian blur along one axis, its border reflected."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma[:, None].astype(np.float64)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    taken = np.abs(np.arange(size)[:, None] + offsets)
    taken = np.minimum(taken, 2 * (size - 1) - taken)
    shifts = (taken[:, :, None] == np.arange(size)).astype(np.float64)  # (S, K, S)
    matrix: Array = np.einsum("bk,iks->bis", weights, shifts)
    return matrix
