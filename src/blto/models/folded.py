"""A residual net for inference in float32 on CPUs: batch norm and normalisation folded into the convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.models.backbones import BasicBlock, ResNet, ResNet18, SmallResNet
from blto.models.encoder import Encoder

WHITE = 255  # a uint8 image's 1.0
PADDING = 1  # of the stem

_Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


class FoldedEncoder:
    """A copy of an encoder in evaluation mode with its present weights, for uint8 images.

    The same function up to rounding, 1e-5 of the largest feature: batch norm in evaluation mode is a scale and a shift
    of its convolution, and the image's border is padded with the mean, which is 0 once normalised. Maps lie
    channels-last, and ReLU and the residual sum are taken in place.

    Args:
        encoder: for which `can_fold` holds. It is not changed, and later changes of it are not seen.
    """

    @torch.inference_mode()
    def __init__(self, encoder: Encoder) -> None:
        backbone = cast(ResNet, encoder.backbone)
        self._stem = _folded_stem(_stem(backbone), encoder.mean, encoder.std)
        self._blocks = [[_fold(layers) for layers in _layers(cast(BasicBlock, block))] for block in backbone.stages]
        self._border = encoder.mean * WHITE
        self._padded = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 features (B, D), without a gradient."""
        x = self._stem(self._pad(images)).relu_()
        for first, second, *shortcut in self._blocks:
            inner = second(first(x).relu_())
            x = inner.add_(shortcut[0](x) if shortcut else x).relu_()
        return x.mean(dim=(2, 3))

    def _pad(self, images: Tensor) -> Tensor:
        """The images as floats, channels-last, in a frame of the mean; the memory is used again by the next call."""
        count, channels, height, width = images.shape
        shape = (channels, height + 2 * PADDING, width + 2 * PADDING)
        if len(self._padded) < count or self._padded.shape[1:] != shape:
            self._padded = self._border.expand(count, *shape).contiguous(memory_format=torch.channels_last)
        padded = self._padded[:count]
        padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
        return padded


def can_fold(encoder: nn.Module) -> TypeGuard[Encoder]:
    """Whether `FoldedEncoder` takes it: an `Encoder` in float32 on the CPU, its backbone a residual net as we build it.

    Layers that were exchanged or carry hooks, and an encoder that is to use the native kernels, are left to torch.
    """
    return (
        type(encoder) is Encoder
        and not encoder.native
        and _is_plain(encoder.backbone)
        and all(tensor.device.type == "cpu" for tensor in chain(encoder.parameters(), encoder.buffers()))
        and all(tensor.dtype == torch.float32 for tensor in encoder.parameters())
        and not any(part._forward_hooks or part._forward_pre_hooks for part in encoder.modules())
    )


@dataclass(frozen=True, eq=False)
class _Convolution:
    """A convolution with a bias: weight (O, I, h, w), channels-last; bias (O,)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def _fold(layers: _Pair) -> _Convolution:
    """The convolution followed by the batch norm in evaluation mode, as one."""
    convolution, norm = layers
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    weight = (convolution.weight * scale.view(-1, 1, 1, 1)).float().contiguous(memory_format=torch.channels_last)
    bias = (norm.bias - norm.running_mean * scale).float()
    return _Convolution(weight, bias, convolution.stride, convolution.padding)


def _folded_stem(layers: _Pair, mean: Tensor, std: Tensor) -> _Convolution:
    """The same after (pixel / 255 - mean) / std, for pixels that are padded already."""
    stem = _fold(layers)
    weight = stem.weight / std
    bias = stem.bias - (weight * mean).sum(dim=(1, 2, 3))
    return _Convolution(weight / WHITE, bias, stem.stride, (0, 0))


def _stem(backbone: ResNet) -> _Pair:
    return cast(_Pair, tuple(backbone.stem)[:2])


def _layers(block: BasicBlock) -> list[_Pair]:
    """First, second and, where there is one, shortcut: each a convolution and its batch norm."""
    shortcut = [tuple(block.shortcut)] if isinstance(block.shortcut, nn.Sequential) else []
    return cast(list[_Pair], [(block.conv1, block.bn1), (block.conv2, block.bn2), *shortcut])


def _is_plain(backbone: nn.Module) -> bool:
    """Whether it has the layers that `ResNet` gives it, whatever their sizes."""
    return (
        isinstance(backbone, ResNet)
        and type(backbone) in {ResNet, ResNet18, SmallResNet}  # a subclass may do something else
        and [type(layer) for layer in backbone.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        and cast(nn.Conv2d, backbone.stem[0]).padding == (PADDING, PADDING)
        and all(
            type(block) is BasicBlock
            and type(block.shortcut) in {nn.Identity, nn.Sequential}
            and all(map(_can_join, _layers(block)))
            for block in backbone.stages
        )
        and _can_join(_stem(backbone))
    )


def _can_join(layers: tuple[nn.Module, ...]) -> bool:
    """Whether `_fold` takes these layers."""
    return (
        [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d]
        and (convolution := cast(nn.Conv2d, layers[0])).bias is None
        and convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and (norm := cast(nn.BatchNorm2d, layers[1])).affine
        and norm.running_var is not None
    )
