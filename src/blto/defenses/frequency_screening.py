"""Frequency screening: which images have a frequency as no other image has it? (after Zeng et al., ICCV 2021)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.errors import InputRefused
from blto.models.encoder import Encoder
from blto.poisoning.frequency import RGB_TO_YUV, dct, rgb_to_yuv
from blto.registry import Card
from blto.runtime.device import resolve_device
from blto.runtime.seeds import numpy_generator

MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution: the standard deviation, in units of the median absolute deviation."""
ROUNDING = np.linalg.norm(RGB_TO_YUV, axis=1) / np.sqrt(12)
"""Standard deviation of a coefficient of Y, U and V that rounding to 8 bits alone gives: no spread is taken smaller."""
BATCH = 128


def coefficients(images: Tensor) -> Tensor:
    """DCT-II of Y, U and V over the whole image, on the scale of 8-bit values: uint8 (B, 3, S, S) -> the same shape."""
    return dct(rgb_to_yuv(images), images.shape[-1]).flatten(2, 3).squeeze(2)


def typical(known: Tensor) -> tuple[Tensor, Tensor]:
    """Median and robust standard deviation of each coefficient over images (N, 3, S, S)."""
    median = known.median(dim=0).values
    spread = MAD_TO_DEVIATION * (known - median).abs().median(dim=0).values
    least = torch.from_numpy(ROUNDING).to(known)[:, None, None]
    return median, torch.maximum(spread, least)


def largest_deviation(found: Tensor, median: Tensor, spread: Tensor) -> Tensor:
    """Over all frequencies, the largest length of the deviations of Y, U and V together: (N, 3, S, S) -> (N,)."""
    return ((found - median) / spread).square().sum(dim=1).amax(dim=(1, 2)).sqrt()


class FrequencyScreening(DatasetFilter):
    """Compare each coefficient of an image's DCT with what the set has there; the farthest one counts.

    Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021, arXiv 2104.03413:
    triggers leave traces in the DCT that photographs do not have. Here an image is taken to YUV and through the
    orthonormal DCT; each coefficient is turned into robust standard deviations from its median over the suspects
    (median absolute deviation), and the score is max over frequencies of sqrt(z_Y^2 + z_U^2 + z_V^2).

    Where this differs from the paper: they train a network of six convolutions on the DCT of RGB, to tell clean images
    from the same ones with blocks, noise, shadows and other images on them. This is a statistic of the suspects alone:
    no clean images and nothing trained, and it knows no kind of trigger.

    Args:
        reference: suspects from which medians and spreads are taken, drawn from the seed; all where there are fewer.
            It works as long as most of them are clean.
    """

    card = Card(
        "Frequency screening",
        "whether an image has a frequency that the others lack",
        "arXiv 2104.03413",
        2021,
        "the training set without labels",
    )
    evidence = Evidence(
        "It finds CTRL at magnitude 50 and a patch of 12 pixels, on all sets; BLTO only where it hides from the "
        "carried trigger, on two of two sets.",
        must_show="test_frequency_screening::test_ctrl_is_found",
        positive="test_frequency_screening::test_a_patch_of_fine_detail_is_found",
    )
    needs_encoder = False

    def __init__(self, *, reference: Annotated[int, Field(ge=10)] = 1000) -> None:
        self.reference = reference

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`. Raises InputRefused for fewer than 10 images."""
        count = len(suspects)
        if count < 10:
            raise InputRefused(f"{count} images, and the screening compares them with one another; give 10 or more.")
        draw = numpy_generator(conditions.seed, "defense", "frequency_screening")
        known = np.sort(draw.choice(count, min(count, self.reference), replace=False))
        place, scores = resolve_device(conditions.device), np.empty(count)
        parts = (known[begin : begin + BATCH] for begin in range(0, len(known), BATCH))
        usual = typical(torch.cat([coefficients(_pixels(suspects[rows], place)).float() for rows in parts]))
        with conditions.progress.bar("frequency screening", count) as advance:
            for begin in range(0, count, BATCH):
                part = slice(begin, begin + BATCH)
                scores[part] = largest_deviation(coefficients(_pixels(suspects[part], place)), *usual).cpu().numpy()
                advance(min(part.stop, count), "")
        return scores


def _pixels(images: Images, place: str) -> Tensor:
    return torch.from_numpy(np.array(images)).to(place)  # a copy: the set may be a memory map that is read-only
