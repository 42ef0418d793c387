"""DECREE: its arithmetic, that a planted patch is found and small, and that a clean encoder needs a larger one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, Inspection, inspect_encoder
from blto.defenses.decree import DECREE, FIRST_LAMBDA, Pressure
from blto.defenses.inversion import MaskedPatch, differentiable, mean_cosine
from blto.errors import InputRefused
from blto.models.encoder import Encoder, build_encoder
from tests.factories import random_images

SIZE, CORNER = 16, 4
IMAGES = random_images(96, size=SIZE)
AREA = CORNER**2 / SIZE**2


class Reacting(nn.Module):
    """Random features of the pixels; with `planted`, a bright corner drowns them in one direction."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(24, 3 * SIZE * SIZE, generator=generator) / SIZE)
        self.planted = planted

    def forward(self, x: Tensor) -> Tensor:
        corner = x[:, :, -CORNER:, -CORNER:].mean(dim=(1, 2, 3))
        direction = torch.zeros(24)
        direction[0] = 1
        reaction = 0.5 * torch.exp(3 * corner)[:, None] * direction if self.planted else 0.0
        return F.linear(x.flatten(1), self.weight) + reaction


def toy(planted: bool) -> Encoder:
    return Encoder(Reacting(planted), image_size=SIZE).eval()


def inspect(encoder: Encoder, seed: int = 0, **options: int | str) -> Inspection:
    detector = DECREE(images=96, batch_size=32, **{"epochs": 60, "patience": 40, **options})  # type: ignore[arg-type]
    return inspect_encoder(detector, encoder, IMAGES, Conditions(seed))


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    cosines = F.cosine_similarity(features[:, None], features[None], dim=2)
    assert torch.isclose(mean_cosine(features), cosines[~torch.eye(7, dtype=torch.bool)].mean(), atol=1e-6)
    assert torch.isclose(mean_cosine(features[:1].repeat(4, 1)), torch.tensor(1.0))


def test_a_stamp_starts_uniform_and_blends_within_the_range() -> None:
    stamp = MaskedPatch(64, torch.Generator().manual_seed(0))
    for values in (stamp.mask, stamp.patch):
        assert 0 < values.min() < 0.01
        assert 0.99 < values.max() < 1
        assert abs(float(values.detach().mean()) - 0.5) < 0.02
    images = torch.rand(3, 3, 64, 64)
    assert torch.allclose(stamp(images), images + stamp.mask * (stamp.patch - images))
    nn.init.constant_(stamp.raw_mask, -20)
    assert torch.equal(stamp(images), images)


def test_the_pressure_rises_after_successes_and_falls_after_failures() -> None:
    pressure = Pressure(1e-5)
    for _ in range(5):
        pressure.after(True)
    assert pressure.weight == FIRST_LAMBDA
    pressure.after(True)
    assert pressure.weight == FIRST_LAMBDA * 5
    for success in (True, False, True):  # a run has to be unbroken
        pressure.after(success)
    assert pressure.weight == FIRST_LAMBDA * 5
    for _ in range(6):
        pressure.after(False)
    assert pressure.weight == pytest.approx(FIRST_LAMBDA)
    for _ in range(60):
        pressure.after(False)
    assert 1e-5 / 5 <= pressure.weight < 1e-5, "it stops below its floor"
    for _ in range(5):
        pressure.after(True)
    assert pressure.weight < 1e-5
    for _ in range(20):
        pressure.after(True)
    assert pressure.weight >= FIRST_LAMBDA / 5, "and starts anew after successes there"


