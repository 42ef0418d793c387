"""Networks: the encoder (normalisation + backbone + pooling), backbones, trigger generators, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blto.registry import Component, Registry

if TYPE_CHECKING:
    from torch import nn


def _library_backbone(name: str) -> Component[nn.Module] | None:
    """Backbones named `timm/...` or `torchvision/...`."""
    library, _, model = name.partition("/")
    if library not in {"timm", "torchvision"} or not model:
        return None
    from blto.models.backbones import LibraryBackbone

    return LibraryBackbone(library, model)


BACKBONES: Registry[nn.Module] = Registry(
    "backbone",
    {
        "resnet18": "blto.models.backbones:ResNet18",
        "small_resnet": "blto.models.backbones:SmallResNet",
    },
    pattern=_library_backbone,
)

GENERATORS: Registry[nn.Module] = Registry(
    "generator",
    {
        "resnet": "blto.models.generators:ResNetGenerator",
        "unet": "blto.models.generators:UNetGenerator",
        "hourglass": "blto.models.generators:HourglassGenerator",
    },
)
