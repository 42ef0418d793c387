"""An embedded data set, drawn from a seed: ten classes of textured shapes, no file and no download.

A class is a pair (shape, texture). Colours, position, size, rotation, background, light and clutter are drawn without
looking at it, so it cannot be read from colour or position alone, and textures keep it visible in a small crop.

Every draw comes from Philox's raw stream and the drawing uses correctly rounded arithmetic only (no sin, exp, reduction
or BLAS), so a seed gives the same bytes on every platform. Lengths are in half-widths: an image spans [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from blto.data.images import ImageSet, Split
from blto.registry import Card
from blto.runtime.progress import ON_STANDARD_ERROR, Progress

Map = npt.NDArray[Any]  # floats, (B, H, W) or broadcastable to it

CLASSES = (
    ("disc", "stripes"),
    ("disc", "rings"),
    ("ring", "dots"),
    ("ring", "checker"),
    ("square", "dots"),
    ("square", "grid"),
    ("triangle", "zigzag"),
    ("triangle", "bands"),
    ("cross", "checker"),
    ("cross", "fade"),
)
CENTERED = ("rings", "fade")  # textures that start from the middle of their shape; the others have a random phase
CHUNK = 256  # images drawn at once: keeps the working maps in cache
COLUMNS = 64  # uniforms set aside for one image, of which the drawing uses some 50
NOISE_LEVELS = 5.0  # width of the uniform sensor noise in 8-bit levels: a standard deviation of 1.44


def uniforms(key: tuple[int, ...], start: int, count: int, width: int) -> Map:
    """Rows `start` to `start + count` of the endless table of uniforms in [0, 1) that belongs to `key`."""
    stream = np.random.Philox(np.random.SeedSequence(key))
    blocks, rest = divmod(start * width, 4)  # Philox yields four words per counter value
    stream.advance(blocks)
    words = stream.random_raw(rest + count * width)[rest:]
    return (words >> np.uint64(11)).astype(np.float64).reshape(count, width) * 2.0**-53


class Draws:
    """Hands out the columns of a (B, K) table of uniforms one by one, as maps (B, 1, 1)."""

    def __init__(self, table: Map) -> None:
        self._columns = iter(table.T)

    def between(self, low: float, high: float) -> Map:
        """Uniform in [low, high)."""
        column: Map = low + (high - low) * next(self._columns)
        return column.astype(np.float32)[:, None, None]

    def coin(self) -> Map:
        """1 half of the time, else 0."""
        return np.rint(self.between(0, 1))

    def rotate(self, x: Map, y: Map, spread: float = 1.0) -> tuple[Map, Map]:
        """Turn (x, y) by a random angle: up to a quarter turn either way, or 23 degrees with `spread` 0.2."""
        t = self.between(-spread, spread)  # the tangent of half the angle gives sine and cosine by division alone
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return cos * x + sin * y, cos * y - sin * x

    def color(self, luminance: Map, chroma: float) -> Map:
        """A random colour (B, 3, 1, 1) whose channels average to `luminance`."""
        offsets: Map = np.stack([self.between(-chroma, chroma) for _ in range(3)], axis=1)
        return luminance[:, None] + offsets - (offsets[:, :1] + offsets[:, 1:2] + offsets[:, 2:]) / 3


def wave(phase: Map) -> Map:
    """A sine of period 1 made of two parabolas, in [-1, 1]."""
    f = phase - np.rint(phase)
    sine: Map = 8 * f - 16 * f * abs(f)
    return sine


# How deep (x, y) lies inside a shape of radius about 1; negative outside.
SHAPES: dict[str, Callable[[Map, Map], Map]] = {
    "disc": lambda x, y: 0.9 - np.sqrt(x * x + y * y),
    "ring": lambda x, y: 0.29 - abs(np.sqrt(x * x + y * y) - 0.75),
    "square": lambda x, y: 0.8 - np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y: 0.58 - np.maximum(y, 0.866 * abs(x) - 0.5 * y),
    "cross": lambda x, y: np.maximum(np.minimum(0.38 - abs(x), 1 - abs(y)), np.minimum(1 - abs(x), 0.38 - abs(y))),
}

# From 0 to 1 between the two colours of a shape, at (u, v) measured in periods.
TEXTURES: dict[str, Callable[[Map, Map], Map]] = {
    "stripes": lambda u, v: 0.5 + 0.5 * wave(u),
    "rings": lambda u, v: 0.5 + 0.5 * wave(np.sqrt(u * u + v * v)),
    "dots": lambda u, v: np.clip(2.2 * (wave(u * 0.8) + wave(v * 0.8)) - 1.8, 0, 1),
    "checker": lambda u, v: np.clip(0.5 + 1.2 * wave(u * 0.7) * wave(v * 0.7), 0, 1),
    "grid": lambda u, v: np.clip(3 * np.maximum(wave(u * 0.6), wave(v * 0.6)) - 2, 0, 1),
    "zigzag": lambda u, v: 0.5 + 0.5 * wave(u + 0.45 * wave(v * 0.5)),
    "bands": lambda u, v: np.clip(2 * wave(u * 0.5) - 0.5, 0, 1),
    "fade": lambda u, v: np.clip(0.5 + 0.22 * u, 0, 1),
}


def background(u: Draws, x: Map, y: Map) -> Map:
    """A smooth gradient of one of four kinds between two colours, (B, 3, H, W)."""
    first, second = u.color(u.between(0.35, 0.65), 0.25), u.color(u.between(0.35, 0.65), 0.25)
    along, across = u.rotate(x, y)
    px, py = u.between(-1, 1), u.between(-1, 1)
    linear = 0.5 + 0.4 * along
    radial = 0.35 * ((x - px) * (x - px) + (y - py) * (y - py))
    saddle = 0.5 + 0.7 * along * across
    swell = 0.5 + 0.5 * wave(0.4 * along + 0.5 * px)
    ramp = np.choose(u.between(0, 4).astype(np.int64), (linear, radial, saddle, swell))
    image: Map = first + (second - first) * np.clip(ramp, 0, 1)[:, None]
    return image


def draw_clutter(image: Map, u: Draws, x: Map, y: Map) -> None:
    """Put one small soft disc of any colour on half of the images, in place."""
    dx, dy, radius = x - u.between(-1, 1), y - u.between(-1, 1), u.between(0.08, 0.22)
    cover = np.clip((radius - np.sqrt(dx * dx + dy * dy)) * (x.size / 3) + 0.5, 0, 1) * u.coin()
    image += cover[:, None] * (u.color(u.between(0.2, 0.8), 0.25) - image)


def draw_object(image: Map, u: Draws, x: Map, y: Map, labels: npt.NDArray[np.int64]) -> None:
    """Put the textured shape of each image's class on it, in place."""
    dx, dy, radius = x - u.between(-0.25, 0.25), y - u.between(-0.25, 0.25), u.between(0.65, 0.9)
    sx, sy = u.rotate(dx / radius, dy / radius, spread=0.2)
    period = u.between(0.26, 0.34)
    tx, ty = u.rotate(dx / period, dy / period)
    phase_x, phase_y = u.between(0, 4), u.between(0, 4)
    depth, grain = np.empty_like(sx), np.empty_like(sx)
    for label, (shape, texture) in enumerate(CLASSES):
        k = labels == label
        shift = 0 if texture in CENTERED else 1
        depth[k] = SHAPES[shape](sx[k], sy[k])
        grain[k] = TEXTURES[texture](tx[k] + shift * phase_x[k], ty[k] + shift * phase_y[k])
    grain = np.where(u.coin() > 0, 1 - grain, grain)
    light, dark = u.color(u.between(0.62, 0.85), 0.25), u.color(u.between(0.12, 0.38), 0.2)
    cover = np.clip(0.5 + depth * radius * (x.size / 2), 0, 1)
    image += cover[:, None] * (dark + (light - dark) * grain[:, None] - image)


