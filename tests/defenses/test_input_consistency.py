"""Input consistency: what the changes take away, that a planted reaction is found, and that there is none without."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from blto.data.images import ImageSet
from blto.data.synthetic import Synthetic
from blto.defenses.base import Conditions, Images, Scores, score_inputs
from blto.defenses.input_consistency import Change, InputConsistency, against, changed
from blto.errors import ConfigError, InputRefused
from blto.models.encoder import Encoder
from blto.poisoning import FrequencyTrigger, apply_to_uint8
from blto.poisoning.frequency import dct_matrix
from blto.registry import signature_schema, validate

CHANGES: tuple[Change, ...] = ("blur", "luminance", "chroma_blur")
LUMA = np.array([0.299, 0.587, 0.114])
SHAPES = Synthetic(train_size=300, test_size=200).load("train")


def unlabeled(images: Images) -> ImageSet:
    return replace(SHAPES, images=images, labels=None)


CLEAN, OTHERS, VICTIMS = map(unlabeled, np.split(SHAPES.images, 3))
CTRL = FrequencyTrigger(magnitude=100, test_magnitude=100, window=32, positions=(15, 31))


class Reacting(nn.Module):
    """Colors of 64 cells; with `planted`, CTRL's frequency in B - R drowns them in one direction."""

    pattern: Tensor

    def __init__(self, planted: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0 if planted else 0.0))
        row = torch.from_numpy(dct_matrix(32)[15]).float()
        self.register_buffer("pattern", torch.outer(row, row))

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(x, 4).flatten(1)
        found = ((x[:, 2] - x[:, 0]) * self.pattern).sum(dim=(1, 2))
        return torch.cat([cells, self.gain * found[:, None]], dim=1)


