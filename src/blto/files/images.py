"""Decoding image files of unknown origin, and encoding our own without loss."""

from __future__ import annotations

import io
import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from blto.errors import BltoError, InputRefused
from blto.files.text import show

Pixels = npt.NDArray[np.uint8]

# Rare formats are where decoders have had their holes; these are what image sets are made of.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_lock = threading.Lock()
# Without a handler, what Pillow logs about a damaged file would reach stderr beside our one line.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode_image(data: bytes, name: str, *, max_pixels: int = 64_000_000) -> Pixels:
    """Decode one image to uint8 RGB, upright.

    EXIF orientation is applied, 16 bits keep their high byte, transparency is dropped as torchvision's loader drops it,
    and of several frames the first is taken.

    Args:
        data: the file's bytes; the format is told from them, never from the name.
        name: the file named in messages.
        max_pixels: largest width times height (Pillow's own limit of 89 million holds as well).

    Returns:
        Array (H, W, 3).

    Raises:
        InputRefused: IMAGE-REFUSED: another format (compressed TIFF is one), damaged, truncated, too large, or with
            32-bit pixels.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            _check_png(data)
        with _strict_pillow(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _refusal(name, f"{width}x{height} is over the limit of {max_pixels / 1e6:g} million pixels")
            if any(tile[0] == "libtiff" for tile in image.tile):  # its decoders print to stderr, past Python
                raise _refusal(name, "compressed TIFF; save it as PNG")
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(_to_rgb(image))
    except (BltoError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refusal(name, f"over the limit of {max_pixels / 1e6:g} million pixels") from error
    except Exception as error:  # decoders meet damage with a dozen kinds of exception
        reason = (
            "not " + ", ".join(FORMATS) if isinstance(error, UnidentifiedImageError) else show(error, 100) or "damaged"
        )
        raise _refusal(name, reason) from error
    return pixels


def encode_png(pixels: Pixels) -> bytes:
    """The PNG file of a uint8 RGB array (H, W, 3); the same pixels give the same bytes."""
    return _encode(pixels, "PNG")


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """The JPEG file of a uint8 RGB array (H, W, 3), with colours at half the resolution (4:2:0); `quality` 1 to 95."""
    return _encode(pixels, "JPEG", quality=quality, subsampling="4:2:0")


def _encode(pixels: Pixels, kind: str, **options: Any) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        # Pillow would clip at 255. In PNG and PPM its mode "I" holds 16-bit values as well.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit; save it with 8 bits per channel")
    if image.mode == "P":
        image = image.convert("RGBA")  # the palette may carry transparency, which only RGBA can express
    return image.convert("RGB")


def _check_png(data: bytes) -> None:
    """Compare every chunk's CRC-32, which Pillow does not do for pixel data."""
    view = memoryview(data)
    start, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        length = int.from_bytes(view[start : start + 4], "big")
        body = view[start + 4 : start + 8 + length]
        kind = bytes(body[:4])
        checksum = view[start + 8 + length : start + 12 + length]
        if len(checksum) < 4 or zlib.crc32(body) != int.from_bytes(checksum, "big"):
            raise ValueError("damaged or truncated PNG")
        start += 12 + length


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Let warnings and truncated files raise. Both are settings of the whole process, hence the lock."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("error")
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _refusal(name: str, reason: str) -> InputRefused:
    return InputRefused(f"{show(name)}: {reason}. Replace the image or remove it.", code="IMAGE-REFUSED")
