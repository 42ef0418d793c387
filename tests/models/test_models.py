"""Encoders and generators: shapes, normalisation in one place, determinism, parameter counts, save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blto.errors import ConfigError, InputRefused
from blto.models import BACKBONES, GENERATORS
from blto.models.checkpoints import load_encoder, save_encoder
from blto.models.encoder import Encoder, build_encoder
from tests.factories import TINY_BACKBONE


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_resnet18_has_the_published_number_of_parameters() -> None:
    """11,173,962 with a ten-class head of 5,130: the CIFAR ResNet-18 that every SSL code base counts."""
    assert count(BACKBONES.build("resnet18")) == 11_173_962 - 5_130


def test_the_released_generator_has_the_layers_that_the_guide_describes() -> None:
    """Counted by hand: stem, two downsamplings, six blocks, two upsamplings, head."""
    w = 64
    stem = 3 * w * 49 + 2 * w
    down = w * 2 * w * 9 + 4 * w + 2 * w * 4 * w * 9 + 8 * w
    blocks = 6 * 2 * (4 * w * 4 * w * 9 + 8 * w)
    up = 4 * w * 2 * w * 9 + 4 * w + 2 * w * w * 9 + 2 * w
    head = w * 3 * 49 + 3
    assert count(GENERATORS.build("resnet")) == stem + down + blocks + up + head


@pytest.mark.parametrize(("blocks", "expected"), [(1, [1, 1, 1]), (2, [2, 2, 2]), ((1, 3, 2), [1, 3, 2])])
def test_a_small_resnet_has_its_blocks_stage_by_stage(blocks: object, expected: list[int]) -> None:
    net = BACKBONES.build({"name": "small_resnet", "widths": [4, 8, 12], "blocks": blocks})
    widths = [part.out_channels for name, part in net.named_modules() if name.endswith("conv2")]
    assert [widths.count(width) for width in (4, 8, 12)] == expected


def test_blocks_that_do_not_fit_the_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks: 2 numbers for 3 stages"):
        BACKBONES.build({"name": "small_resnet", "width": 4, "blocks": [1, 2]})


@pytest.mark.parametrize("name", [*BACKBONES.names(), "timm/resnet10t", "torchvision/squeezenet1_1"])
def test_an_encoder_pools_to_its_feature_dim(name: str) -> None:
    encoder = build_encoder(name, seed=0, image_size=64)
    encoder.eval()
    with torch.inference_mode():
        assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, encoder.feature_dim)


def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = (build_encoder(TINY_BACKBONE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    pairs = zip(first.parameters(), second.parameters(), third.parameters(), strict=True)
    same, other = zip(*[(torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs], strict=True)
    assert all(same)
    assert not all(other)


def test_normalisation_is_inside() -> None:
    class Passes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    encoder = Encoder(Passes(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    image = torch.tensor([0.7, 0.4, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(encoder(image), torch.tensor([[1.0, 0.0, -2.0]]))


@pytest.mark.parametrize("name", ["timm/resnet_18", "torchvision/resnet81", "resnet19"])
def test_an_unknown_backbone_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        BACKBONES.build(name)


@pytest.mark.parametrize("name", GENERATORS.names())
def test_a_generator_keeps_the_shape_and_an_untrained_one_is_not_negligible(name: str) -> None:
    torch.manual_seed(0)
    raw = GENERATORS.build({"name": name, "width": 8})(torch.rand(4, 3, 32, 32))
    assert raw.shape == (4, 3, 32, 32)
    assert raw.abs().max() <= 1
    assert raw.abs().mean() > 0.02


@pytest.mark.parametrize("size", [16, 17, 19])
def test_the_small_generator_takes_images_of_any_size(size: int) -> None:
    torch.manual_seed(0)
    assert GENERATORS.build({"name": "unet", "width": 4})(torch.rand(2, 3, size, size + 3)).shape == (
        2,
        3,
        size,
        size + 3,
    )


def test_an_encoder_without_normalisation_sees_pixels_as_they_are_also_from_the_disk(tmp_path: Path) -> None:
    backbone = {"name": "small_resnet", "width": 4}
    raw, usual = (build_encoder(backbone, seed=0, normalise=each).eval() for each in (False, True))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(raw(images), raw.backbone(images).mean(dim=(2, 3)))
    assert not torch.allclose(raw(images), usual(images))
    save_encoder(tmp_path / "raw.safetensors", raw, backbone, 32)
    loaded = load_encoder(tmp_path / "raw.safetensors")
    assert torch.equal(loaded.mean, torch.zeros(1, 3, 1, 1))
    assert torch.equal(loaded.std, torch.ones(1, 3, 1, 1))


def test_an_encoder_survives_the_disk_as_fp16(tmp_path: Path) -> None:
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=16)
    encoder(torch.rand(8, 3, 16, 16))  # move the running statistics away from their start
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, TINY_BACKBONE, 16)
    loaded = load_encoder(path)
    assert not loaded.training
    for name, value in encoder.state_dict().items():
        kept = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], kept), name


def test_an_encoder_whose_weights_are_no_numbers_is_refused(tmp_path: Path) -> None:
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=16)
    with torch.no_grad():
        next(encoder.backbone.parameters())[0] = float("inf")
    save_encoder(tmp_path / "e.safetensors", encoder, TINY_BACKBONE, 16)
    with pytest.raises(InputRefused, match=r"1 of \d+ tensors hold NaN or Inf") as refused:
        load_encoder(tmp_path / "e.safetensors")
    assert refused.value.code == "CKPT-NAN"


def test_a_foreign_or_damaged_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, build_encoder(TINY_BACKBONE, seed=0), TINY_BACKBONE, 32)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=r"encoder\.safetensors"):
        load_encoder(path)
    save_encoder(path, build_encoder(TINY_BACKBONE, seed=0), {"name": "small_resnet", "width": 8}, 32)
    with pytest.raises(InputRefused, match="not an encoder that blto wrote"):
        load_encoder(path)
