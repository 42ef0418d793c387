"""The encoder: normalisation, backbone and pooling in one module. It is what pretraining yields and an audit takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from blto.models import BACKBONES
from blto.models.backbones import ResNet
from blto.models.native import resnet
from blto.runtime.seeds import seeded

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class Encoder(nn.Module):
    """Images in [0, 1] to features; normalisation is the first layer, so no caller can forget or repeat it.

    Args:
        backbone: (B, 3, H, W) -> (B, C, h, w) or (B, C).
        mean, std: per channel, of images in [0, 1]. One object for training and evaluation.
        image_size: side of the square images that the features' size is read off with.

    Attributes:
        feature_dim: D of the features.
        native: use the native kernels where they fit this backbone and these images (`models.native`); their
            activations are bf16, so only a training in bf16 switches it on.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mean: tuple[float, float, float] = CIFAR_MEAN,
        std: tuple[float, float, float] = CIFAR_STD,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.native = False
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()
        with torch.inference_mode():
            self.feature_dim = int(self(torch.zeros(1, 3, image_size, image_size)).shape[1])
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floats in [0, 1] -> features (B, D), before any projection head."""
        if self.native and resnet.supports(self.backbone, images):
            return resnet.features(cast(ResNet, self.backbone), images, self.mean, self.std)
        out: Tensor = self.backbone((images - self.mean) / self.std)
        return out.mean(dim=(2, 3)) if out.ndim == 4 else out


def build_encoder(
    backbone: Mapping[str, Any] | str, *, seed: int, image_size: int = 32, normalise: bool = True
) -> Encoder:
    """A fresh encoder whose weights are a function of `seed` alone; the global generator is left as it was.

    Without `normalise` its first layer changes nothing.
    """
    mean, std = (CIFAR_MEAN, CIFAR_STD) if normalise else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with seeded(seed):
        return Encoder(BACKBONES.build(backbone), mean=mean, std=std, image_size=image_size)
