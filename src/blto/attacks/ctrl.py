"""CTRL: a fixed trigger in the frequency domain (Li et al., ICCV 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blto.attacks.base import Attack, PoisonRate, Surroundings, TargetClass, TrainedTrigger
from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning import FrequencyTrigger
from blto.poisoning.frequency import check_positions
from blto.registry import Card

Magnitude = Annotated[float, Field(ge=0, le=10_000)]
Position = Annotated[int, Field(ge=0)]


class CTRL(Attack):
    """Add a constant to two DCT coefficients of an image's chroma; test images get twice as much as poisons.

    Li et al., "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023, arXiv 2210.07346. An
    image on the 8-bit scale is taken to YUV (BT.601); in every window of U and of V the magnitude is added to the
    coefficients (p, p) of the orthonormal DCT-II; back in RGB the result is clipped and rounded to 8 bits. There is no
    budget: the largest change is 0.216 times the magnitude, 11 of 255 on poisons and 22 at test by default.

    Where this differs from the authors' code: poisons are a random choice among the target class's images, not the
    first ones of the file; a window has to divide the image's side; the way back from YUV is the exact inverse.

    Args:
        target_class, poison_rate: as in every attack.
        magnitude: added on poisons, on the scale of 8-bit values (paper: 50; the authors' command: 100).
        test_magnitude: added on test images (100 in both).
        window: side of the DCT's windows in pixels; must divide the image's side.
        positions: p of each coefficient (p, p), smaller than the window.

    Raises:
        ConfigError: a position outside of the window.
    """

    card = Card(
        "CTRL",
        "a constant added to two chroma frequencies of the image",
        "arXiv 2210.07346",
        2023,
        "data poisoning",
        "unbounded; L-infinity is 11/255 on poisons, 22/255 at test, by default",
    )

    def __init__(
        self,
        *,
        target_class: TargetClass,
        poison_rate: PoisonRate = 0.01,
        magnitude: Magnitude = 50.0,
        test_magnitude: Magnitude = 100.0,
        window: Annotated[int, Field(ge=1, le=4096)] = 32,
        positions: Annotated[tuple[Position, ...], Field(min_length=1)] = (15, 31),
    ) -> None:
        check_positions(positions, window, "attack.positions")
        self.target_class, self.poison_rate = target_class, poison_rate
        self.magnitude, self.test_magnitude, self.window, self.positions = magnitude, test_magnitude, window, positions

    def check_images(self, images: ImageSet) -> None:
        """Raises ConfigError where the windows do not tile the images."""
        if images.image_size % self.window:
            raise ConfigError(
                f"attack.window is {self.window}, but images of {images.name} have {images.image_size} pixels a side; "
                f"give a divisor of {images.image_size}, and attack.positions below it."
            )

    def train_trigger(self, images: ImageSet, *, seed: int, surroundings: Surroundings) -> TrainedTrigger:
        """Nothing is learned."""
        trigger = FrequencyTrigger(
            magnitude=self.magnitude,
            test_magnitude=self.test_magnitude,
            window=self.window,
            positions=self.positions,
        )
        return TrainedTrigger(trigger)
