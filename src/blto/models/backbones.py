"""Backbones: networks without normalisation, pooling or head. Each maps (B, 3, H, W) to (B, C, h, w) or (B, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from blto.errors import ConfigError, nearest
from blto.registry import Card

Width = Annotated[int, Field(ge=4, le=2048)]
Blocks = Annotated[int, Field(ge=1, le=8)]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection (He et al., CVPR 2016, arXiv 1512.03385, Figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual net with a 3x3 stem: stage s has `blocks[s]` basic blocks of `widths[s]` channels.

    Every stage after the first halves the map; the stem halves it too where `stem_stride` is 2.
    `models.native.resnet` runs the same net through its own kernels: a change here is a change there.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], stem_stride: int) -> None:
        super().__init__()
        self.blocks, self.widths = tuple(blocks), tuple(widths)
        self.stem = nn.Sequential(_conv3x3(3, widths[0], stem_stride), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                stages.append(BasicBlock(inputs, width, 2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, widths[-1], h, w)."""
        out: Tensor = self.stages(self.stem(x))
        return out


class ResNet18(ResNet):
    """ResNet-18 with the CIFAR stem (3x3, stride 1, no max-pooling), at any width.

    Source: He et al., arXiv 1512.03385; the stem as in Chen et al. (SimCLR), arXiv 2002.05709, appendix B.9.

    Args:
        width: channels of the first stage; the paper's net has 64.
    """

    card = Card("ResNet-18", "ResNet-18 with the CIFAR stem, at any width", "arXiv 1512.03385", 2016)

    def __init__(self, *, width: Annotated[int, Field(ge=4, le=512)] = 64) -> None:
        super().__init__((2, 2, 2, 2), (width, 2 * width, 4 * width, 8 * width), stem_stride=1)


class SmallResNet(ResNet):
    """A residual net for two CPU cores: few blocks, early downsampling.

    Widths of 16 or divisible by 32 run on the native kernels.

    Args:
        width: channels of the first of three stages; then 2x and 4x.
        widths: channels of every stage, two to five of them, in place of `width`.
        blocks: basic blocks a stage, one number for all or one for each.
        stem_stride: 2 halves the map at once (16x16 for 32x32 images), 1 keeps it.

    Raises:
        ConfigError: `blocks` and the widths differ in number.
    """

    card = Card("small ResNet", "residual net of few blocks for work on CPUs")

    def __init__(
        self,
        *,
        width: Annotated[int, Field(ge=4, le=512)] = 32,
        widths: Annotated[tuple[Width, ...], Field(min_length=2, max_length=5)] | None = None,
        blocks: Blocks | tuple[Blocks, ...] = 1,
        stem_stride: Annotated[int, Field(ge=1, le=2)] = 2,
    ) -> None:
        channels = widths or (width, 2 * width, 4 * width)
        counts = blocks if isinstance(blocks, tuple) else (blocks,) * len(channels)
        if len(counts) != len(channels):
            raise ConfigError(
                f"backbone.blocks: {len(counts)} numbers for {len(channels)} stages; give one for each, or one for all."
            )
        super().__init__(counts, channels, stem_stride)


class LibraryBackbone:
    """A network of timm or torchvision by name, its classifier removed and randomly initialised.

    Raises:
        ConfigError: a name that the library does not know.
    """

    def __init__(self, library: str, model: str) -> None:
        if model not in (known := _models(library)):
            raise ConfigError(f'unknown {library} model "{model}"; {_close(model, known)}')
        self.card = Card(model, f"{model} as built by {library}, without its classifier")
        self._library, self._model = library, model

    def __call__(self) -> nn.Module:
        """Build the network. Raises ConfigError for one whose classifier is not known."""
        if self._library == "timm":
            import timm

            network: nn.Module = timm.create_model(self._model, pretrained=False, num_classes=0)
            return network
        from torchvision import models

        network = models.get_model(self._model, weights=None)
        for head in ("fc", "classifier", "heads", "head"):
            if hasattr(network, head):
                setattr(network, head, nn.Identity())
                return network
        raise ConfigError(f'torchvision model "{self._model}" has no known classifier to remove; use its timm twin.')


def _models(library: str) -> list[str]:
    """Every name that the library knows."""
    if library == "timm":
        import timm

        return list(timm.list_models())
    from torchvision import models

    return list(models.list_models(models))


def _close(name: str, known: list[str]) -> str:
    """The nearest names only: these libraries know a thousand."""
    return nearest(name, known).partition(" Known:")[0].strip() or "see the library's list of models."
