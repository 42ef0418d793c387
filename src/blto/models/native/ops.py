"""The native kernels as differentiable operations on blocked maps (see `kernels.cpp` for the layout).

A batch norm costs nothing but arithmetic on vectors: a convolution returns, beside its output y, the per-channel sums
of y and of y squared; mean, variance, scale and shift follow from them, and the next operation applies scale, shift and
ReLU while it loads y. Its gradient comes back to the convolution as the gradients of the two sums.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blto.models.native.batch_norm import batch_norm_affine
from blto.models.native.library import kernels

BLOCK = 32
"""Images that lie side by side in a block."""

Int32 = npt.NDArray[np.int32]


def _pointer(array: Tensor | Int32 | None) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p()
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Which pixels a convolution connects.

    Attributes:
        in_pixels, out_pixels, taps: their numbers; a tap is a position in the window.
        forward: (start, tap, input pixel) by output pixel, in compressed rows.
        backward: (start, tap, output pixel) by input pixel.
        by_tap: (start, output pixel, input pixel) by tap.
        windows: the nine input pixels of each output pixel, -1 outside, where the input is images; else None.
    """

    in_pixels: int
    out_pixels: int
    taps: int
    forward: tuple[Int32, Int32, Int32]
    backward: tuple[Int32, Int32, Int32]
    by_tap: tuple[Int32, Int32, Int32]
    windows: Int32 | None


def _rows(key: Int32, count: int, *values: Int32) -> tuple[Int32, Int32, Int32]:
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(key[order], np.arange(count + 1)).astype(np.int32)
    first, second = (np.ascontiguousarray(value[order], dtype=np.int32) for value in values)
    return start, first, second


