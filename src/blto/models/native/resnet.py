"""A `ResNet` through the native kernels: the same parameters and buffers, the same function up to bf16 rounding."""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from blto.models.backbones import BasicBlock, ResNet, ResNet18, SmallResNet
from blto.models.native import ops
from blto.models.native.images import pack_images
from blto.models.native.library import find_kernels


def fits(backbone: nn.Module) -> TypeGuard[ResNet]:
    """Whether the kernels are here and the net is one for them: our own, of widths that are 16 or divisible by 32."""
    return (
        isinstance(backbone, ResNet)
        and type(backbone) in {ResNet, ResNet18, SmallResNet}  # a subclass may do something else
        and all(width == 16 or width % 32 == 0 for width in backbone.widths)
        and find_kernels()[0] is not None
    )


def supports(backbone: nn.Module, images: Tensor) -> bool:
    """Whether `features` can take over: a net that `fits` on the CPU, and whole blocks of images.

    The images' number must be divisible by 32 and their pixels by 16.
    """
    return (
        fits(backbone)
        and images.device.type == "cpu"
        and images.shape[1] == 3
        and len(images) > 0
        and len(images) % ops.BLOCK == 0
        and images.shape[2] * images.shape[3] % 16 == 0
        and all(_is_plain(tensor) for tensor in (*backbone.parameters(), *backbone.buffers()))
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether the kernels can read it: float32 on the CPU, or a counter."""
    return tensor.device.type == "cpu" and tensor.dtype in {torch.float32, torch.int64}


def features(backbone: ResNet, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise (N, 3, H, W) images in [0, 1], run the net, pool: float32 features (N, D)."""
    x = ops.activate(_normalised(pack_images(images, mean, std), backbone.stem, images=True)[0])
    for block in backbone.stages:
        x = _block(cast(BasicBlock, block), x)
    return ops.pool(x)


def _block(block: BasicBlock, x: ops.Map) -> ops.Map:
    inner, x = ops.convolve_normalise(x, block.conv1, block.bn1)
    inner, _ = ops.convolve_normalise(inner, block.conv2, block.bn2)
    if isinstance(block.shortcut, nn.Sequential):
        x, _ = _normalised(x, block.shortcut)
    return ops.activate(inner, x)


def _normalised(x: ops.Map, layers: nn.Sequential, *, images: bool = False) -> tuple[ops.Map, ops.Map]:
    """A convolution and its batch norm, as the first two of `layers`."""
    return ops.convolve_normalise(x, cast(nn.Conv2d, layers[0]), cast(nn.BatchNorm2d, layers[1]), images=images)
