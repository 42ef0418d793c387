"""How visible a trigger is: distances between images with and without it.

Images are (N, C, H, W), arrays or tensors, either uint8 or floats in [0, 1]; distances are in units of that [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from blto.errors import ConfigError

Images = Tensor | npt.NDArray[Any]


def linf(clean: Images, changed: Images) -> Tensor:
    """The largest change of any value of each image: (N,), in [0, 1]."""
    a, b = _pair(clean, changed)
    return (a - b).abs().flatten(1).amax(dim=1)


def l2(clean: Images, changed: Images) -> Tensor:
    """The Euclidean norm of the change of each image: (N,), in [0, sqrt(C H W)]."""
    a, b = _pair(clean, changed)
    return (a - b).flatten(1).square().sum(dim=1).sqrt()


def psnr(clean: Images, changed: Images) -> Tensor:
    """Peak signal-to-noise ratio of each image, -10 log10(mean squared error): (N,), dB; infinite if unchanged."""
    a, b = _pair(clean, changed)
    return -10 * (a - b).square().flatten(1).mean(dim=1).log10()


def ssim(clean: Images, changed: Images) -> Tensor:
    """Structural similarity of each image (Wang et al., IEEE TIP 2004, section III): (N,), at most 1.

    Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over pixels and channels. Borders are
    reflected, as torchmetrics does: on 32 x 32 images half of the windows touch a border, too many to leave out. Images
    of 5 pixels or fewer get the largest window that reflection allows.
    """
    a, b = _pair(clean, changed)
    radius = min(5, a.shape[-2] - 1, a.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (weights / weights.sum()).float().to(a.device)

    def blur(maps: Tensor) -> Tensor:
        planes = F.pad(maps, [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(1)  # (N C, 1, H + 10, W + 10)
        return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a.square()
    variance_b = blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).reshape(len(a), -1).mean(dim=1)


def measure_stealth(clean: Images, changed: Images, *, batch_size: int = 512) -> dict[str, float]:
    """The visibility of a trigger over a set of images, as plain numbers for a record.

    Returns:
        `changed`: share of images that differ at all. `linf`: largest over the images (what a budget promises).
        `l2`, `ssim`: means over the images. `psnr`: mean over the changed images, dB; left out where none changed.

    Raises:
        ConfigError: shapes that differ, values outside [0, 1], or no image.
    """
    if not len(clean) or len(clean) != len(changed):
        raise ConfigError(f"stealth of {len(clean)} and {len(changed)} images; give the same images, at least 1.")
    columns: dict[str, list[Tensor]] = {"linf": [], "l2": [], "psnr": [], "ssim": []}
    for start in range(0, len(clean), batch_size):
        pair = (clean[start : start + batch_size], changed[start : start + batch_size])
        for name, measure in (("linf", linf), ("l2", l2), ("psnr", psnr), ("ssim", ssim)):
            columns[name].append(measure(*pair).double())
    values = {name: torch.cat(parts) for name, parts in columns.items()}
    differs = values["linf"] > 0
    summary = {
        "changed": float(differs.double().mean()),
        "linf": float(values["linf"].max()),
        "l2": float(values["l2"].mean()),
        "ssim": float(values["ssim"].mean()),
    }
    if differs.any():
        summary["psnr"] = float(values["psnr"][differs].mean())
    return summary


def _pair(clean: Images, changed: Images) -> tuple[Tensor, Tensor]:
    """Both as float32 in [0, 1]. Raises ConfigError where they are not images of one shape."""
    a, b = _unit_range(clean), _unit_range(changed)
    if a.shape != b.shape or a.ndim != 4:
        raise ConfigError(f"images {tuple(a.shape)} and {tuple(b.shape)}; give two sets of one shape (N, C, H, W).")
    return a, b


def _unit_range(images: Images) -> Tensor:
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point() or not ((tensor >= 0) & (tensor <= 1)).all():
        raise ConfigError(f"images are {tensor.dtype} or leave [0, 1]; give uint8, or floats in [0, 1].")
    return tensor.float()