@cache
def geometry(height: int, width: int, kernel: int, stride: int, *, images: bool = False) -> Geometry:
    """The connections of a `kernel` x `kernel` convolution with padding (kernel - 1) / 2 on a map of height x width."""
    pad = (kernel - 1) // 2
    out_height, out_width = ((side + 2 * pad - kernel) // stride + 1 for side in (height, width))
    y, x, ky, kx = (axis.ravel() for axis in np.indices((out_height, out_width, kernel, kernel), dtype=np.int32))
    row, column = y * stride + ky - pad, x * stride + kx - pad
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    out_pixels = out_height * out_width
    source, target, tap = row * width + column, y * out_width + x, ky * kernel + kx
    if images:  # the windows are gathered first; what is left is a product over their 27 inputs
        every, zero = np.arange(out_pixels, dtype=np.int32), np.zeros(out_pixels, dtype=np.int32)
        table = _rows(every, out_pixels, zero, every)
        windows = np.ascontiguousarray(np.where(inside, source, -1), dtype=np.int32)
        return Geometry(height * width, out_pixels, 1, table, table, _rows(zero, 1, every, every), windows)
    source, target, tap = source[inside], target[inside], tap[inside]
    return Geometry(
        height * width,
        out_pixels,
        kernel * kernel,
        _rows(target, out_pixels, tap, source),
        _rows(source, height * width, tap, target),
        _rows(tap, kernel * kernel, target, source),
        None,
    )


def _map(blocks: int, pixels: int, channels: int) -> Tensor:
    return torch.empty((blocks, pixels, 2, channels // 2, BLOCK // 2, 2), dtype=torch.bfloat16)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, place: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks, outputs = len(x), len(weight)
        inputs = BLOCK if place.windows is not None else weight.shape[1]
        weight = weight.detach().contiguous()
        y, sums = _map(blocks, place.out_pixels, outputs), torch.empty(2, blocks, outputs)
        kernels().blto_conv_forward(
            *map(_pointer, (x, scale, shift, weight, *place.forward, place.windows)),
            *(blocks, place.in_pixels, place.out_pixels, place.taps, inputs, outputs),
            *map(_pointer, (y, sums)),
        )
        ctx.save_for_backward(x, scale, shift, weight, y)
        ctx.place, ctx.inputs = place, inputs
        ctx.set_materialize_grads(False)
        return y, sums.sum(dim=1), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_sums: Tensor, extra: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, y = ctx.saved_tensors
        place, inputs, blocks = ctx.place, ctx.inputs, len(x)
        dy, extra = dy.contiguous(), None if extra is None else extra.contiguous()
        d1, d2 = (None, None) if d_sums is None else d_sums.contiguous()
        wanted = any(ctx.needs_input_grad[:3])  # the gradients of scale and shift are by-products of dx
        dx = torch.empty_like(x) if wanted else None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[3] else None
        d_affine = torch.empty(2, blocks, inputs)
        kernels().blto_conv_backward(
            *map(_pointer, (dy, d1, d2, y, x, scale, shift, weight)),
            *map(_pointer, (*place.backward, *place.by_tap, place.windows)),
            *(blocks, place.in_pixels, place.out_pixels, place.taps, inputs, len(weight)),
            *map(_pointer, (extra, dx, d_affine, dw)),
        )
        d_scale, d_shift = d_affine.sum(dim=1) if scale is not None and wanted else (None, None)
        return dx, d_scale, d_shift, dw, None


class _PackImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
        count, _, height, width = images.shape
        images = images.float().contiguous(memory_format=torch.channels_last)
        y = _map(count // BLOCK, height * width, 4)
        kernels().blto_pack_images(
            *map(_pointer, (images, mean, inverse_std)), count // BLOCK, height * width, _pointer(y)
        )
        ctx.save_for_backward(inverse_std)
        ctx.shape = images.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_std,) = ctx.saved_tensors
        out, dy = torch.empty(ctx.shape, memory_format=torch.channels_last), dy.contiguous()
        blocks, pixels = dy.shape[:2]
        kernels().blto_pack_images_backward(*map(_pointer, (dy, inverse_std)), blocks, pixels, _pointer(out))
        return out, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        scale_r: Tensor | None,
        shift_r: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(y)
        kernels().blto_merge_forward(
            *map(_pointer, (y, scale, shift, residual, scale_r, shift_r)), *_shape(y), _pointer(out)
        )
        ctx.save_for_backward(out, y, scale, residual, scale_r)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, y, scale, residual, scale_r = ctx.saved_tensors
        dout = dout.contiguous()
        dy, dr = torch.empty_like(y), None if residual is None else torch.empty_like(y)
        blocks, pixels, channels = _shape(y)
        sums = torch.empty(3, blocks, channels)
        kernels().blto_merge_backward(
            *map(_pointer, (dout, out, y, scale, residual, scale_r)),
            blocks,
            pixels,
            channels,
            *map(_pointer, (dy, dr, sums)),
        )
        d_scale, d_scale_r, d_shift = sums.sum(dim=1)
        return dy, d_scale, d_shift, dr, *((None, None) if scale_r is None else (d_scale_r, d_shift))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        blocks, pixels, channels = _shape(x)
        out = torch.empty(blocks * BLOCK, channels)
        kernels().blto_pool_forward(_pointer(x), blocks, pixels, channels, _pointer(out))
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dx = torch.empty(ctx.shape, dtype=torch.bfloat16)
        dout = dout.float().contiguous()  # named, so that it outlives the call
        kernels().blto_pool_backward(_pointer(dout), *_shape(dx), _pointer(dx))
        return dx


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Blocks, pixels, channels."""
    return x.shape[0], x.shape[1], 2 * x.shape[3]


@dataclass(frozen=True, eq=False)
class Map:
    """A blocked map: values y (bf16) and, where its batch norm is still to be applied, the scale and shift of it."""

    y: Tensor
    height: int
    width: int
    scale: Tensor | None = None
    shift: Tensor | None = None


def pack_images(images: Tensor, mean: Tensor, std: Tensor) -> Map:
    """Float images (N, 3, H, W) in [0, 1], N divisible by 32 -> a normalised blocked map of images."""
    y = _PackImages.apply(images, mean.contiguous(), (1 / std).contiguous())
    return Map(y, images.shape[2], images.shape[3])


def convolve_normalise(
    x: Map, convolution: nn.Conv2d, norm: nn.BatchNorm2d, *, images: bool = False
) -> tuple[Map, Map]:
    """Batch norm of a convolution of x (activated on load where x has a scale); the norm and ReLU are left to do."""
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    place = geometry(x.height, x.width, kernel, stride, images=images)
    y, sums, same = _Convolution.apply(x.y, x.scale, x.shift, convolution.weight, place)
    scale, shift = batch_norm_affine(norm, sums, len(y) * BLOCK * place.out_pixels)
    made = Map(y, -(-x.height // stride), -(-x.width // stride), scale, shift)
    return made, replace(x, y=same)


def activate(x: Map, residual: Map | None = None) -> Map:
    """relu(norm(x) + residual), written to memory; the residual's own norm, where it has one, is applied too."""
    assert x.scale is not None
    assert x.shift is not None
    rest = (None, None, None) if residual is None else (residual.y, residual.scale, residual.shift)
    return Map(_Merge.apply(x.y, x.scale, x.shift, *rest), x.height, x.width)


def pool(x: Map) -> Tensor:
    """The mean over pixels, float32 (N, C)."""
    features: Tensor = _Pool.apply(x.y)
    return features
