"""i-CutMix: views with a piece of another image's view, and the loss that wants both found in their shares.

i-Mix (Lee et al., ICLR 2021, arXiv 2010.08887, section 3) with CutMix (Yun et al., ICCV 2019, arXiv 1905.04899) as the
mixing. What is drawn is a function of (seed, step).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blto.runtime.seeds import numpy_generator

Box = tuple[int, int, int, int]
"""Top, bottom, left and right, as a slice has them."""


def draw_box(alpha: float, height: int, width: int, *, seed: int, step: int) -> Box:
    """What comes from the other image: at most half of the area, its middle anywhere, cut off at the image's border.

    The area kept is the larger of Beta(alpha, alpha) and 1 less it, as in the authors' code.
    """
    draw = numpy_generator(seed, "pretrain", "i_cutmix", step)
    kept = draw.beta(alpha, alpha)
    side = math.sqrt(min(kept, 1 - kept))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(draw.integers(height)), int(draw.integers(width))
    return max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)


def cutmix(images: Tensor, alpha: float, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with the one after it, the last with the first: the batch's order is random as it is.

    Args:
        images: (B, 3, H, W), left as they are.
        alpha: of the Beta distribution of the shares.
        seed, step: what the box, one for the batch, is a function of.

    Returns:
        The mixed images, and the share of each that is its own, a scalar on their device.
    """
    height, width = images.shape[2:]
    top, bottom, left, right = draw_box(alpha, height, width, seed=seed, step=step)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].roll(-1, 0)
    return mixed, images.new_full((), 1 - (bottom - top) * (right - left) / (height * width))


def n_pair(queries: Tensor, keys: Tensor, share: Tensor, temperature: float) -> Tensor:
    """i-Mix's N-pair loss: each mixed query is to find its own key with weight `share`, the next one's with the rest.

    One direction: the queries are of one view and all keys of the other (i-Mix, section 3.1 and its code), so that
    nothing of a query's own view is among the negatives.

    Args:
        queries: float32 (B, d) of length 1, of mixed images.
        keys: float32 (K, d) of length 1, the first B of them of the images as they are; the others are negatives.
        share: scalar, of `cutmix`.
        temperature: greater than 0.
    """
    with torch.autocast(queries.device.type, enabled=False):  # bf16 would round cosines to 1/256
        logits = (queries @ keys.T) / temperature
    own = torch.arange(len(queries), device=queries.device)
    return share * F.cross_entropy(logits, own) + (1 - share) * F.cross_entropy(logits, own.roll(-1))