def draw(key: tuple[int, ...], start: int, labels: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.uint8]:
    """Draw the images of index `start` onwards, one per label (B,), as uint8 (B, 3, size, size)."""
    u = Draws(uniforms((*key, 0), start, len(labels), COLUMNS))
    axis = (2 * np.arange(size, dtype=np.float32) + 1) / np.float32(size) - 1
    x, y = axis[None, None, :], axis[None, :, None]
    image = background(u, x, y)
    draw_clutter(image, u, x, y)
    draw_clutter(image, u, x, y)
    draw_object(image, u, x, y, labels)
    lit, _ = u.rotate(x, y)
    image *= (u.between(0.75, 1.15) * (1 + u.between(-0.25, 0.25) * lit))[:, None]
    noise = uniforms((*key, 1), start, len(labels), image[0].size).reshape(image.shape).astype(np.float32) - 0.5
    levels: Map = np.rint(np.clip(255 * image + NOISE_LEVELS * noise, 0, 255))
    return levels.astype(np.uint8)


class Synthetic:
    """Ten classes of textured shapes under varied colour, position, background and light.

    Args:
        train_size: number of training images.
        test_size: number of test images.
        image_size: height and width in pixels.
        generator_seed: every image is a function of it, the split and the image's index.
    """

    card = Card(
        title="Synthetic shapes",
        summary="Ten classes of textured shapes under varied colour, position and light, drawn from a seed; no file.",
    )

    def __init__(
        self,
        *,
        train_size: Annotated[int, Field(ge=10, le=1_000_000)] = 4000,
        test_size: Annotated[int, Field(ge=10, le=1_000_000)] = 1000,
        image_size: Annotated[int, Field(ge=16, le=256)] = 32,
        generator_seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.sizes = {"train": train_size, "test": test_size}
        self.image_size = image_size
        self.generator_seed = generator_seed

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Draw one split; no file is read. The first k images are the same however many are drawn."""
        size = self.sizes[split]
        key = (self.generator_seed, int(split == "test"))
        # Each block of ten consecutive images holds every class once, in an order of its own.
        order = np.argsort(uniforms((*key, 2), 0, -(-size // len(CLASSES)), len(CLASSES)), axis=1, kind="stable")
        labels = order.reshape(-1)[:size].astype(np.int64)
        images = np.empty((size, 3, self.image_size, self.image_size), np.uint8)
        for start in range(0, size, CHUNK):
            rows = slice(start, start + CHUNK)
            images[rows] = draw(key, start, labels[rows], self.image_size)
        return ImageSet(images, labels, tuple(f"{shape}-{texture}" for shape, texture in CLASSES), "synthetic")
