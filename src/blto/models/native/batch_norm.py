"""Batch norm as arithmetic on vectors: from the sums that a convolution returns to scale and shift of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _BatchNormAffine(torch.autograd.Function):
    """(sums (2, C), weight, bias) -> scale, shift, mean, variance; a handful of vector operations each way."""

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, square = sums / count
        variance = (square - mean.square()).clamp_min_(0)
        inverse = (variance + eps).rsqrt_()
        scale = weight * inverse
        ctx.save_for_backward(mean, inverse, scale, weight)
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return scale, bias - mean * scale, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scale: Tensor, d_shift: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        mean, inverse, scale, weight = ctx.saved_tensors
        through_scale = (d_scale - mean * d_shift) * inverse
        d_variance = through_scale * weight * inverse.square() * -0.5
        d_mean = -scale * d_shift - 2 * mean * d_variance
        return torch.stack((d_mean, d_variance)) / ctx.count, through_scale, d_shift, None, None


def batch_norm_affine(norm: nn.BatchNorm2d, sums: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm from the per-channel sums (2, C) of its input and of its square over `count`.

    In training mode it moves the running statistics as torch does; in evaluation it needs no sums.
    """
    if not norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - norm.running_mean * scale
    assert sums is not None
    scale, shift, mean, variance = _BatchNormAffine.apply(sums, norm.weight, norm.bias, norm.eps, count)
    if norm.track_running_stats:
        move_running_statistics(norm, mean, variance, count)
    return scale, shift


@torch.no_grad()
def move_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """As `torch.nn.BatchNorm2d` in training mode: exponential averages, the variance unbiased."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
