"""Image files: what is accepted becomes upright 8-bit RGB, everything else is one line that names the file."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile

from blto.errors import InputRefused
from blto.files.images import decode_image, encode_jpeg, encode_png

Pixels = npt.NDArray[np.uint8]
LOSSLESS = {"PNG": {}, "BMP": {}, "PPM": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def random_pixels(height: int = 12, width: int = 9) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png(header: bytes, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand, for what Pillow cannot write."""
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(InputRefused) as error:
        decode_image(data, "cat/007.png", **options)
    assert error.value.code == "IMAGE-REFUSED"
    assert str(error.value).startswith("cat/007.png: ")
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    pixels = random_pixels()
    decoded = decode_image(encoded(pixels, kind, **LOSSLESS[kind]), "a")
    np.testing.assert_array_equal(decoded, pixels)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable


def test_our_png_is_lossless_and_stable() -> None:
    pixels = random_pixels()
    np.testing.assert_array_equal(decode_image(encode_png(pixels), "a"), pixels)
    assert encode_png(pixels) == encode_png(pixels.transpose(1, 0, 2).copy().transpose(1, 0, 2))


@pytest.mark.parametrize("bad", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3))])
def test_only_uint8_rgb_is_encoded(bad: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(bad)
    with pytest.raises(ValueError, match="uint8"):
        encode_jpeg(bad, 90)


def test_our_jpeg_is_that_of_its_quality() -> None:
    pixels = random_pixels(40, 24)
    for quality in (50, 90):
        assert encode_jpeg(pixels, quality) == encoded(
            pixels, "JPEG", quality=quality
        )  # whose colours are at a half too


def test_jpeg_is_as_pillow_decodes_it() -> None:
    data = encoded(random_pixels(), "JPEG")
    np.testing.assert_array_equal(decode_image(data, "a"), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(random_pixels()).convert(mode)
    kind = {"LA": "PNG", "RGBA": "PNG", "1": "PNG", "P": "PNG"}.get(mode, "TIFF")
    np.testing.assert_array_equal(decode_image(encoded(image, kind), "a"), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_from_a_palette_too() -> None:
    image = Image.fromarray(random_pixels()).convert("P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_image(data, "a"), np.asarray(image.convert("RGB")))


def test_orientation_is_applied() -> None:
    pixels = random_pixels()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be upright
    np.testing.assert_array_equal(decode_image(encoded(pixels, "PNG", exif=exif), "a"), np.rot90(pixels, -1))


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for data in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        encoded(Image.fromarray(values.astype(np.int32)), "PPM"),
        b"P5 3 2 65535\n" + values.astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(decode_image(data, "a"), expected)
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    color = png(struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0), rows)
    np.testing.assert_array_equal(decode_image(color, "a"), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_deflate"])
def test_compressed_tiff_is_refused(compression: str) -> None:
    assert "compressed TIFF; save it as PNG" in refusal(encoded(random_pixels(), "TIFF", compression=compression))


def test_nothing_but_the_refusal_is_said() -> None:
    data = bytearray(encoded(random_pixels(), "TIFF"))
    entry = data.index(struct.pack("<HHIH", 277, 3, 1, 3))  # samples per pixel, of which Pillow complains in its log
    data[entry + 9] = 4
    program = (
        f"from blto.files.images import decode_image\ntry: decode_image({bytes(data)!r}, 'a')\nexcept Exception: pass"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype: type) -> None:
    assert "32-bit" in refusal(encoded(Image.fromarray(np.zeros((2, 2), dtype)), "TIFF"))


def test_the_first_of_several_frames_is_taken() -> None:
    first, second = (Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200))
    for kind in ("PNG", "TIFF", "WEBP"):
        data = encoded(
            first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
        )
        np.testing.assert_array_equal(decode_image(data, "a"), np.asarray(first))


@pytest.mark.parametrize("kind", ["GIF", "EPS", "ICO", "PCX", "TGA", "JPEG2000"])
def test_other_formats_are_refused_whatever_their_name(kind: str) -> None:
    assert "not PNG, JPEG" in refusal(encoded(random_pixels(), kind))


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"BM", b"P6", b"II*\0", b"\xff\xd8\xff", b"%!PS-Adobe", b"x" * 99]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF"])
def test_truncated_files_are_refused_even_where_pillow_was_told_to_be_lenient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(random_pixels(40, 40), kind)
    for part in (0.1, 0.5, 0.9):
        refusal(data[: int(part * len(data))])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_one_damaged_bit_in_png_pixels_is_found() -> None:
    pixels = random_pixels(40, 40)
    data = bytearray(encode_png(pixels))
    data[data.index(b"IDAT") + 200] ^= 1
    assert "damaged or truncated PNG" in refusal(bytes(data))


def test_the_size_limit_holds_before_pixels_are_decoded() -> None:
    data = encode_png(random_pixels(8, 8))
    assert decode_image(data, "a", max_pixels=64).shape == (8, 8, 3)
    assert "8x8 is over the limit of 6.3e-05 million pixels" in refusal(data, max_pixels=63)
    for side in (9_000, 12_000, 30_000):  # over our limit, over Pillow's warning, over Pillow's error
        bomb = png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), bytes(100))
        assert "over the limit of 64 million pixels" in refusal(bomb)


def test_a_text_bomb_and_an_empty_size_are_refused() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    assert decode_image(png(header, bytes(4)), "a").shape == (1, 1, 3)
    refusal(png(header, bytes(4), (b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000)))))
    refusal(png(struct.pack(">IIBBBBB", 0, 1, 8, 2, 0, 0, 0), bytes(4)))


def test_names_are_shown_safely() -> None:
    with pytest.raises(InputRefused, match=r"a\\x1b\[2J\.png: ") as error:
        decode_image(b"", "a\x1b[2J.png")
    assert str(error.value).isprintable()


def test_threads_take_turns_because_warnings_belong_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    real = Image.open

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        inside -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", slow)
    pixels = [random_pixels(10 + number, 7) for number in range(20)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode_image, map(encode_png, pixels), map(str, range(20))))
    for one, other in zip(decoded, pixels, strict=True):
        np.testing.assert_array_equal(one, other)
    assert most == 1
    assert list(warnings.filters) == before
