"""The native kernels as differentiable operations on blocked maps (see `kernels.cpp` for the layout).

A batch norm costs nothing but arithmetic on vectors: a convolution returns, beside its output y, the per-channel sums
of y and of y squared; mean, variance, scale and shift follow from them, and the next operation applies scale, shift and
ReLU while it loads y. Its gradient comes back to the convolution as the gradients of the two sums.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, cached_property
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


def pointer(array: Tensor | Int32 | None) -> ctypes.c_void_p:
    """Of the values of a contiguous array; null for None."""
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

    @cached_property
    def pointers(self) -> tuple[list[ctypes.c_void_p], list[ctypes.c_void_p]]:
        """Of the tables that a convolution and its backward pass take: numpy needs longer for one than a small call."""
        ahead, back = self.forward, (*self.backward, *self.by_tap)
        return [pointer(table) for table in (*ahead, self.windows)], [pointer(table) for table in (*back, self.windows)]


def _rows(key: Int32, count: int, *values: Int32) -> tuple[Int32, Int32, Int32]:
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(key[order], np.arange(count + 1)).astype(np.int32)
    first, second = (np.ascontiguousarray(value[order], dtype=np.int32) for value in values)
    return start, first, second


@cache
def geometry(height: int, width: int, kernel: int, stride: int, *, images: bool = False, enlarged: int = 1) -> Geometry:
    """The connections of a `kernel` x `kernel` convolution with padding (kernel - 1) / 2 on a map of height x width.

    It sees the map `enlarged` times, each pixel repeated; that larger map is never made.
    """
    pad, in_pixels, in_width = (kernel - 1) // 2, height * width, width
    height, width = enlarged * height, enlarged * width
    out_height, out_width = ((side + 2 * pad - kernel) // stride + 1 for side in (height, width))
    y, x, ky, kx = (axis.ravel() for axis in np.indices((out_height, out_width, kernel, kernel), dtype=np.int32))
    row, column = y * stride + ky - pad, x * stride + kx - pad
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    out_pixels = out_height * out_width
    source, target = row // enlarged * in_width + column // enlarged, y * out_width + x
    tap = ky * kernel + kx
    if images:  # the windows are gathered first; what is left is a product over their 27 inputs
        every, zero = np.arange(out_pixels, dtype=np.int32), np.zeros(out_pixels, dtype=np.int32)
        table = _rows(every, out_pixels, zero, every)
        windows = np.ascontiguousarray(np.where(inside, source, -1), dtype=np.int32)
        return Geometry(in_pixels, out_pixels, 1, table, table, _rows(zero, 1, every, every), windows)
    source, target, tap = source[inside], target[inside], tap[inside]
    return Geometry(
        in_pixels,
        out_pixels,
        kernel * kernel,
        _rows(target, out_pixels, tap, source),
        _rows(source, in_pixels, tap, target),
        _rows(tap, kernel * kernel, target, source),
        None,
    )


def empty_map(blocks: int, pixels: int, channels: int) -> Tensor:
    """Of so many blocks of images."""
    return torch.empty((blocks, pixels, 2, channels // 2, BLOCK // 2, 2), dtype=torch.bfloat16)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        place: Geometry,
        summed: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        blocks, outputs = len(x), len(weight)
        inputs = BLOCK if place.windows is not None else weight.shape[1]
        weight = weight.detach().contiguous()
        y = empty_map(blocks, place.out_pixels, outputs)
        sums = torch.empty(2, blocks, outputs) if summed else None
        kernels().blto_conv_forward(
            *map(pointer, (x, scale, shift, weight)),
            *place.pointers[0],
            *(blocks, place.in_pixels, place.out_pixels, place.taps, inputs, outputs),
            *map(pointer, (y, sums)),
        )
        ctx.save_for_backward(x, scale, shift, weight, y)
        ctx.place, ctx.inputs = place, inputs
        ctx.set_materialize_grads(False)
        return y, None if sums is None else sums.sum(dim=1), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_sums: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, y = ctx.saved_tensors
        place, inputs, blocks = ctx.place, ctx.inputs, len(x)
        dy, extra = dy.contiguous(), None if extra is None else extra.contiguous()
        d1, d2 = (None, None) if d_sums is None else d_sums.contiguous()
        affine = scale is not None and any(ctx.needs_input_grad[1:3])
        wanted = ctx.needs_input_grad[0] or affine  # the gradients of scale and shift are by-products of dx
        dx = torch.empty_like(x) if wanted else None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[3] else None
        d_affine = torch.empty(2, blocks, inputs) if affine else None
        kernels().blto_conv_backward(
            *map(pointer, (dy, d1, d2, y, x, scale, shift, weight)),
            *place.pointers[1],
            *(blocks, place.in_pixels, place.out_pixels, place.taps, inputs, len(weight)),
            *map(pointer, (extra, dx, d_affine, dw)),
        )
        d_scale, d_shift = (None, None) if d_affine is None else d_affine.sum(dim=1)
        return dx, d_scale, d_shift, dw, None, None


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
            *map(pointer, (y, scale, shift, residual, scale_r, shift_r)), *_shape(y), pointer(out)
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
        sums = torch.empty(3, blocks, channels) if any(ctx.needs_input_grad[at] for at in (1, 2, 4, 5)) else None
        kernels().blto_merge_backward(
            *map(pointer, (dout, out, y, scale, residual, scale_r)),
            blocks,
            pixels,
            channels,
            *map(pointer, (dy, dr, sums)),
        )
        d_scale, d_scale_r, d_shift = (None, None, None) if sums is None else sums.sum(dim=1)
        return dy, d_scale, d_shift, dr, *((None, None) if scale_r is None else (d_scale_r, d_shift))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        blocks, pixels, channels = _shape(x)
        out = torch.empty(blocks * BLOCK, channels)
        kernels().blto_pool_forward(pointer(x), blocks, pixels, channels, pointer(out))
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dx = torch.empty(ctx.shape, dtype=torch.bfloat16)
        dout = dout.float().contiguous()  # named, so that it outlives the call
        kernels().blto_pool_backward(pointer(dout), *_shape(dx), pointer(dx))
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


def convolve_normalise(
    x: Map, convolution: nn.Conv2d, norm: nn.BatchNorm2d, *, images: bool = False
) -> tuple[Map, Map]:
    """Batch norm of a convolution of x (activated on load where x has a scale); the norm and ReLU are left to do."""
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    place = geometry(x.height, x.width, kernel, stride, images=images)
    y, sums, same = _Convolution.apply(x.y, x.scale, x.shift, convolution.weight, place, norm.training)
    scale, shift = batch_norm_affine(norm, sums, len(y) * BLOCK * place.out_pixels)
    made = Map(y, -(-x.height // stride), -(-x.width // stride), scale, shift)
    return made, replace(x, y=same)


def convolve(x: Map, weight: Tensor, bias: Tensor | None, *, stride: int = 1, enlarged: int = 1) -> tuple[Map, Map]:
    """A convolution of x (see `convolve_normalise`) with an odd square kernel; bias and ReLU are left to do.

    Args:
        weight: (outputs, inputs, kernel, kernel), both numbers 16 or divisible by 32.
        bias: (outputs,), or None: then nothing is left to do.
        stride, enlarged: as in `geometry`.
    """
    place = geometry(x.height, x.width, weight.shape[2], stride, enlarged=enlarged)
    y, _, same = _Convolution.apply(x.y, x.scale, x.shift, weight, place, False)
    scale = None if bias is None else torch.ones_like(bias)
    height, width = (-(-enlarged * side // stride) for side in (x.height, x.width))
    return Map(y, height, width, scale, bias), replace(x, y=same)


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
