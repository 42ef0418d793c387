"""Batches of two views, rendered on the device that trains on them from parameters that the host has drawn."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blto.data.order import Rows
from blto.data.view_backends import batched
from blto.data.views import ViewRecipe, Views
from blto.runtime.device import compiled, free_memory

Images = np.ndarray[Any, np.dtype[np.uint8]]


class ViewSource(Protocol):
    """Two views, each (B, 3, S, S) float32 in [0, 1] and channels-last, of the images at `rows` int64 (B,)."""

    def __call__(self, rows: Rows, *, seed: int, epoch: int) -> list[Tensor]:
        """They are a function of (images, seed, epoch, rows)."""
        ...


def view_source(images: Images, recipe: ViewRecipe, device: torch.device) -> ViewSource:
    """The source for a device: the compiled kernel on the CPU, batched torch operations on anything else.

    Args:
        images: uint8 (N, 3, S, S), C-contiguous, may be memory-mapped.
        recipe: what to draw from.
        device: where the views are wanted.
    """
    return HostViews(images, recipe) if device.type == "cpu" else DeviceViews(images, recipe, device)


class HostViews:
    """Views rendered by the compiled kernel, for training on the CPU."""

    def __init__(self, images: Images, recipe: ViewRecipe) -> None:
        self.images, self.views = images, Views(recipe, images.shape[2])

    def __call__(self, rows: Rows, *, seed: int, epoch: int) -> list[Tensor]:
        """See `ViewSource`."""
        drawn = (self.views.draw(seed=seed, epoch=epoch, samples=rows, view=view) for view in (0, 1))
        return [self.views.fast(self.images, rows, parameters) for parameters in drawn]


class DeviceViews:
    """Views rendered on the device from images that stay there, where they fit: see `resident`.

    The host draws the parameters, 64 bytes a view, and reads nothing back. On a GPU the operations are compiled.
    """

    def __init__(self, images: Images, recipe: ViewRecipe, device: torch.device) -> None:
        self.views, self.device = Views(recipe, images.shape[2]), device
        self.images = resident(images, device)
        self._render = compiled(render) if device.type == "cuda" else render

    def __call__(self, rows: Rows, *, seed: int, epoch: int) -> list[Tensor]:
        """See `ViewSource`."""
        images = self._take(rows)
        return [self._view(images, rows, seed, epoch, view) for view in (0, 1)]

    def _take(self, rows: Rows) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images.index_select(0, to_device(torch.from_numpy(rows), self.device))
        return to_device(torch.from_numpy(self.images[rows]), self.device)

    def _view(self, images: Tensor, rows: Rows, seed: int, epoch: int, view: int) -> Tensor:
        drawn = self.views.draw(seed=seed, epoch=epoch, samples=rows, view=view)
        parameters = to_device(batched.pack(drawn.arrays), self.device)
        blurs = bool((drawn.blur_sigma > 0).any())
        return self._render(images, parameters, self.views.size, self.views.blur_radius, blurs)


def resident(images: Images, device: torch.device) -> Tensor | Images:
    """The images on the device if they take less than half of its free memory, else as they are."""
    return torch.tensor(images, device=device) if images.nbytes < free_memory(device) / 2 else images


@torch.no_grad()
def render(images: Tensor, parameters: Tensor, size: int, blur_radius: int, blurs: bool) -> Tensor:
    """Views, channels-last in memory, of uint8 images (B, 3, S, S); see `batched.apply`."""
    views = batched.apply(images.float() / 255, parameters, size=size, blur_radius=blur_radius, blurs=blurs)
    return views.contiguous(memory_format=torch.channels_last)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
