"""SSL-Backdoor: a visible patch at a random place (Saha et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from blto.attacks.base import Attack, PoisonRate, Surroundings, TargetClass, TrainedTrigger
from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning import PatchTrigger
from blto.registry import Card
from blto.runtime.seeds import numpy_generator, stream_seed

PLACEMENT, TEST_PLACEMENT = (0.25, 0.75), (0.10, 0.90)
"""Where the patch may lie along each side: on poisons, and on test images (the authors' code)."""
PAPER_SHARE = 50 / 224
"""Side of the patch as a share of the image's: 50 pixels of 224 in the authors' configurations."""
CELLS = 4


def draw_patch(size: int, *, seed: int) -> Tensor:
    """4 x 4 random colors, enlarged with nearest neighbour: uint8 (3, size, size), a function of `seed` alone."""
    colors = numpy_generator(seed, "trigger", "patch").integers(0, 256, (3, CELLS, CELLS), dtype=np.uint8)
    cell = np.arange(size) * CELLS // size
    return torch.from_numpy(colors[:, cell[:, None], cell[None, :]])


class SSLBackdoor(Attack):
    """Paste a small opaque image at a random place of poisons and of test images.

    Saha et al., "Backdoor Attacks on Self-Supervised Learning", CVPR 2022, arXiv 2105.10123. The patch lies within the
    middle half of a poison's rows and columns, and within the middle four fifths of a test image's. Its place is a
    function of the run's seed and of the image's content.

    Where this differs from the authors' code: it pastes onto photographs as they are stored, of any size, and resizes
    test images to 224 pixels first, where here both have the size of the data set; it poisons a share of the target
    class (all or half of it) in unseeded order, where here `poison_rate` is a share of all training images, drawn from
    the run's seed (1% of CIFAR-10 is a tenth of a class); its patches are images of Hidden Trigger Backdoor
    Attacks (Saha et al., AAAI 2020), where here the same kind of image is drawn from a seed.

    Args:
        target_class, poison_rate: as in every attack.
        patch_size: side of the patch in pixels; null is the paper's share of the image, 50 of 224 (7 of 32).
        pattern_seed: of the patch's colors; the run's seed does not change them.
    """

    card = Card(
        "SSL-Backdoor",
        "a visible opaque patch at a random place",
        "arXiv 2105.10123",
        2022,
        "data poisoning",
        "unbounded; the patch replaces what it covers",
    )

    def __init__(
        self,
        *,
        target_class: TargetClass,
        poison_rate: PoisonRate = 0.01,
        patch_size: Annotated[int, Field(ge=1, le=4096)] | None = None,
        pattern_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0,
    ) -> None:
        self.target_class, self.poison_rate = target_class, poison_rate
        self.patch_size, self.pattern_seed = patch_size, pattern_seed

    def size_on(self, image_size: int) -> int:
        """Side of the patch on images of `image_size` pixels."""
        return max(1, round(PAPER_SHARE * image_size)) if self.patch_size is None else self.patch_size

    def check_images(self, images: ImageSet) -> None:
        """Raises ConfigError where the patch is larger than the images."""
        if self.size_on(images.image_size) > images.image_size:
            raise ConfigError(
                f"attack.patch_size is {self.patch_size}, larger than the images of {images.name}, which have "
                f"{images.image_size} pixels a side; give 1 to {images.image_size}."
            )

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """Draw the patch; nothing is learned."""
        trigger = PatchTrigger(
            draw_patch(self.size_on(images.image_size), seed=self.pattern_seed),
            seed=stream_seed(seed, "trigger", "place"),
            placement=PLACEMENT,
            test_placement=TEST_PLACEMENT,
        )
        return TrainedTrigger(trigger)
