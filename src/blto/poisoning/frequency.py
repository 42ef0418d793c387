"""CTRL's trigger: a constant added to diagonal DCT coefficients of an image's chroma, window by window.

Li et al., "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023, arXiv 2210.07346. The
maths is in float64 and on the scale of 8-bit values, so that a magnitude means what it means in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blto.errors import ConfigError
from blto.files import show
from blto.poisoning.trigger import UNBOUNDED, Trigger

RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
"""ITU-R BT.601, analogue: rows Y, U, V. Libraries round the way back to three digits; here it is the exact inverse, so
that a change of U and V leaves Y as it is."""
YUV_TO_RGB: npt.NDArray[np.float64] = np.linalg.inv(RGB_TO_YUV)


def rgb_to_yuv(images: Tensor) -> Tensor:
    """RGB (B, 3, H, W) of any scale -> float64 YUV of the same scale."""
    return _mix(RGB_TO_YUV, images)


def yuv_to_rgb(images: Tensor) -> Tensor:
    """The inverse of `rgb_to_yuv`."""
    return _mix(YUV_TO_RGB, images)


@lru_cache(maxsize=8)
def dct_matrix(size: int) -> npt.NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix D (size, size): D x is the transform of x, and D^T undoes it."""
    frequency, place = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix: npt.NDArray[np.float64] = np.sqrt(2 / size) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def dct(planes: Tensor, window: int) -> Tensor:
    """Two-dimensional orthonormal DCT-II of every window x window block.

    Args:
        planes: (B, C, H, W).
        window: a divisor of H and W.

    Returns:
        float64 (B, C, H / window, W / window, window, window): rows and columns of blocks, then of coefficients.
    """
    batch, channels, height, width = planes.shape
    blocks = planes.double().reshape(batch, channels, height // window, window, width // window, window)
    basis = _on(planes, dct_matrix(window))
    return basis @ blocks.transpose(3, 4) @ basis.T


def inverse_dct(coefficients: Tensor) -> Tensor:
    """The planes (B, C, H, W) that `dct` made the coefficients from."""
    batch, channels, rows, columns, window, _ = coefficients.shape
    basis = _on(coefficients, dct_matrix(window))
    blocks = basis.T @ coefficients @ basis
    return blocks.transpose(3, 4).reshape(batch, channels, rows * window, columns * window)


def shift_chroma(images: Tensor, magnitude: float, *, window: int, positions: Sequence[int]) -> Tensor:
    """Add `magnitude` to the coefficients (p, p), p in `positions`, of U and of V in every window; Y stays.

    Args:
        images: (B, 3, H, W) in [0, 1].
        magnitude: on the scale of 8-bit values.
        window: a divisor of H and W.
        positions: each in [0, window).

    Returns:
        The same shape and type, not clipped.
    """
    yuv = rgb_to_yuv(images.double() * 255)
    coefficients = dct(yuv[:, 1:], window)
    for position in positions:
        coefficients[..., position, position] += magnitude
    shifted = torch.cat([yuv[:, :1], inverse_dct(coefficients)], dim=1)
    return (yuv_to_rgb(shifted) / 255).to(images.dtype)


class FrequencyTrigger(Trigger):
    """`shift_chroma` with one magnitude for poisons and another one for test images; it has no budget.

    Args:
        magnitude: of poisons: what calling this trigger adds.
        test_magnitude: of test images: what calling `at_test()` adds.
        window: side of the DCT's windows, in pixels.
        positions: which diagonal coefficients, each once.

    Raises:
        ConfigError: a position outside of the window or given twice; images that the windows do not tile.
    """

    kind = "frequency"

    def __init__(self, *, magnitude: float, test_magnitude: float, window: int, positions: Sequence[int]) -> None:
        super().__init__(UNBOUNDED)
        check_positions(positions, window, "frequency trigger: positions")
        self.magnitude, self.test_magnitude = float(magnitude), float(test_magnitude)
        self.window, self.positions = window, tuple(positions)

    def candidate(self, images: Tensor) -> Tensor:
        """The images with their chroma shifted."""
        if images.shape[-2] % self.window or images.shape[-1] % self.window:
            raise ConfigError(
                f"frequency trigger: its windows of {self.window} pixels do not tile images of "
                f"{tuple(images.shape[-2:])}; use images of the size it was made for."
            )
        return shift_chroma(images, self.magnitude, window=self.window, positions=self.positions)

    def at_test(self) -> FrequencyTrigger:
        """The same with the magnitude of test images."""
        again = self.test_magnitude
        return FrequencyTrigger(magnitude=again, test_magnitude=again, window=self.window, positions=self.positions)

    def spec(self) -> dict[str, Any]:
        """Both magnitudes, the window and the positions."""
        return {
            "kind": self.kind,
            "magnitude": self.magnitude,
            "test_magnitude": self.test_magnitude,
            "window": self.window,
            "positions": list(self.positions),
        }


def check_positions(positions: Sequence[int], window: int, key: str) -> None:
    """Raises ConfigError, under `key`, where a position is no row of the window or stands there twice."""
    if not positions or len(set(positions)) < len(positions) or not all(0 <= each < window for each in positions):
        raise ConfigError(
            f"{key} are {show(', '.join(map(str, positions)), 60) or 'none'}, and a window has {window} coefficients a "
            f"side; give different numbers from 0 to {window - 1}."
        )


def _mix(matrix: npt.NDArray[np.float64], images: Tensor) -> Tensor:
    """Each pixel's three channels, multiplied by a matrix (3, 3)."""
    return torch.einsum("dc,bchw->bdhw", _on(images, matrix), images.double())


def _on(like: Tensor, matrix: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(matrix).to(like.device)
