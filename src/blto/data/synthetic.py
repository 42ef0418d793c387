"""An embedded data set, drawn from a seed: ten classes of textured shapes, no file and no download.

A class is a pair (shape, texture); every shape and every texture belongs to two classes, so neither alone decides.
Colours, position, size, rotation, background, light and clutter are drawn without looking at the class. Every draw comes
from Philox's raw stream and the drawing uses only correctly rounded arithmetic (no sin, exp or BLAS), so a seed gives
the same bytes on every platform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from blto.data.images import ImageSet
from blto.registry import Card

Array = npt.NDArray[np.float32]

SHAPES = ("disc", "ring", "square", "triangle", "cross")
TEXTURES = ("stripes", "checker", "dots", "grid", "zigzag")
CLASSES = tuple((SHAPES[i % 5], TEXTURES[(i + i // 5) % 5]) for i in range(10))
CHUNK = 256  # images drawn at once: keeps the working maps in cache


def uniforms(seed: int, purpose: int, start: int, count: int, width: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1), (count, width): rows `start` onwards of an endless table that depends on (seed, purpose)."""
    stream = np.random.Philox(np.random.SeedSequence([seed, purpose]))
    blocks, rest = divmod(start * width, 4)  # Philox yields four words for each counter value
    stream.advance(blocks)
    words = stream.random_raw(rest + count * width)[rest:]
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(count, width)


class Draws:
    """Hands out the columns of a table of uniforms one by one, as (B, 1, 1) float32."""

    def __init__(self, table: npt.NDArray[np.float64]) -> None:
        self._columns = iter(table.T)

    def between(self, low: float, high: float) -> Array:
        """Uniform in [low, high)."""
        return (low + (high - low) * next(self._columns)).astype(np.float32)[:, None, None]

    def direction(self, spread: float = 1.0) -> tuple[Array, Array]:
        """(cos, sin) of a random angle; `spread` 1 covers half a turn, 0.2 about +-23 degrees."""
        t = self.between(-spread, spread)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    def color(self, luminance: Array, chroma: float) -> Array:
        """A random colour of about the given luminance, (B, 3, 1, 1)."""
        offsets = np.stack([self.between(-chroma, chroma) for _ in range(3)], axis=1)
        return luminance[:, None] + offsets - (offsets[:, :1] + offsets[:, 1:2] + offsets[:, 2:]) / 3


def wave(phase: Array) -> Array:
    """A sine of period 1 made of two parabolas, in [-1, 1]: products and sums only."""
    f = phase - np.rint(phase)
    return 8 * f - 16 * f * abs(f)


def shape_depth(shape: str, x: Array, y: Array) -> Array:
    """How deep (x, y) lies inside a shape of radius about 1; negative outside."""
    if shape == "disc":
        return 0.9 - np.sqrt(x * x + y * y)
    if shape == "ring":
        return 0.29 - abs(np.sqrt(x * x + y * y) - 0.75)
    if shape == "square":
        return 0.8 - np.maximum(abs(x), abs(y))
    if shape == "triangle":
        return 0.58 - np.maximum(y, 0.866 * abs(x) - 0.5 * y)
    return np.maximum(
        np.minimum(0.38 - abs(x), 1 - abs(y)), np.minimum(1 - abs(x), 0.38 - abs(y))
    )  # cross


def texture_wave(texture: str, u: Array, v: Array) -> Array:
    """The texture at (u, v), measured in periods: 0 to 1 between the object's two colours."""
    if texture == "stripes":
        return 0.5 + 0.5 * wave(u)
    if texture == "checker":
        return np.clip(0.5 + 1.2 * wave(u * 0.7) * wave(v * 0.7), 0, 1)
    if texture == "dots":
        return np.clip(2.2 * (wave(u * 0.8) + wave(v * 0.8)) - 1.8, 0, 1)
    if texture == "grid":
        return np.clip(3 * np.maximum(wave(u * 0.6), wave(v * 0.6)) - 2, 0, 1)
    return 0.5 + 0.5 * wave(u + 0.45 * wave(v * 0.5))


