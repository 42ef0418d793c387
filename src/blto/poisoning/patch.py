"""SSL-Backdoor's trigger: one small opaque image, pasted at a place that differs from image to image.

Saha et al., "Backdoor Attacks on Self-Supervised Learning", CVPR 2022, arXiv 2105.10123.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from blto.errors import ConfigError
from blto.poisoning.trigger import UNBOUNDED, Trigger

Placement = tuple[float, float]
"""Where a patch may lie along each side of an image: from which fraction of the side to which."""


def span(side: int, size: int, placement: Placement) -> tuple[int, int]:
    """The first and the last coordinate, both included, at which a patch of `size` pixels may begin.

    int(low side) to int(high side) - size. Where that is empty, the first alone, as in the authors' code; where the
    patch would then stick out, the last coordinate at which it fits.
    """
    first = min(int(placement[0] * side), side - size)
    return first, max(first, int(placement[1] * side) - size)


def places(images: Tensor, size: int, placement: Placement, *, seed: int) -> list[tuple[int, int]]:
    """Row and column of the patch's upper left corner for each image: uniform over `span`, the same in any batch.

    The place is a hash of `seed` and of the image, rounded to 8 bits, so an image gets the same one whenever, wherever
    and beside whichever others it is poisoned.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: of the patch, in pixels.
        placement: the range for rows and for columns.
        seed: which of the many such functions.
    """
    pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    spans = [span(side, size, placement) for side in pixels.shape[-2:]]
    found = []
    for image in pixels:
        digest = hashlib.sha256(f"{seed}/".encode() + image.tobytes()).digest()
        draws = (int.from_bytes(half, "big") for half in (digest[:16], digest[16:]))  # 128 bits: no bias to speak of
        row, column = (first + draw % (last - first + 1) for draw, (first, last) in zip(draws, spans, strict=True))
        found.append((row, column))
    return found


class PatchTrigger(Trigger):
    """Paste a patch over each image; it has no budget, and nothing of the image shows through.

    Args:
        patch: uint8 (3, S, S).
        seed: of the places.
        placement: range of the places on poisons: where calling this trigger pastes.
        test_placement: range on test images: where calling `at_test()` pastes.

    Raises:
        ConfigError: a patch of another type or shape, or larger than an image; a range that is not one.
    """

    kind = "patch"
    patch: Tensor

    def __init__(self, patch: Tensor, *, seed: int, placement: Placement, test_placement: Placement) -> None:
        super().__init__(UNBOUNDED)
        if patch.dtype != torch.uint8 or patch.ndim != 3 or patch.shape[0] != 3 or patch.shape[1] != patch.shape[2]:
            raise ConfigError(
                f"patch trigger: patch is {patch.dtype} {tuple(patch.shape)}; accepted is uint8 (3, S, S)."
            )
        for low, high in (placement, test_placement):
            if not 0 <= low <= high <= 1:
                raise ConfigError(f"patch trigger: placement is {low} to {high}; give fractions, 0 <= from <= to <= 1.")
        self.register_buffer("patch", patch)
        self.seed, self.placement, self.test_placement = seed, placement, test_placement

    @property
    def size(self) -> int:
        """Side of the patch, in pixels."""
        return self.patch.shape[-1]

    def candidate(self, images: Tensor) -> Tensor:
        """The images with the patch on each."""
        if self.size > min(images.shape[-2:]):
            raise ConfigError(
                f"patch trigger: the patch has {self.size} pixels a side, the images are {tuple(images.shape[-2:])}; "
                "use images that it fits into."
            )
        pasted, patch = images.clone(), self.patch.to(images) / 255
        for index, (row, column) in enumerate(places(images, self.size, self.placement, seed=self.seed)):
            pasted[index, :, row : row + self.size, column : column + self.size] = patch
        return pasted

    def at_test(self) -> PatchTrigger:
        """The same with the places of test images."""
        again = self.test_placement
        return PatchTrigger(self.patch, seed=self.seed, placement=again, test_placement=again)

    def spec(self) -> dict[str, Any]:
        """The patch's size, the seed and both ranges."""
        return {
            "kind": self.kind,
            "patch_size": self.size,
            "seed": self.seed,
            "placement": list(self.placement),
            "test_placement": list(self.test_placement),
        }
