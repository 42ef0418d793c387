"""The folded net against the plain one, with batch statistics that are not those of a fresh net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blto.models.backbones import SmallResNet
from blto.models.encoder import Encoder, build_encoder
from blto.models.folded import FoldedEncoder, can_fold
from blto.models.native.library import find_kernels

NETS: list[dict[str, Any]] = [
    {"name": "small_resnet", "width": 8},
    {"name": "small_resnet", "widths": (4, 12), "blocks": 2, "stem_stride": 1},
    {"name": "small_resnet", "widths": (16, 40), "blocks": 2, "stem_stride": 1},
    {"name": "resnet18", "width": 4},
    {"name": "resnet18", "width": 16},
]


def trained(backbone: dict[str, Any]) -> Encoder:
    """An encoder whose every batch norm scales and shifts."""
    encoder = build_encoder(backbone, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            for tensor in (part.weight.data, part.running_var):
                tensor.uniform_(0.3, 2, generator=generator)
            for tensor in (part.bias.data, part.running_mean):
                tensor.normal_(0, 0.5, generator=generator)
    return encoder


def draw(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("backbone", NETS)
def test_features_are_those_of_the_plain_encoder(backbone: dict[str, Any], native: bool) -> None:
    encoder = trained(backbone)
    assert can_fold(encoder)
    folded = FoldedEncoder(encoder, native=native)
    # Fewer, more, and of another size: the memory of one call is used again by the next.
    for images in (draw(5), draw(2), draw(70), draw(3, 20, 13), draw(1, 7, 3), draw(33)):
        with torch.inference_mode():
            expected, found = encoder(images / 255), folded(images)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.skipif(find_kernels()[0] is None, reason=find_kernels()[1])
@pytest.mark.parametrize(("width", "fits"), [(8, True), (16, True), (12, False)])
def test_the_native_kernels_are_chosen_where_they_fit(width: int, fits: bool) -> None:
    folded = FoldedEncoder(trained({"name": "small_resnet", "width": width}))
    assert folded.is_native == fits
    assert folded.batch_size == (2048 if fits else 128)


@pytest.mark.skipif(find_kernels()[0] is None, reason=find_kernels()[1])
def test_maps_that_leave_the_caches_are_torchs() -> None:
    encoder = trained({"name": "resnet18", "width": 32})
    assert FoldedEncoder(encoder).is_native
    assert not FoldedEncoder(encoder, image_size=(224, 224)).is_native


@pytest.mark.skipif(find_kernels()[0] is None, reason=find_kernels()[1])
@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)])
def test_the_kernels_are_given_nothing_but_uint8_colour_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match="give uint8 on the CPU"):
        FoldedEncoder(trained(NETS[0]))(images)


def test_images_need_not_lie_in_a_row() -> None:
    folded = FoldedEncoder(trained(NETS[0]))
    images = draw(4)
    assert torch.equal(folded(images.transpose(2, 3).contiguous().transpose(2, 3)), folded(images))


def test_the_encoder_stays_as_it_is_and_is_not_looked_at_again() -> None:
    encoder = trained(NETS[0])
    before = copy.deepcopy(encoder.state_dict())
    folded = FoldedEncoder(encoder)
    first = folded(draw(4))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert torch.equal(folded(draw(4)), first)


class Own(SmallResNet):
    """A subclass, which may do something else."""


def exchange(encoder: Encoder) -> None:
    encoder.backbone.stages[0].bn1 = nn.Identity()  # type: ignore[union-attr, index]


def forget(encoder: Encoder) -> None:
    encoder.backbone.stages[0].bn1 = nn.BatchNorm2d(8, track_running_stats=False)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    "alter",
    [
        exchange,
        forget,
        lambda encoder: encoder.double(),
        lambda encoder: setattr(encoder, "native", True),
        lambda encoder: setattr(encoder, "backbone", Own(width=8)),
        lambda encoder: setattr(encoder.backbone.stages[0], "shortcut", nn.Conv2d(8, 8, 1)),
        lambda encoder: setattr(
            encoder.backbone.stages[1], "conv2", nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        ),
        lambda encoder: setattr(encoder.backbone.stem[0], "padding", (0, 0)),
        lambda encoder: setattr(encoder.backbone.stages[0].conv1, "stride", (1, 2)),
        lambda encoder: encoder.backbone.stem.append(nn.MaxPool2d(2)),
        lambda encoder: encoder.backbone.stages.append(nn.Identity()),
        lambda encoder: encoder.backbone.stages[1].register_forward_hook(lambda *_: None),
        lambda encoder: encoder.backbone.stages[1].conv1.register_forward_pre_hook(lambda *_: None),
    ],
)
def test_what_is_not_as_built_is_left_alone(alter: Callable[[Any], object]) -> None:
    encoder = trained(NETS[0])
    alter(encoder)
    assert not can_fold(encoder)
    assert not can_fold(encoder.backbone)