def draw_chunk(seed: int, purpose: int, start: int, labels: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.uint8]:
    """Draw the images of rows `start` onwards, uint8 (B, 3, size, size)."""
    count = len(labels)
    u = Draws(uniforms(seed, purpose, start, count, 64))
    axis = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    # background
    a, b = u.color(u.between(0.35, 0.65), 0.25), u.color(u.between(0.35, 0.65), 0.25)
    c, s = u.direction()
    along, across = c * x + s * y, c * y - s * x
    px, py = u.between(-1, 1), u.between(-1, 1)
    kinds = [0.5 + 0.4 * along, 0.35 * ((x - px) ** 2 + (y - py) ** 2), 0.5 + 0.7 * along * across, 0.5 + 0.5 * wave(0.4 * along + 0.5 * px)]
    kind = u.between(0, 4).astype(np.int64)
    ramp = np.clip(np.choose(kind, kinds), 0, 1).astype(np.float32)
    image = a + (b - a) * ramp[:, None]

    # distractors
    for _ in range(2):
        dx, dy, dr = u.between(-1, 1), u.between(-1, 1), u.between(0.08, 0.22)
        present = u.between(-1, 1) > 0
        blob = np.clip((dr - np.sqrt((x - dx) ** 2 + (y - dy) ** 2)) * (size / 3) + 0.5, 0, 1) * present
        image += blob[:, None] * (u.color(u.between(0.2, 0.8), 0.25) - image)

    # object
    cx, cy, r = u.between(-0.25, 0.25), u.between(-0.25, 0.25), u.between(0.65, 0.9)
    c, s = u.direction(0.2)
    ox, oy = (c * (x - cx) + s * (y - cy)) / r, (c * (y - cy) - s * (x - cx)) / r
    c, s = u.direction()
    period = u.between(0.22, 0.30)
    pu, pv = u.between(0, 4), u.between(0, 4)
    tu, tv = (c * x + s * y) / period + pu, (c * y - s * x) / period + pv
    depth = np.empty((count, size, size), np.float32)
    grain = np.empty_like(depth)
    for k, (shape, texture) in enumerate(CLASSES):
        rows = labels == k
        depth[rows] = shape_depth(shape, ox[rows], oy[rows])
        grain[rows] = texture_wave(texture, tu[rows], tv[rows])
    mask = np.clip(0.5 + depth * r * (size / 2), 0, 1)
    swap = u.between(-1, 1) > 0
    grain = np.where(swap, 1 - grain, grain)
    light, dark = u.color(u.between(0.62, 0.85), 0.25), u.color(u.between(0.12, 0.38), 0.2)
    image += mask[:, None] * (dark + (light - dark) * grain[:, None] - image)

    # light
    c, s = u.direction()
    gain = u.between(0.75, 1.15) * (1 + u.between(-0.25, 0.25) * (c * x + s * y))
    image *= gain[:, None]
    noise = uniforms(seed, purpose + 1, start, count, 3 * size * size).reshape(image.shape)
    levels = image * np.float32(255) + (noise.astype(np.float32) - np.float32(0.5)) * np.float32(5)
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


class Synthetic:
    """Ten classes of textured shapes under varied colour, position, background and light.

    Args:
        train_size: training images.
        test_size: test images.
        image_size: height and width in pixels.
        generator_seed: what every image is a function of, with its split and its index.
    """

    card = Card(title="Synthetic shapes", summary="Ten classes of textured shapes drawn from a seed; no file needed.")

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

    def load(self, split: Literal["train", "test"], root: Path | None = None) -> ImageSet:
        """Draw one split; `root` is not used. The first k images do not depend on how many are drawn."""
        size = self.sizes[split]
        purpose = {"train": 0, "test": 10}[split]
        blocks = uniforms(self.generator_seed, purpose + 2, 0, -(-size // 10), 10)
        labels = np.argsort(blocks, axis=1, kind="stable").reshape(-1)[:size].astype(np.int64)
        images = np.empty((size, 3, self.image_size, self.image_size), np.uint8)
        for start in range(0, size, CHUNK):
            rows = slice(start, start + CHUNK)
            images[rows] = draw_chunk(self.generator_seed, purpose, start, labels[rows], self.image_size)
        return ImageSet(images, labels, tuple(f"{s}-{t}" for s, t in CLASSES), f"synthetic/{split}")
