"""The adjoints of the view steps on a CPU: what `gradient` takes in reverse, each in place on a gradient.

The loops over pixels choose by factors of 0 and 1 instead of branches, so that they are vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from blto.data.view_backends.fast import CONTRAST, SATURATION, Array, blur_weights, luma
from blto.runtime.kernels import kernel


@kernel(relaxed=True)
def resample_adjoint(gradient: Array, lines: Any, columns: Any, wide: Array, out: Array) -> None:
    """Add the adjoint of `resample` for `gradient` (3, S * S) to `out` (3, H, W)."""
    upper, lower, down = lines
    left, right, across = columns
    size = left.shape[0]
    for c in range(3):
        wide[upper[0] : lower[size - 1] + 1] = 0
        for j in range(size):
            for i in range(size):
                g = gradient[c, j * size + i]
                wide[upper[j], i] += g * (np.float32(1.0) - down[j])
                wide[lower[j], i] += g * down[j]
        for y in range(upper[0], lower[size - 1] + 1):
            for i in range(size):
                g = wide[y, i]
                out[c, y, left[i]] += g * (np.float32(1.0) - across[i])
                out[c, y, right[i]] += g * across[i]


@kernel(relaxed=True)
def blend_adjoint(before: Array, gradient: Array, op: int, factor: Any) -> None:
    """The adjoint of `blend` at `before` (3, P), in place on `gradient`."""
    rest = np.float32(1.0) - factor
    weights = (np.float32(0.2989), np.float32(0.587), np.float32(0.114))
    pixels = before.shape[1]
    if op == SATURATION:
        for i in range(pixels):
            x, y, z = before[0, i], before[1, i], before[2, i]
            other = rest * luma(x, y, z)
            gx = unclipped(factor * x + other, gradient[0, i])
            gy = unclipped(factor * y + other, gradient[1, i])
            gz = unclipped(factor * z + other, gradient[2, i])
            to_gray = rest * (gx + gy + gz)
            gradient[0, i] = factor * gx + weights[0] * to_gray
            gradient[1, i] = factor * gy + weights[1] * to_gray
            gradient[2, i] = factor * gz + weights[2] * to_gray
        return
    mean = to_mean = np.float32(0.0)
    if op == CONTRAST:
        for i in range(pixels):
            mean += luma(before[0, i], before[1, i], before[2, i])
        mean *= rest / np.float32(pixels)
    for c in range(3):
        for i in range(pixels):
            g = unclipped(factor * before[c, i] + mean, gradient[c, i])
            to_mean += g
            gradient[c, i] = factor * g
    if op == CONTRAST:
        to_mean *= rest / np.float32(pixels)
        for c in range(3):
            for i in range(pixels):
                gradient[c, i] += weights[c] * to_mean


@kernel(relaxed=True)
def unclipped(mixed: Any, gradient: Any) -> Any:
    """The gradient where a value was within [0, 1], else 0."""
    return gradient if (mixed >= np.float32(0.0)) & (mixed <= np.float32(1.0)) else np.float32(0.0)


@kernel(relaxed=True)
def ramp_adjoint(within: Any, chroma: Any, turn: Any, g: Any) -> Any:
    """The gradients at `within` and at `chroma` of what `shift_hue` adds for one channel, for `g` there."""
    one, two, six = np.float32(1.0), np.float32(2.0), np.float32(6.0)
    offset = within + chroma * turn
    near = abs(offset)
    far = near - six * chroma
    is_far = np.float32(near > abs(far))
    drop = two * chroma - min(near, abs(far))
    slope = np.float32(drop > 0) * g
    capped = np.float32(drop >= chroma) * slope
    slope -= capped
    side, around = two * np.float32(offset >= 0) - one, is_far * (two * np.float32(far >= 0) - one)
    d_offset = side * slope * (one - is_far + around)
    return d_offset, d_offset * turn - capped - slope * (two + six * around)


@kernel(relaxed=True)
def shift_hue_adjoint(before: Array, gradient: Array, factor: Any) -> None:
    """The adjoint of `shift_hue` at `before` (3, P), in place on `gradient`; names as there."""
    one, two, four = np.float32(1.0), np.float32(2.0), np.float32(4.0)
    shift = np.float32(6.0) * factor
    (r, g, b), (dr, dg, db) = (before[0], before[1], before[2]), (gradient[0], gradient[1], gradient[2])
    for i in range(r.shape[0]):
        x, y, z = r[i], g[i], b[i]
        top, bottom = max(max(x, y), z), min(min(x, y), z)
        chroma = top - bottom
        x_leads = np.float32(x == top)
        y_leads = np.float32(y == top) * (one - x_leads)
        z_leads = one - x_leads - y_leads
        within = x_leads * (y - z) + y_leads * (z - x) + z_leads * (x - y)
        turn = shift + two * y_leads + four * z_leads
        gx, gy, gz = dr[i], dg[i], db[i]
        x_within, x_chroma = ramp_adjoint(within, chroma, turn - np.float32(3.0), gx)
        y_within, y_chroma = ramp_adjoint(within, chroma, turn + one, gy)
        z_within, z_chroma = ramp_adjoint(within, chroma, turn - one, gz)
        d_within, d_chroma = x_within + y_within + z_within, x_chroma + y_chroma + z_chroma
        # ties share alike, as torch's amax and amin have it: gray pixels are common
        x_top, y_top, z_top = np.float32(x == top), np.float32(y == top), np.float32(z == top)
        x_low, y_low, z_low = np.float32(x == bottom), np.float32(y == bottom), np.float32(z == bottom)
        d_top, d_low = (gx + gy + gz + d_chroma) / (x_top + y_top + z_top), d_chroma / (x_low + y_low + z_low)
        dr[i] = d_top * x_top - d_low * x_low + d_within * (z_leads - y_leads)
        dg[i] = d_top * y_top - d_low * y_low + d_within * (x_leads - z_leads)
        db[i] = d_top * z_top - d_low * z_low + d_within * (y_leads - x_leads)


@kernel(relaxed=True)
def blur_adjoint(gradient: Array, sigma: float, radius: int, padded: Array) -> None:
    """The adjoint of `blur` for one channel (S, S), in place."""
    size, weights = gradient.shape[0], blur_weights(sigma, radius)
    for _axis in range(2):
        for j in range(size):
            padded[:] = 0
            for i in range(size):
                for k in range(-radius, radius + 1):
                    padded[radius + i + k] += weights[abs(k)] * gradient[j, i]
            for i in range(size):
                gradient[j, i] = padded[radius + i]
            for k in range(1, radius + 1):
                gradient[j, k] += padded[radius - k]
                gradient[j, size - 1 - k] += padded[radius + size - 1 + k]
        for j in range(size):
            for i in range(j):
                gradient[j, i], gradient[i, j] = gradient[i, j], gradient[j, i]
