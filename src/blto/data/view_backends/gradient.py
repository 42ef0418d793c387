"""The differentiable views on a CPU: the fast back end's kernels on float images, and their pullback.

Each sample is rendered step by step; the way back renders it again, keeps what every step started from, and takes the
steps' adjoints in reverse. Eight times as fast as the same formulas as batched torch operations (`batched`), which
it is tested against and which remain for other devices, float64 and second derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blto.data.view_backends.adjoints import blend_adjoint, blur_adjoint, resample_adjoint, shift_hue_adjoint
from blto.data.view_backends.fast import HUE, Array, Arrays, blend, blur, luma, shift_hue, taps
from blto.runtime.kernels import kernel, split

STEPS = 6
"""What `replay` keeps: the resampled image, it after each of four jitter steps, and it after grayscale and blur."""


@kernel(relaxed=True)
def resample(image: Array, lines: Any, columns: Any, wide: Array, work: Array) -> None:
    """Bilinear crop, resize and flip of float (3, H, W) into `work` (3, S * S)."""
    upper, lower, down = lines
    left, right, across = columns
    size = left.shape[0]
    for c in range(3):
        for y in range(upper[0], lower[size - 1] + 1):
            for i in range(size):
                a = image[c, y, left[i]]
                wide[y, i] = a + (image[c, y, right[i]] - a) * across[i]
        for j in range(size):
            for i in range(size):
                first = wide[upper[j], i]
                work[c, j * size + i] = first + (wide[lower[j], i] - first) * down[j]


@kernel(relaxed=True)
def replay(kept: Array, order: Array, factors: Array, gray: bool, sigma: float, radius: int, padded: Array) -> None:
    """All steps between resampling and solarize, from `kept[0]`; `kept[s]` (3, P) is what step s + 1 starts from."""
    size = round(math.sqrt(kept.shape[2]))
    for step in range(4):
        kept[step + 1] = kept[step]
        r, g, b = kept[step + 1, 0], kept[step + 1, 1], kept[step + 1, 2]
        op = order[step]
        if op == HUE:
            if factors[op] != np.float32(0.0):
                shift_hue(r, g, b, factors[op])
        elif factors[op] != np.float32(1.0):
            blend(r, g, b, op, factors[op])
    kept[5] = kept[4]
    if gray:
        for i in range(kept.shape[2]):
            kept[5, :, i] = luma(kept[4, 0, i], kept[4, 1, i], kept[4, 2, i])
    if sigma > 0:
        for c in range(3):
            blur(kept[5, c].reshape(size, size), sigma, radius, padded)


@kernel(relaxed=True)
def replay_adjoint(
    kept: Array, gradient: Array, order: Array, factors: Array, gray: bool, sigma: float, radius: int, padded: Array
) -> None:
    """The adjoint of `replay`, in place on `gradient` (3, P)."""
    size = round(math.sqrt(kept.shape[2]))
    if sigma > 0:
        for c in range(3):
            blur_adjoint(gradient[c].reshape(size, size), sigma, radius, padded)
    if gray:
        for i in range(gradient.shape[1]):
            g = gradient[0, i] + gradient[1, i] + gradient[2, i]
            gradient[0, i] = np.float32(0.2989) * g
            gradient[1, i] = np.float32(0.587) * g
            gradient[2, i] = np.float32(0.114) * g
    for back in range(4):
        step = 3 - back
        op = order[step]
        if op == HUE:
            if factors[op] != np.float32(0.0):
                shift_hue_adjoint(kept[step], gradient, factors[op])
        elif factors[op] != np.float32(1.0):
            blend_adjoint(kept[step], gradient, op, factors[op])


@kernel()
def scratch(height: int, area: int, radius: int) -> Any:
    """Working memory of one sample: lines and columns of the crop, rows of it, the kept steps, a padded line."""
    size = round(math.sqrt(area))
    columns = (np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32))
    lines = (np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32))
    wide = np.empty((height, size), np.float32)
    return lines, columns, wide, np.empty((STEPS, 3, area), np.float32), np.empty(size + 2 * radius, np.float32)


@kernel(relaxed=True)
def play(image: Array, b: int, parameters: Arrays, radius: int, memory: Any) -> None:
    """Everything up to solarize for one sample; the steps are in `memory`."""
    boxes, flips, orders, factors, grays, sigmas, _ = parameters
    lines, columns, wide, kept, padded = memory
    taps(boxes[b, 1], boxes[b, 3], flips[b], columns[0], columns[1], columns[2])
    taps(boxes[b, 0], boxes[b, 2], False, lines[0], lines[1], lines[2])
    resample(image, lines, columns, wide, kept[0])
    replay(kept, orders[b], factors[b], grays[b], sigmas[b], radius, padded)


@kernel(relaxed=True)
def render(images: Array, parameters: Arrays, radius: int, out: Array, start: int, stop: int) -> None:
    """Views `start` to `stop` of float images (B, 3, H, W) into `out` (B, 3, S * S)."""
    memory = scratch(images.shape[2], out.shape[2], radius)
    last, thresholds = memory[3][STEPS - 1], parameters[6]
    for b in range(start, stop):
        play(images[b], b, parameters, radius, memory)
        for c in range(3):
            for i in range(out.shape[2]):
                value = last[c, i]
                out[b, c, i] = np.float32(1.0) - value if value >= thresholds[b] else value


@kernel(relaxed=True)
def pull_back(
    images: Array, parameters: Arrays, radius: int, gradients: Array, out: Array, start: int, stop: int
) -> None:
    """Add the pullback of `gradients` (B, 3, S * S), which is worked on, to `out` (B, 3, H, W)."""
    memory = scratch(images.shape[2], gradients.shape[2], radius)
    lines, columns, wide, kept, padded = memory
    last, (_, _, orders, factors, grays, sigmas, thresholds) = kept[STEPS - 1], parameters
    for b in range(start, stop):
        play(images[b], b, parameters, radius, memory)
        gradient = gradients[b]
        for c in range(3):
            for i in range(gradient.shape[1]):
                if last[c, i] >= thresholds[b]:
                    gradient[c, i] = -gradient[c, i]
        replay_adjoint(kept, gradient, orders[b], factors[b], grays[b], sigmas[b], radius, padded)
        resample_adjoint(gradient, lines, columns, wide, out[b])


class RenderFloat(torch.autograd.Function):
    """Views (B, 3, S, S) of float32 images (B, 3, H, W) in [0, 1] on the CPU; the pullback is differentiable once."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, parameters: Arrays, size: int, radius: int) -> Tensor:
        """Render."""
        images = images.detach().contiguous()
        ctx.save_for_backward(images)
        ctx.parameters, ctx.radius = parameters, radius
        out = np.empty((len(images), 3, size * size), np.float32)
        split(render, len(images), images.numpy(), parameters, radius, out)
        return torch.from_numpy(out).view(len(images), 3, size, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The pullback."""
        (images,) = ctx.saved_tensors
        out = np.zeros(tuple(images.shape), np.float32)
        gradients = np.array(gradient.flatten(2).numpy(), dtype=np.float32, order="C")  # a copy: it is worked on
        split(pull_back, len(images), images.numpy(), ctx.parameters, ctx.radius, gradients, out)
        return torch.from_numpy(out), None, None, None
