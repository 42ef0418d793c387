"""Images in and out of the kernels' layout: packed with their normalisation, and made by a generator's last step."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blto.models.native.library import kernels
from blto.models.native.ops import BLOCK, Map, empty_map, pointer

COLOURS = 4
"""Channels of a packed pixel: the three colours, and one that is always 0."""


class _PackImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, mean: Tensor, inverse_std: Tensor, cell: int) -> Tensor:
        count, _, height, width = images.shape
        images, planar = _dense(images)
        ctx.sizes = count // BLOCK, height * width, width, cell, planar
        y = empty_map(count // BLOCK, height * width // cell**2, COLOURS * cell**2)
        kernels().blto_pack_images(*map(pointer, (images, mean, inverse_std)), *ctx.sizes, pointer(y))
        ctx.save_for_backward(inverse_std)
        ctx.like = torch.empty_like(images, device="meta")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_std,) = ctx.saved_tensors
        out, dy = torch.empty_like(ctx.like, device="cpu"), dy.contiguous()
        kernels().blto_pack_images_backward(*map(pointer, (dy, inverse_std)), *ctx.sizes, pointer(out))
        return out, None, None, None


class _Squash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gain: float, height: int, width: int, cell: int, images: Tensor | None, epsilon: float
    ) -> Tensor:
        out, ctx.sizes = torch.empty(len(y) * BLOCK, 3, height, width), (len(y), height * width, width, cell)
        ctx.scales, ctx.is_added = (ctypes.c_float(gain), ctypes.c_float(epsilon)), images is not None
        inverse_rms = torch.empty(len(out))
        images = None if images is None else images.float().contiguous()  # named, so that it outlives the call
        kernels().blto_squash_forward(
            *(pointer(y), ctx.scales[0], *ctx.sizes, True, pointer(images), ctx.scales[1]),
            *map(pointer, (out, inverse_rms)),
        )
        ctx.save_for_backward(y, inverse_rms, out if ctx.is_added else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, inverse_rms, clipped = ctx.saved_tensors
        dout, planar = (dout.float().contiguous(), True) if ctx.is_added else _dense(dout)
        dy = torch.empty_like(y)
        kernels().blto_squash_backward(
            *map(pointer, (dout, clipped, y, inverse_rms)), *ctx.scales, *ctx.sizes, planar, pointer(dy)
        )
        return dy, *[None] * 6


def _dense(images: Tensor) -> tuple[Tensor, bool]:
    """Float32 without gaps, and whether by colour plane; else by pixel (channels-last)."""
    images = images.float()
    planar = images.is_contiguous()
    return (images if planar else images.contiguous(memory_format=torch.channels_last)), planar


def pack_images(images: Tensor, mean: Tensor, std: Tensor, *, cell: int = 1) -> Map:
    """Float images (N, 3, H, W) in [0, 1], N divisible by 32 -> a normalised blocked map (N, 4 cell^2, H/cell, W/cell).

    A cell of `cell` x `cell` pixels becomes one pixel of the map: channel 4 (cell i + j) + c holds colour c of its
    pixel (i, j), and every fourth channel is 0. H W is divisible by 16, H and W by `cell`.
    """
    y = _PackImages.apply(images, mean.contiguous(), (1 / std).contiguous(), cell)
    return Map(y, images.shape[2] // cell, images.shape[3] // cell)


def squash(raw: Map, gain: float, *, cell: int = 1, images: Tensor | None = None, epsilon: float = 1.0) -> Tensor:
    """t = tanh(gain r / rms(r)), float32 (N, 3, H, W), of packed images r; the root mean square is each image's own.

    Where float `images` (N, 3, H, W) are given, images + epsilon t, clipped to [0, 1]; they get no gradient.
    """
    out: Tensor = _Squash.apply(raw.y, gain, raw.height * cell, raw.width * cell, cell, images, epsilon)
    return out
