"""The CPU kernels of the views: drawing parameters, and the fast back end.

Every kernel runs over a range of samples; `runtime.kernels.split` gives each thread its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from blto.runtime.kernels import kernel

Array = np.ndarray[Any, Any]
Arrays = tuple[Array, ...]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
# Each purpose owns fixed counters, so that a recipe's change of one probability leaves all other draws as they were.
CROP_TRIES = 10
SLOT_FLIP, SLOT_JITTER, SLOT_ORDER, SLOT_FACTORS, SLOT_GRAY, SLOT_BLUR, SLOT_SOLARIZE = 40, 41, 42, 45, 49, 50, 52
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3


@kernel()
def mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


@kernel()
def uniform(key: Any, slot: int) -> float:
    """The `slot`-th uniform number in [0, 1) of the stream `key`: SplitMix64, which is counter-based."""
    return float(mix(key + GOLDEN * np.uint64(slot + 1)) >> np.uint64(11)) * 2.0**-53


@kernel()
def draw_crop(key: Any, height: int, width: int, area: Any, ratio: Array, box: Array) -> None:
    """Random resized crop as in torchvision's `RandomResizedCrop.get_params`; `box` becomes (y, x, h, w)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(CROP_TRIES):
        slot = 4 * attempt
        target = height * width * (area[0] + (area[1] - area[0]) * uniform(key, slot))
        aspect = math.exp(low + (high - low) * uniform(key, slot + 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            box[0] = int(uniform(key, slot + 2) * (height - h + 1))
            box[1] = int(uniform(key, slot + 3) * (width - w + 1))
            box[2], box[3] = h, w
            return
    h, w = height, width
    if width < height * ratio[0]:
        h = round(width / ratio[0])
    elif width > height * ratio[1]:
        w = round(height * ratio[1])
    box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, h, w


@kernel()
def draw_crop_near(
    key: Any, first: Array, margin: float, height: int, width: int, area: Array, ratio: Array, box: Array
) -> None:
    """A crop inside the box `first` enlarged by `margin` of its sides all around, of `area` of the whole image."""
    down, across = int(margin * first[2]), int(margin * first[3])
    top, left = max(first[0] - down, 0), max(first[1] - across, 0)
    h, w = min(first[0] + first[2] + down, height) - top, min(first[1] + first[3] + across, width) - left
    whole = height * width / (h * w)
    draw_crop(key, h, w, (min(area[0] * whole, 1.0), min(area[1] * whole, 1.0)), ratio, box)
    box[0] += top
    box[1] += left


@kernel()
def draw_parameters(
    seed: Any,
    epoch: Any,
    view: Any,
    samples: Array,
    height: int,
    width: int,
    area: Array,
    ratio: Array,
    chances: Array,
    ranges: Array,
    sigma: Array,
    threshold: float,
    margin: float,
    out: Arrays,
) -> None:
    """Fill the parameter arrays of `ViewParameters`; row b depends on (seed, epoch, samples[b], view) alone.

    `chances` = probability of (flip, jitter, gray, blur, solarize); `ranges` (4, 2) = low and high of the four factors;
    with a `margin` of 0 or more, later views are cropped near the first one.
    """
    boxes, flips, orders, factors, grays, sigmas, thresholds = out
    epochs = mix(mix(seed + GOLDEN) ^ epoch)
    run, first_run = mix(epochs + view), mix(epochs)
    localized = margin >= 0 and view > 0
    first = np.empty(4, np.int32)
    for b in range(samples.shape[0]):
        sample = mix(np.uint64(samples[b]) + GOLDEN)
        key = mix(run ^ sample)
        if localized:
            draw_crop(mix(first_run ^ sample), height, width, area, ratio, first)
            draw_crop_near(key, first, margin, height, width, area, ratio, boxes[b])
        else:
            draw_crop(key, height, width, area, ratio, boxes[b])
        flips[b] = uniform(key, SLOT_FLIP) < chances[0]
        for op in range(4):
            orders[b, op] = op
        for last in range(3, 0, -1):  # Fisher-Yates
            other = int(uniform(key, SLOT_ORDER + last - 1) * (last + 1))
            orders[b, last], orders[b, other] = orders[b, other], orders[b, last]
        jittered = uniform(key, SLOT_JITTER) < chances[1]
        for op in range(4):
            drawn = ranges[op, 0] + (ranges[op, 1] - ranges[op, 0]) * uniform(key, SLOT_FACTORS + op)
            factors[b, op] = drawn if jittered else (0.0 if op == HUE else 1.0)
        grays[b] = uniform(key, SLOT_GRAY) < chances[2]
        drawn = sigma[0] + (sigma[1] - sigma[0]) * uniform(key, SLOT_BLUR + 1)
        sigmas[b] = drawn if uniform(key, SLOT_BLUR) < chances[3] else 0.0
        thresholds[b] = threshold if uniform(key, SLOT_SOLARIZE) < chances[4] else np.inf


@kernel()
def taps(start: int, length: int, flip: bool, low: Array, high: Array, weight: Array) -> None:
    """For each output pixel along one axis: its two source pixels inside the crop, and the second one's weight."""
    size = low.shape[0]
    scale = np.float32(length) / np.float32(size)
    for i in range(size):
        at = size - 1 - i if flip else i
        place = max((np.float32(at) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0.0))
        first = min(int(place), length - 1)
        low[i] = start + first
        high[i] = start + min(first + 1, length - 1)
        weight[i] = place - np.float32(first)


@kernel(relaxed=True)
def resample(image: Array, box: Array, flip: bool, columns: Any, lines: Any, wide: Array, work: Array) -> None:
    """Bilinear crop, resize and flip of uint8 (3, H, W) into float32 `work` (3, S * S) in [0, 1]."""
    left, right, across = columns
    upper, lower, down = lines
    size = left.shape[0]
    taps(box[1], box[3], flip, left, right, across)
    taps(box[0], box[2], False, upper, lower, down)
    top = box[0]
    for c in range(3):
        for y in range(box[2]):
            for i in range(size):
                a = np.float32(image[c, top + y, left[i]])
                wide[y, i] = a + (np.float32(image[c, top + y, right[i]]) - a) * across[i]
        for j in range(size):
            first, second, weight = wide[upper[j] - top], wide[lower[j] - top], down[j]
            line = work[c, j * size : (j + 1) * size]
            for i in range(size):
                line[i] = (first[i] + (second[i] - first[i]) * weight) / np.float32(255.0)


@kernel(relaxed=True)
def luma(r: Any, g: Any, b: Any) -> Any:
    """torchvision's gray value."""
    return np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b


@kernel(relaxed=True)
def clip(x: Any) -> Any:
    """Into [0, 1]."""
    return min(max(x, np.float32(0.0)), np.float32(1.0))


@kernel(relaxed=True)
def shift_hue(r: Array, g: Array, b: Array, factor: Any) -> None:
    """Turn the hue by `factor` of the circle: HSV there and back without a division (see `batched.shift_hue`)."""
    zero, two, four = np.float32(0.0), np.float32(2.0), np.float32(4.0)
    turn = np.float32(6.0) * factor
    for i in range(r.shape[0]):
        x, y, z = r[i], g[i], b[i]
        top = max(max(x, y), z)
        chroma = top - min(min(x, y), z)
        within = y - z if top == x else (z - x if top == y else x - y)
        sector = zero if top == x else (two if top == y else four)
        angle = within + chroma * (sector + turn)
        circle, twice = np.float32(6.0) * chroma, two * chroma
        red, green, blue = abs(angle - np.float32(3.0) * chroma), abs(angle + chroma), abs(angle - chroma)
        r[i] = max(top - min(max(twice - min(red, abs(red - circle)), zero), chroma), zero)
        g[i] = max(top - min(max(twice - min(green, abs(green - circle)), zero), chroma), zero)
        b[i] = max(top - min(max(twice - min(blue, abs(blue - circle)), zero), chroma), zero)


@kernel(relaxed=True)
def blend(r: Array, g: Array, b: Array, op: int, factor: Any) -> None:
    """Brightness, contrast or saturation: `factor * image + (1 - factor) * other`, clamped to [0, 1].

    `other` is black, the mean gray value of the image, or the gray image.
    """
    rest = np.float32(1.0) - factor
    pixels = r.shape[0]
    if op == SATURATION:
        for i in range(pixels):
            gray = rest * luma(r[i], g[i], b[i])
            r[i], g[i], b[i] = clip(factor * r[i] + gray), clip(factor * g[i] + gray), clip(factor * b[i] + gray)
        return
    other = np.float32(0.0)
    if op == CONTRAST:
        for i in range(pixels):
            other += luma(r[i], g[i], b[i])
        other *= rest / np.float32(pixels)
    for i in range(pixels):
        r[i], g[i], b[i] = clip(factor * r[i] + other), clip(factor * g[i] + other), clip(factor * b[i] + other)


@kernel()
def blur_weights(sigma: float, radius: int) -> Array:
    """(radius + 1,) weights of a Gaussian at the distances 0 to `radius`; both sides together sum to 1."""
    weights = np.empty(radius + 1, np.float32)
    total = 1.0
    for k in range(1, radius + 1):
        total += 2.0 * math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        weights[k] = math.exp(-0.5 * (k / sigma) ** 2) / total
    return weights


@kernel(relaxed=True)
def blur(image: Array, sigma: float, radius: int, padded: Array) -> None:
    """Gaussian blur of one channel (S, S) in place; the border is reflected, as in torchvision."""
    size, weights = image.shape[0], blur_weights(sigma, radius)
    for _axis in range(2):
        for j in range(size):  # blurs along lines and writes them as columns: twice makes both axes
            for i in range(size):
                padded[radius + i] = image[j, i]
            for k in range(1, radius + 1):
                padded[radius - k] = image[j, k]
                padded[radius + size - 1 + k] = image[j, size - 1 - k]
            for i in range(size):
                image[j, i] = weights[0] * padded[radius + i]
            for k in range(1, radius + 1):
                for i in range(size):
                    image[j, i] += weights[k] * (padded[radius + i - k] + padded[radius + i + k])
        for j in range(size):
            for i in range(j):
                image[j, i], image[i, j] = image[i, j], image[j, i]


@kernel(relaxed=True)
def recolor(work: Array, order: Array, factors: Array, gray: bool) -> None:
    """Color jitter in the sample's own order, then grayscale, in place on (3, S * S)."""
    r, g, b = work[0], work[1], work[2]
    for step in range(4):
        op = order[step]
        factor = factors[op]
        if op == HUE:
            if factor != np.float32(0.0):
                shift_hue(r, g, b, factor)
        elif factor != np.float32(1.0):
            blend(r, g, b, op, factor)
    if gray:
        for i in range(r.shape[0]):
            r[i] = luma(r[i], g[i], b[i])
            g[i] = r[i]
            b[i] = r[i]


@kernel(relaxed=True)
def render(
    images: Array,
    rows: Array,
    parameters: Arrays,
    radius: int,
    out: Array,
    start: int,
    stop: int,
) -> None:
    """Views `start` to `stop` of `images[rows]`: uint8 (N, 3, H, W) to `out` (B, S, S, 3) float32 in [0, 1]."""
    boxes, flips, orders, factors, grays, sigmas, thresholds = parameters
    size = out.shape[1]
    wide = np.empty((images.shape[2], size), np.float32)
    work = np.empty((3, size * size), np.float32)
    padded = np.empty(size + 2 * radius, np.float32)
    columns = (np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32))
    lines = (np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32))
    for b in range(start, stop):
        resample(images[rows[b]], boxes[b], flips[b], columns, lines, wide, work)
        recolor(work, orders[b], factors[b], grays[b])
        if sigmas[b] > 0:
            for c in range(3):
                blur(work[c].reshape(size, size), sigmas[b], radius, padded)
        if thresholds[b] <= 1:
            for c in range(3):
                for i in range(size * size):
                    work[c, i] = np.float32(1.0) - work[c, i] if work[c, i] >= thresholds[b] else work[c, i]
        view = out[b].reshape(size * size, 3)
        for i in range(size * size):
            view[i, 0], view[i, 1], view[i, 2] = work[0, i], work[1, i], work[2, i]
