"""Blur and luminance as a test: how far do an image's features move when its details or its color are taken away?"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from blto.data.view_backends.batched import blur_matrix, separable
from blto.defenses.base import Conditions, Images, InputDetector, Scores
from blto.defenses.evidence import Evidence
from blto.defenses.frequency_screening import MAD_TO_DEVIATION
from blto.defenses.pseudo_classes import suspect_features
from blto.errors import InputRefused
from blto.models.encoder import Encoder
from blto.poisoning.frequency import rgb_to_yuv, yuv_to_rgb
from blto.registry import Card

Change = Literal["blur", "luminance", "chroma_blur"]

LEAST_SPREAD = 1e-6
"""A smaller spread of 1 - cosine is rounding and counts as this one."""
BATCH = 256


def changed(images: Images, change: Change, *, sigma: float, radius: int) -> Images:
    """What is left of the images, uint8 (N, 3, S, S), rounded to 8 bits.

    Args:
        images: uint8 (N, 3, S, S).
        change: see `InputConsistency`.
        sigma: of both blurs, in pixels.
        radius: half the width of their kernel, less than S; the border is reflected.
    """
    blur = blur_matrix(torch.tensor([[sigma]], dtype=torch.float64), radius, images.shape[-1])
    out = np.empty_like(images)
    for begin in range(0, len(images), BATCH):
        part = slice(begin, begin + BATCH)
        left = _left_of(torch.from_numpy(np.array(images[part])), change, blur)
        out[part] = left.round().clamp(0, 255).to(torch.uint8).numpy()
    return out


def _left_of(pixels: Tensor, change: Change, blur: Tensor) -> Tensor:
    yuv = rgb_to_yuv(pixels)
    if change == "luminance":
        return yuv[:, :1].expand(-1, 3, -1, -1)
    smooth = separable(yuv, blur, blur)
    return yuv_to_rgb(smooth if change == "blur" else torch.cat([yuv[:, :1], smooth[:, 1:]], dim=1))


def against(clean: Scores, suspects: Scores) -> Scores:
    """How far above the clean values' median, in robust standard deviations of theirs."""
    median = np.median(clean)
    spread = MAD_TO_DEVIATION * np.median(np.abs(clean - median))
    scores: Scores = (suspects - median) / max(spread, LEAST_SPREAD)
    return scores


class InputConsistency(InputDetector):
    """Take something away that a trigger may live in, and see whether the encoder's answer was about that.

    Satpathy et al., "An Embarrassingly Simple Defense Against Backdoor Attacks On SSL", arXiv 2403.15918. An image's
    movement is 1 - cos(f(x), f(x')), with raw features and x' one of

    - blur: Gaussian, of all channels.
    - luminance: Y of YUV in all three channels; grayscale is another word for it.
    - chroma_blur: the same blur of U and V alone; Y stays. Photographs have little fine detail in their color, CTRL's
      trigger has nothing else.

    The score is how far that lies above the median of clean images, in robust standard deviations of theirs. It says
    that the image has something that clean ones lack, and not that the encoder has a backdoor: a clean encoder moves
    too. An image whose features a trigger holds fast moves less than a clean one and has a low score.

    Where this differs from the paper: there, blur (a kernel of 3 pixels, sigma from 0.1 to 2, on half of the views)
    is added to the training's augmentation, and luminance replaces the image in use, both to make a trigger harmless;
    neither is a test of an image. The score is this project's, and so is chroma_blur.

    Args:
        change: one of the three.
        sigma: of the blurs, in pixels; the largest of the authors'.
        radius: half the width of the blurs' kernel, in pixels: 1 is the authors' kernel of 3.
        images: clean images to compare with.
    """

    card = Card(
        "Input consistency",
        "how far features move when an image is blurred or loses its color",
        "arXiv 2403.15918",
        2024,
        "the encoder, images in use, and clean images without labels",
    )
    evidence = Evidence(
        "It sees CTRL's pixels and the patch's with chroma_blur, on a clean encoder as well; nothing shows that "
        "it sees a backdoor.",
        positive="test_input_consistency::test_a_planted_reaction_to_ctrl_is_found",
    )

    def __init__(
        self,
        *,
        change: Change = "blur",
        sigma: Annotated[float, Field(gt=0, le=100)] = 2.0,
        radius: Annotated[int, Field(ge=1, le=256)] = 1,
        images: Annotated[int, Field(ge=2)] = 1000,
    ) -> None:
        self.change: Change = change
        self.sigma, self.radius, self.images = sigma, radius, images

    def score(self, suspects: Images, encoder: Encoder, clean: Images, conditions: Conditions) -> Scores:
        """See `InputDetector.score`. Raises InputRefused where the blur is wider than the images."""
        for given in (clean, suspects):
            if self.radius >= given.shape[-1]:
                raise InputRefused(
                    f"radius is {self.radius}, and the images have {given.shape[-1]} pixels a side; "
                    f"give 1 to {given.shape[-1] - 1}."
                )
        return against(*(self._movement(given, encoder, conditions) for given in (clean, suspects)))

    def _movement(self, images: Images, encoder: Encoder, conditions: Conditions) -> Scores:
        """1 - cosine between the features of each image and of what is left of it."""
        left = changed(images, self.change, sigma=self.sigma, radius=self.radius)
        before, after = (
            torch.from_numpy(suspect_features(encoder, given, conditions)).double() for given in (images, left)
        )
        moved: Scores = (1 - torch.nn.functional.cosine_similarity(before, after)).numpy()
        return moved