def test_a_planted_patch_is_found_and_far_smaller_than_what_a_clean_encoder_needs() -> None:
    planted, clean = inspect(toy(True), starts=3), inspect(toy(False), starts=3)
    assert planted.measures["relative_norm"] < 2 * AREA
    assert planted.measures["relative_norm"] < clean.measures["relative_norm"] / 4
    assert planted.flagged is True
    assert clean.flagged is False
    assert planted.score == pytest.approx(1 - planted.measures["relative_norm"])
    mask, patch = planted.trigger["mask"][0], planted.trigger["patch"]
    assert mask[-CORNER:, -CORNER:].sum() > 0.5 * mask.sum()
    brightness = (mask * patch)[:, -CORNER:, -CORNER:].sum() / mask[-CORNER:, -CORNER:].sum() / 3
    assert brightness > 0.7
    stamped = torch.from_numpy(IMAGES.images).float() / 255 * (1 - mask) + mask * patch
    assert mean_cosine(toy(True)(stamped)) > 0.98


def test_where_images_never_become_alike_there_is_no_trigger() -> None:
    found = inspect(toy(False), epochs=1)
    assert (found.score, found.flagged, found.trigger) == (0.0, False, {})
    assert found.measures == {"steps": 3}
    assert found.seconds > 0


def test_more_starts_never_find_a_larger_mask() -> None:
    one, three = inspect(toy(False), epochs=40), inspect(toy(False), epochs=40, starts=3)
    assert three.score >= one.score
    assert three.measures["steps"] > one.measures["steps"]


def test_windows_cover_the_image_and_begin_one_after_the_other() -> None:
    masks = [MaskedPatch(SIZE, torch.Generator().manual_seed(0), window).mask.detach()[0] for window in range(9)]
    assert all(0.8 < mask.max() < 1 and mask.min() < 0.05 for mask in masks)
    assert all((mask > 0.5).sum() == (SIZE // 2) ** 2 for mask in masks)
    assert (torch.stack(masks).amax(dim=0) > 0.5).all()
    assert len({tuple((mask > 0.5).flatten().tolist()) for mask in masks}) == 9


def test_windows_find_a_patch_where_one_random_start_misses_it() -> None:
    missed, found = inspect(toy(True), 1), inspect(toy(True), 1, starts=9, begin="windows")
    assert missed.measures["relative_norm"] > 4 * AREA, "a start that is known to fail"
    assert found.measures["relative_norm"] < 2 * AREA


def test_it_is_a_function_of_its_seed() -> None:
    first, again, other = (inspect(toy(True), seed, epochs=20) for seed in (3, 3, 4))
    assert first.measures == again.measures
    assert torch.equal(first.trigger["mask"], again.trigger["mask"])
    assert not torch.equal(first.trigger["mask"], other.trigger["mask"])


def test_the_encoder_is_left_as_it_was() -> None:
    encoder = build_encoder({"name": "small_resnet", "width": 16}, seed=0, image_size=SIZE).eval()
    encoder.backbone.requires_grad_(True)
    before = copy.deepcopy(encoder.state_dict())
    inspect(encoder, epochs=2)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert not encoder.native
    with differentiable(encoder.train(), "cpu"):
        assert not encoder.training
    assert all(module.training for module in encoder.modules())


def test_gradients_reach_the_images_and_not_the_weights() -> None:
    encoder = build_encoder({"name": "small_resnet", "width": 16}, seed=0, image_size=SIZE).eval()
    images = torch.rand(32, 3, SIZE, SIZE, requires_grad=True)
    with differentiable(encoder, "cpu") as features:
        found = features(images)
        found.sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert found.dtype == torch.float32


def test_too_few_images_are_refused_and_no_label_is_shown() -> None:
    with pytest.raises(InputRefused, match="noise: 96 images, and the defense needs 97; give more"):
        inspect_encoder(DECREE(images=97), toy(False), IMAGES, Conditions())
    with pytest.raises(InputRefused, match="no clean images: 0 images"):
        inspect_encoder(DECREE(images=97), toy(False), None, Conditions())


def test_the_registry_builds_it_with_the_papers_numbers() -> None:
    detector = DEFENSES.build("decree")
    assert isinstance(detector, DECREE)
    assert (detector.images, detector.epochs, detector.batch_size, detector.similarity) == (1000, 1000, 128, 0.99)
    assert (detector.least_lambda, detector.patience, detector.starts) == (1e-5, 10, 1)
    assert np.isclose(FIRST_LAMBDA, 1e-3)
