"""A family of small encoders for tests of inverted triggers: random filters, of which two draws are much alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.models.encoder import Encoder

SIZE, DIMENSIONS = 16, 32


class Filters(nn.Module):
    """The mean of each rectified filter; with `reaction` (D,), fine detail moves the features that way."""

    def __init__(self, seed: int, reaction: Tensor | None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIMENSIONS, 3, 5, 5, generator=draw) / 8)
        self.reaction = reaction

    def forward(self, x: Tensor) -> Tensor:
        answers = F.relu(F.conv2d(x, self.weight, stride=3)).mean(dim=(2, 3))
        if self.reaction is None:
            return answers
        fine = (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).abs().mean(dim=(1, 2, 3))
        return answers + fine[:, None] * self.reaction


def clean(seed: int) -> Encoder:
    return Encoder(Filters(seed, None), image_size=SIZE).eval()


def reacting(seed: int, reaction: Tensor) -> Encoder:
    """The same, with an answer to fine detail."""
    return Encoder(Filters(seed, reaction), image_size=SIZE).eval()


def stretched(seed: int, way: Tensor, gain: float) -> Encoder:
    """The same, with features that are 1 + `gain` times as long along the unit vector `way` (D,)."""
    last = nn.Linear(DIMENSIONS, DIMENSIONS, bias=False)
    with torch.no_grad():
        last.weight.copy_(torch.eye(DIMENSIONS) + gain * torch.outer(way, way))
    return Encoder(nn.Sequential(Filters(seed, None), last), image_size=SIZE).eval()
