"""Names that other libraries give to the tensors of the same architecture, and what their nets do otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from blto.models.backbones import ResNet
from blto.models.encoder import Encoder

Spelling = Callable[[str], str]

NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Of the layers of torchvision's ResNets, in order, those that have weights."""

AS_THEY_ARE = "as they are"
EFFICIENTNET_PYTORCH = "as EfficientNet-PyTorch has them"
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
GATE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
WITH_EXPANSION = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    **GATE,
}
WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **GATE}
"""EfficientNet-PyTorch's names of layers to timm's: outside of blocks, and in the two kinds of blocks."""
EPS = 1e-3
"""Of batch norm in EfficientNet-PyTorch."""


def spellings_of(encoder: Encoder) -> dict[str, Spelling]:
    """How names may be spelled: as they are, as another library has them, or by their numbers in an `nn.Sequential`."""
    backbone = encoder.backbone
    names = list(backbone.state_dict())
    if "conv_stem.weight" in names:  # timm's EfficientNets and their kin
        return {AS_THEY_ARE: str, EFFICIENTNET_PYTORCH: _from_efficientnet_pytorch(names)}
    if not isinstance(backbone, ResNet):
        return {AS_THEY_ARE: str, "as a sequence of torchvision's layers": _from_numbers}
    own = _from_torchvision(backbone)

    def numbered(name: str) -> str:
        named = _from_numbers(name)
        return name if named == name else own(named)

    return {AS_THEY_ARE: str, "as torchvision has them": own, "as a sequence of torchvision's layers": numbered}


def _from_numbers(name: str) -> str:
    """`0.weight` is `conv1.weight`, `1.bias` is `bn1.bias`, `5.0.conv1.weight` is `layer2.0.conv1.weight`."""
    head, _, rest = name.partition(".")
    return f"{NUMBERED[head]}.{rest}" if head in NUMBERED else name


def _from_torchvision(backbone: ResNet) -> Spelling:
    """torchvision's name of a tensor of a basic-block ResNet to the name that blto's has for it."""
    counts = backbone.blocks

    def respelled(name: str) -> str:
        if match := re.fullmatch(r"(conv1|bn1)\.(.+)", name):
            return f"stem.{0 if match[1] == 'conv1' else 1}.{match[2]}"
        if match := re.fullmatch(r"layer(\d)\.(\d)\.(.+)", name):
            stage, block = int(match[1]) - 1, int(match[2])
            if not 0 <= stage < len(counts) or block >= counts[stage]:
                return name
            return f"stages.{sum(counts[:stage]) + block}.{match[3].replace('downsample', 'shortcut')}"
        return name

    return respelled


def _from_efficientnet_pytorch(own: Sequence[str]) -> Spelling:
    """EfficientNet-PyTorch's name of a tensor to timm's: there blocks have one number, here one in each stage.

    Args:
        own: timm's names, in order.
    """
    blocks = list(dict.fromkeys(match[0] for name in own if (match := re.match(r"blocks\.\d+\.\d+\.", name))))
    names = set(own)

    def respelled(name: str) -> str:
        if match := re.fullmatch(r"_blocks\.(0|[1-9]\d{0,3})\.(\w+)\.(\w+)", name):
            number = int(match[1])
            if number >= len(blocks):
                return name
            kind = WITH_EXPANSION if f"{blocks[number]}conv_pwl.weight" in names else WITHOUT_EXPANSION
            return f"{blocks[number]}{kind[match[2]]}.{match[3]}" if match[2] in kind else name
        layer, _, rest = name.partition(".")
        return f"{OUTER[layer]}.{rest}" if layer in OUTER else name

    return respelled


def difference(spelling: str, encoder: Encoder, arch: str) -> str:
    """How the net that wrote such names computes otherwise, as far as that is known: a sentence, or "".

    Args:
        spelling: one of `spellings_of`.
        encoder: that has been filled with the tensors.
        arch: its name, for the sentence.
    """
    if spelling != EFFICIENTNET_PYTORCH:
        return ""
    parts = list(encoder.backbone.modules())
    others = sorted({part.eps for part in parts if isinstance(part, nn.BatchNorm2d)} - {EPS})
    strided = [type(part).__name__ for part in parts if isinstance(part, nn.Conv2d) and max(part.stride) > 1]
    evenly = len(strided) - strided.count("Conv2dSame")
    found = [f"a batch norm eps of {eps:g} in place of {EPS:g}" for eps in others]
    if evenly:
        found.append(f"strided convolutions ({evenly}) that pad all sides alike, where TensorFlow's do not")
    if not found:
        return ""
    advice = f" Give {_as_tensorflow(arch)} instead." if _as_tensorflow(arch) else ""
    return f"{arch} is not the function that these weights were trained in: it has {' and '.join(found)}.{advice}"


def _as_tensorflow(arch: str) -> str:
    """timm's name of the same architecture with the padding and eps of TensorFlow, or ""."""
    library, _, model = arch.partition("/")
    if library != "timm":
        return ""
    import timm

    return f"timm/tf_{model}" if timm.is_model(f"tf_{model}") else ""