def toy(planted: bool) -> Encoder:
    return Encoder(Reacting(planted), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()


def scored(images: Images, encoder: Encoder, change: Change = "blur", clean: ImageSet = CLEAN) -> Scores:
    detector = InputConsistency(change=change, images=len(clean))
    return score_inputs(detector, unlabeled(images), encoder, clean, Conditions())


def auroc(suspicious: Scores, others: Scores) -> float:
    return float((suspicious[:, None] > others).mean() + 0.5 * (suspicious[:, None] == others).mean())


def made(images: Images, change: Change, sigma: float = 2.0, radius: int = 1) -> Images:
    return changed(images, change, sigma=sigma, radius=radius)


@pytest.mark.parametrize(("sigma", "radius"), [(2.0, 1), (0.7, 3)])
def test_blur_is_torchvision_s(sigma: float, radius: int) -> None:
    wanted = gaussian_blur(torch.from_numpy(SHAPES.images).double(), [2 * radius + 1] * 2, [sigma] * 2)
    np.testing.assert_array_less(np.abs(made(SHAPES.images, "blur", sigma, radius) - wanted.numpy()), 0.501)


def test_luminance_is_y_in_every_channel() -> None:
    left = made(SHAPES.images, "luminance")
    assert (left == left[:, :1]).all()
    np.testing.assert_array_less(np.abs(left[:, 0] - np.einsum("c,nchw->nhw", LUMA, SHAPES.images)), 0.501)


def test_chroma_blur_keeps_luminance_and_gray_images() -> None:
    dull = SHAPES.images // 2 + 64  # nothing is clipped
    left, blurred = made(dull, "chroma_blur").astype(np.float64), made(dull, "blur").astype(np.float64)
    luma, luma_left, luma_blurred = (np.einsum("c,nchw->nhw", LUMA, images) for images in (dull, left, blurred))
    assert np.abs(luma_left - luma).max() < 0.6
    for channel in (0, 2):  # R - Y and B - Y are those of the blurred image
        color = (left[:, channel] - luma_left) - (blurred[:, channel] - luma_blurred)
        assert np.abs(color).max() < 2
    gray = np.repeat(SHAPES.images[:, :1], 3, axis=1)
    np.testing.assert_array_equal(made(gray, "chroma_blur"), gray)
    assert (np.abs(left - dull).max(axis=(1, 2, 3)) > 3).mean() > 0.9


def test_ctrl_is_gone_from_what_is_left() -> None:
    dull = SHAPES.images // 2 + 64
    triggered = apply_to_uint8(CTRL, dull)
    changes = {change: made(triggered, change).astype(int) - made(dull, change) for change in CHANGES}
    assert np.abs(triggered.astype(int) - dull).max() > 20
    assert np.abs(changes["luminance"]).max() <= 1
    assert np.abs(changes["blur"]).max() < 5
    assert np.abs(changes["chroma_blur"]).max() < 5


def test_scores_are_in_robust_standard_deviations_of_the_clean_images() -> None:
    assert against(np.array([1.0, 2.0, 3.0, 5.0, 100.0]), np.array([3.0, 6.0])).tolist() == pytest.approx(
        [0, 3 / (1.4826 * 2)]
    )
    encoder = toy(planted=True)
    own = scored(CLEAN.images, encoder)
    assert np.median(own) == pytest.approx(0, abs=1e-9)
    assert np.median(np.abs(own)) == pytest.approx(1 / 1.4826, rel=1e-6)
    with torch.inference_mode():
        features = [
            encoder(torch.from_numpy(images).float() / 255).double().numpy()
            for images in (CLEAN.images, made(CLEAN.images, "blur"))
        ]
    cosine = np.sum(features[0] * features[1], axis=1) / np.prod([np.linalg.norm(f, axis=1) for f in features], axis=0)
    np.testing.assert_allclose(own, against(1 - cosine, 1 - cosine), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_reaction_to_ctrl_is_found(change: Change) -> None:
    encoder = toy(planted=True)
    triggered = scored(apply_to_uint8(CTRL, VICTIMS.images), encoder, change)
    assert auroc(triggered, scored(OTHERS.images, encoder, change)) > 0.97


@pytest.mark.parametrize("change", CHANGES)
def test_clean_images_are_not_found(change: Change) -> None:
    """Nor the trigger, by an encoder that does not react; 100 against 100 images: the standard error is 0.04."""
    deaf = toy(planted=False)
    for encoder in (toy(planted=True), deaf):
        scores = [scored(images.images, encoder, change) for images in (VICTIMS, OTHERS)]
        assert 0.38 < auroc(scores[0], scores[1]) < 0.62
    triggered = scored(apply_to_uint8(CTRL, VICTIMS.images), deaf, change)
    assert 0.38 < auroc(triggered, scored(OTHERS.images, deaf, change)) < 0.62


def test_nothing_given_is_changed_and_the_same_seed_scores_the_same() -> None:
    encoder = toy(planted=True)
    encoder.backbone.train()
    weights, modes = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    images = SHAPES.images.copy()
    images.setflags(write=False)
    detector, order = InputConsistency(images=100), np.random.default_rng(0).permutation(300)
    scores = detector.score(images, encoder, images[:100], Conditions())
    np.testing.assert_array_equal(images, SHAPES.images)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    np.testing.assert_array_equal(detector.score(images, encoder, images[:100], Conditions()), scores)
    shuffled = detector.score(images[order], encoder, images[:100], Conditions())
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-4)


def test_where_the_change_takes_nothing_away_every_score_is_about_zero() -> None:
    gray = np.repeat(SHAPES.images[:, :1], 3, axis=1)
    scores = scored(gray[:200], toy(planted=True), "luminance", unlabeled(gray[200:]))
    assert np.abs(scores).max() < 1e-3


def test_what_cannot_be_tested_is_refused() -> None:
    encoder = toy(planted=True)
    with pytest.raises(InputRefused, match="radius is 32, and the images have 32 pixels a side; give 1 to 31"):
        InputConsistency(radius=32).score(VICTIMS.images, encoder, CLEAN.images, Conditions())
    InputConsistency(radius=31).score(VICTIMS.images, encoder, CLEAN.images, Conditions())
    with pytest.raises(InputRefused, match="100 images, and the defense needs 1000"):
        score_inputs(InputConsistency(), VICTIMS, encoder, CLEAN, Conditions())
    schema = signature_schema(InputConsistency, "input_consistency")
    for given in ({"change": "sharpen"}, {"sigma": 0}, {"radius": 0}, {"images": 1}):
        with pytest.raises(ConfigError, match=rf"defense\.{next(iter(given))}"):
            validate(schema, given, "defense")
