"""A folded residual net through the native float32 kernels (see `inference.cpp`): uint8 images to features."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from blto.models.native.library import find_kernels, kernels
from blto.models.native.ops import BLOCK, pointer

OUTPUTS = 8
"""Output channels that a kernel sums at once: every layer's number of them is a multiple."""
MAP_LIMIT = 2**23
"""Float values of a block's largest map, 32 MiB: larger ones leave the caches, and torch is as fast."""

# G of Winograd's F(4x4, 3x3): a row of three weights becomes six (Lavin and Gray, arXiv 1509.09308, section 4).
WINOGRAD = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # times 24


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution with a bias: weight float32 (O, I, k, k), bias float32 (O,); zero padding (k - 1) / 2."""

    weight: Tensor
    bias: Tensor
    stride: int


Block = tuple[Layer, Layer, Layer | None]
"""relu(second(relu(first(x))) + shortcut(x)); without a shortcut x itself is added."""


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int32) for name in ("inputs", "outputs", "kernel", "stride", "is_transformed")),
    ]


class _Block(ctypes.Structure):
    _fields_ = [(name, _Convolution) for name in ("first", "second", "shortcut")]


class Net:
    """Weights packed once, for any number of images.

    Args:
        stem: of images minus `centre`, followed by ReLU.
        blocks: at least one, as in `Block`.
        centre: float32 (3,), in units of a pixel.
    """

    def __init__(self, stem: Layer, blocks: Sequence[Block], centre: Tensor) -> None:
        self._memory: list[Tensor] = []
        self._centre = centre.contiguous()
        self._stem = self._packed(stem)
        self._blocks = (_Block * len(blocks))(*(_Block(*map(self._packed, block)) for block in blocks))
        self.outputs = len(blocks[-1][1].bias)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 features (N, D)."""
        if images.dtype != torch.uint8 or images.device.type != "cpu" or images.shape[1] != len(self._centre):
            given = f"{images.dtype} {tuple(images.shape)} on {images.device}"
            raise ValueError(f"images are {given}; give uint8 on the CPU, of as many channels as the net was made for")
        images = images.contiguous()
        features = torch.empty(len(images), self.outputs)
        kernels().blto_folded_features(
            *(pointer(images), *images.shape, pointer(self._centre)),
            *(ctypes.byref(self._stem), self._blocks, len(self._blocks), pointer(features)),
        )
        return features

    def _packed(self, layer: Layer | None) -> _Convolution:
        if layer is None:
            return _Convolution()
        outputs, inputs, kernel, _ = layer.weight.shape
        transformed = kernel == 3 and layer.stride == 1
        by_point = _winograd(layer.weight) if transformed else layer.weight.flatten(start_dim=2)
        by_output = by_point.view(outputs // OUTPUTS, OUTPUTS, inputs, -1)
        # to (point, O / 8, I, 8) or (O / 8, tap, I, 8)
        weight = by_output.permute(3, 0, 2, 1) if transformed else by_output.permute(0, 3, 2, 1)
        kept = weight.contiguous(), layer.bias.contiguous()
        self._memory.extend(kept)  # the kernels hold addresses
        return _Convolution(*map(pointer, kept), inputs, outputs, kernel, layer.stride, transformed)


def supports(stem: Layer, blocks: Sequence[Block], height: int, width: int) -> bool:
    """Whether `Net` is to take these layers here, for images of this size: fitting widths, a processor and a library
    that run it, and maps small enough that every thread may keep three of a block's.
    """
    largest = 0
    for layer in (stem, *chain.from_iterable(block[:2] for block in blocks)):
        height, width = -(-height // layer.stride), -(-width // layer.stride)
        largest = max(largest, height * width * len(layer.bias) * BLOCK)
    layers = (stem, *(layer for block in blocks for layer in block if layer is not None))
    fitting = largest <= MAP_LIMIT and all(len(layer.bias) % OUTPUTS == 0 for layer in layers)
    return fitting and find_kernels()[0] is not None


def _winograd(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> G w G^T, (O, I, 36)."""
    g = torch.tensor(WINOGRAD, dtype=torch.float64) / 24
    return (g @ weight.double() @ g.T).float().flatten(start_dim=2)
