"""Views by the device back end, on the CPU: those of the compiled kernel, from resident images or from copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blto.data import view_source as source
from blto.data.view_source import DeviceViews, HostViews
from blto.data.views import RECIPES
from tests.factories import random_images

CPU = torch.device("cpu")
IMAGES = random_images(48, size=32).images
ROWS = np.array([40, 3, 7, 3, *range(10, 30)])


@pytest.mark.parametrize("fits", [True, False], ids=["resident", "copied"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_sources_give_the_same_views(recipe: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "free_memory", lambda _: IMAGES.nbytes * (2.1 if fits else 2.0))
    device = DeviceViews(IMAGES, RECIPES[recipe], CPU)
    assert isinstance(device.images, torch.Tensor) == fits
    pairs = zip(HostViews(IMAGES, RECIPES[recipe])(ROWS, seed=3, epoch=2), device(ROWS, seed=3, epoch=2), strict=True)
    for host_view, device_view in pairs:
        assert device_view.dtype == torch.float32
        assert device_view.is_contiguous(memory_format=torch.channels_last)
        assert (host_view - device_view).abs().max() <= 0.1 / 255


def test_images_from_a_memory_map_are_copied_once(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    device = DeviceViews(np.load(tmp_path / "images.npy", mmap_mode="r"), RECIPES["mocov2"], CPU)
    assert torch.equal(torch.as_tensor(device.images), torch.from_numpy(IMAGES))


def test_the_source_follows_the_device() -> None:
    assert isinstance(source.view_source(IMAGES, RECIPES["mocov2"], CPU), HostViews)
    assert isinstance(source.view_source(IMAGES, RECIPES["mocov2"], torch.device("meta")), DeviceViews)


@pytest.mark.parametrize("recipe", ["byol", "simclr_cifar"])
def test_the_device_views_compile_as_one_graph(recipe: str) -> None:
    device = DeviceViews(IMAGES, RECIPES[recipe], CPU)
    plain = device(ROWS, seed=0, epoch=0)
    device._render = torch.compile(source.render, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(device(ROWS, seed=0, epoch=0), plain)
