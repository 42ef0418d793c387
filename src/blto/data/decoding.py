"""From encoded image files to square uint8 arrays of one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from blto.errors import InputRefused
from blto.files import show
from blto.files.images import decode_image

Pixels = npt.NDArray[np.uint8]


def decode_square(data: bytes, name: str, size: int | None) -> Pixels:
    """Decode one image to uint8 (3, S, S).

    Args:
        data: the encoded file.
        name: what it is called in messages.
        size: the largest centred square is cut out and resized to this many pixels with antialiasing; an image that
            has this size already keeps its exact pixels. None takes a square image as it is.

    Raises:
        InputRefused: IMAGE-REFUSED: not decodable, or not square where `size` is None.
    """
    pixels = decode_image(data, name)
    height, width = pixels.shape[:2]
    if size is None and height != width:
        raise InputRefused(
            f"{show(name)}: {width}x{height} is not square; set image_size to cut and resize all images.",
            code="IMAGE-REFUSED",
        )
    return to_square(pixels, size or height)


def to_square(pixels: Pixels, size: int) -> Pixels:
    """The largest centred square of (H, W, 3), resized with antialiasing: (3, size, size); an exact fit is kept."""
    if pixels.shape[:2] != (size, size):
        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def stack(images: Sequence[Pixels], source: str) -> Pixels:
    """All images as one array (N, 3, S, S). Raises InputRefused where there are none or their sizes differ."""
    if not images:
        raise InputRefused(f"{show(source)}: holds no image; give a set with at least one.")
    sizes = sorted({image.shape[-1] for image in images})
    if len(sizes) > 1:
        raise InputRefused(f"{show(source)}: images of {sizes[0]} to {sizes[-1]} pixels; set image_size to resize all.")
    return np.stack(images)
