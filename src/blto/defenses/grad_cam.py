"""Which piece of an image makes an encoder put it where it does: Grad-CAM on features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.defenses.base import Images
from blto.errors import InputRefused
from blto.evaluation.features import BATCH_ON_CPU, device_of
from blto.models.encoder import Encoder


def heat(encoder: Encoder, images: Tensor, centres: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of <f(x), centre> on the encoder's last map, for each x in (B, 3, S, S).

    Returns:
        (B, S, S), at least 0, bilinearly enlarged.

    Raises:
        InputRefused: the encoder makes no map of more than one place.
    """
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3] > 1:
            maps[:] = [out]

    hooks = [part.register_forward_hook(keep) for part in encoder.modules()]
    try:
        logits = (encoder(images.clone().requires_grad_()) * centres).sum(dim=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise InputRefused("patch_search: the encoder makes no square feature map; give a convolutional encoder.")
    (gradient,) = torch.autograd.grad(logits.sum(), maps[0])
    map_ = (gradient.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1, keepdim=True).relu().detach()
    return F.interpolate(map_, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def hottest_windows(encoder: Encoder, images: Images, centres: Tensor, size: int) -> Images:
    """The size x size window of each image with the largest sum of heat: uint8 (B, 3, size, size)."""
    device, windows = device_of(encoder), []
    for begin in range(0, len(images), BATCH_ON_CPU):
        part = images[begin : begin + BATCH_ON_CPU]
        pixels = torch.from_numpy(part).to(device).float().div_(255)
        hot = heat(encoder, pixels, centres[begin : begin + BATCH_ON_CPU].to(device))
        sums = F.avg_pool2d(hot[:, None], size, stride=1)[:, 0].cpu()
        corners = np.divmod(sums.flatten(1).argmax(dim=1).numpy(), sums.shape[2])
        windows += [image[:, y : y + size, x : x + size] for image, y, x in zip(part, *corners, strict=True)]
    return np.stack(windows)
