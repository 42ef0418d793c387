"""A residual net for inference in float32 on CPUs: batch norm and normalisation folded into the convolutions."""

from __future__ import annotations

from itertools import chain
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.models.backbones import BasicBlock, ResNet, ResNet18, SmallResNet
from blto.models.encoder import Encoder
from blto.models.native import inference
from blto.models.native.inference import Block, Layer

WHITE = 255  # a uint8 image's 1.0

_Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


class FoldedEncoder:
    """A copy of an encoder in evaluation mode with its present weights, for uint8 images.

    The same function up to rounding, 1e-5 of the largest feature: batch norm in evaluation mode is a scale and a shift
    of its convolution. It runs on the native kernels where they fit, else on torch with maps channels-last.

    Args:
        encoder: for which `can_fold` holds. It is not changed, and later changes of it are not seen.
        image_size: (H, W) of the images that it will mostly get: for larger ones torch does better.
        native: False keeps it from the native kernels.

    Attributes:
        is_native: whether it runs on the native kernels.
        batch_size: images a call for which it is fastest.
    """

    @torch.inference_mode()
    def __init__(self, encoder: Encoder, *, image_size: tuple[int, int] = (32, 32), native: bool = True) -> None:
        backbone = cast(ResNet, encoder.backbone)
        self._stem = _folded_stem(_stem(backbone), encoder.std)
        self._blocks = [_folded_block(cast(BasicBlock, block)) for block in backbone.stages]
        self._centre = encoder.mean * WHITE
        self._net: inference.Net | None = None
        if native and inference.supports(self._stem, self._blocks, *image_size):
            self._net = inference.Net(self._stem, self._blocks, self._centre.flatten())
        self.is_native = self._net is not None
        self.batch_size = 2048 if self.is_native else 128  # torch keeps the maps of a whole batch, the kernels do not

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 features (B, D), without a gradient."""
        if self._net is not None:
            return self._net(images)
        centred = images.to(torch.float32, memory_format=torch.channels_last).sub_(self._centre)
        x = _convolve(self._stem, centred).relu_()
        for first, second, shortcut in self._blocks:
            inner = _convolve(second, _convolve(first, x).relu_())
            x = inner.add_(x if shortcut is None else _convolve(shortcut, x)).relu_()
        return x.mean(dim=(2, 3))


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


def _convolve(layer: Layer, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, padding=(layer.weight.shape[-1] - 1) // 2)


def _folded(layers: _Pair) -> Layer:
    """The convolution followed by the batch norm in evaluation mode, as one."""
    convolution, norm = layers
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    weight = (convolution.weight * scale.view(-1, 1, 1, 1)).float().contiguous(memory_format=torch.channels_last)
    bias = (norm.bias - norm.running_mean * scale).float()
    return Layer(weight, bias, convolution.stride[0])


def _folded_stem(layers: _Pair, std: Tensor) -> Layer:
    """The same of pixels minus their mean, in units of a pixel."""
    stem = _folded(layers)
    return Layer(stem.weight / (std * WHITE), stem.bias, stem.stride)


def _folded_block(block: BasicBlock) -> Block:
    first, second, *shortcut = map(_folded, _layers(block))
    return first, second, shortcut[0] if shortcut else None


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
        and all(
            type(block) is BasicBlock
            and type(block.shortcut) in {nn.Identity, nn.Sequential}
            and all(map(_can_join, _layers(block)))
            for block in backbone.stages
        )
        and _can_join(_stem(backbone))
    )


def _can_join(layers: tuple[nn.Module, ...]) -> bool:
    """Whether `_folded` takes these layers."""
    return (
        [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d]
        and (convolution := cast(nn.Conv2d, layers[0])).bias is None
        and convolution.groups == 1
        and convolution.kernel_size in {(1, 1), (3, 3)}
        and convolution.padding == (convolution.kernel_size[0] // 2,) * 2
        and convolution.stride in {(1, 1), (2, 2)}
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and (norm := cast(nn.BatchNorm2d, layers[1])).affine
        and norm.running_var is not None
    )
