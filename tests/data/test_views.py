"""Views: both back ends agree with each other and with torchvision, and gradients flow through one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from blto.data.views import RECIPES, ViewParameters, ViewRecipe, Views, resolve_recipe
from blto.errors import ConfigError, InputRefused
from blto.runtime.kernels import kernel

Array = np.ndarray[Any, Any]
SIZE = 32
TOLERANCE = 0.1 / 255  # float32 rounding stays a hundred times below; the requirement is 2 / 255
IDENTITY = ViewRecipe(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    flip=0,
    jitter_probability=0,
    grayscale_probability=0,
    blur_probability=(0, 0),
)


def some_images(count: int, height: int = SIZE, width: int = SIZE) -> Array:
    """Noise, smooth colors, and the corner cases: black, white, gray, constant, colorless, saturated."""
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    images[count // 2 :] = np.linspace(0, 255, width) * generator.random((count - count // 2, 3, height, 1))
    images[0], images[1], images[2] = 0, 255, 128
    images[3] = generator.integers(0, 256, (3, 1, 1))
    images[4] = images[4, :1]
    images[5] = images[5] // 128 * 255
    return images


def as_float(images: Array) -> Tensor:
    return torch.as_tensor(images).float() / 255


def with_torchvision(image: Tensor, params: ViewParameters, row: int, size: int, kernel_size: int) -> Tensor:
    y, x, h, w = params.box[row].tolist()
    view = TF.resized_crop(image, y, x, h, w, [size, size], antialias=False)
    view = TF.hflip(view) if params.flip[row] else view
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for op in params.order[row]:
        view = adjust[op](view, float(params.factors[row, op]))
    if params.gray[row]:
        view = TF.rgb_to_grayscale(view, 3)
    if params.blur_sigma[row] > 0:
        view = TF.gaussian_blur(view, [kernel_size] * 2, [float(params.blur_sigma[row])] * 2)
    if params.solarize_threshold[row] <= 1:
        view = TF.solarize(view, float(params.solarize_threshold[row]))
    assert isinstance(view, Tensor)
    return view


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("view", [0, 1])
def test_both_back_ends_give_torchvisions_result(name: str, view: int) -> None:
    images, rows = some_images(96), np.arange(96)
    views = Views(RECIPES[name], SIZE)
    params = views.draw(seed=1, epoch=2, samples=rows, view=view)
    fast, smooth = views.fast(images, rows, params), views.differentiable(as_float(images), params)
    for result in (fast, smooth):
        assert result.dtype == torch.float32
        assert result.shape == (96, 3, SIZE, SIZE)
        assert result.min() >= 0
        assert result.max() <= 1
    assert (fast - smooth).abs().max() <= TOLERANCE
    oracle = torch.stack([with_torchvision(as_float(images[b]), params, b, SIZE, 3) for b in range(96)])
    assert (fast - oracle).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("height", "width", "size", "kernel_size"), [(48, 64, 40, 5), (40, 23, 64, 7)])
def test_images_of_another_size_are_resampled_as_in_torchvision(
    height: int, width: int, size: int, kernel_size: int
) -> None:
    images, rows = some_images(48, height, width), np.arange(48)
    views = Views(RECIPES["byol"], size)
    params = views.draw(seed=3, epoch=0, samples=rows, view=0, image_size=(height, width))
    fast, smooth = views.fast(images, rows, params), views.differentiable(as_float(images), params)
    oracle = torch.stack([with_torchvision(as_float(images[b]), params, b, size, kernel_size) for b in range(48)])
    assert (fast - oracle).abs().max() <= TOLERANCE
    assert (smooth - oracle).abs().max() <= TOLERANCE


def test_the_kernel_of_the_blur_is_a_tenth_of_the_image() -> None:
    assert [2 * Views(IDENTITY, size).blur_radius + 1 for size in (32, 96, 224)] == [3, 9, 23]


def test_the_identity_recipe_returns_the_images_exactly() -> None:
    images, rows = some_images(32), np.arange(32)
    views = Views(IDENTITY, SIZE)
    params = views.draw(seed=0, epoch=0, samples=rows, view=0)
    assert torch.equal(views.fast(images, rows, params), as_float(images))
    assert torch.equal(views.differentiable(as_float(images), params), as_float(images))


def test_gradients_are_those_of_the_function() -> None:
    recipe = resolve_recipe({"name": "byol", "jitter_probability": 1.0, "solarize_probability": 0.5})
    views = Views(recipe, 5)
    params = views.draw(seed=2, epoch=0, samples=np.arange(4), view=0, image_size=(6, 6))
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    assert (params.solarize_threshold <= 1).any()
    assert (~params.gray).any()
    assert torch.autograd.gradcheck(lambda x: views.differentiable(x, params), (images,), fast_mode=True)


def test_gradients_are_finite_on_gray_pixels() -> None:
    images = as_float(some_images(24))
    images[6] = 0.5 + 1e-7 * torch.rand(3, SIZE, SIZE)
    images[7] = 1e-42 * torch.rand(3, SIZE, SIZE)
    images.requires_grad_()
    views = Views(RECIPES["simclr"], SIZE)
    result = views.differentiable(images, views.draw(seed=0, epoch=0, samples=np.arange(24), view=0))
    (gradient,) = torch.autograd.grad(result.square().sum(), images)
    assert gradient.isfinite().all()
    assert (gradient[8:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_precision_is_kept_under_autocast() -> None:
    images = some_images(16)
    views = Views(RECIPES["byol"], SIZE)
    params = views.draw(seed=0, epoch=0, samples=np.arange(16), view=0)
    plain = views.differentiable(as_float(images), params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(views.differentiable(as_float(images), params), plain)


def test_fast_gathers_rows_from_a_memory_map_into_channels_last(tmp_path: Path) -> None:
    images, rows = some_images(40), np.array([7, 39, 7, 0])
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    views = Views(RECIPES["byol"], SIZE)
    params = views.draw(seed=0, epoch=0, samples=rows, view=0)
    result = views.fast(mapped, rows, params)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, views.fast(images[rows], np.arange(4), params))
    assert torch.equal(result[0], result[2])


def test_fast_gives_the_same_bits_on_any_number_of_threads() -> None:
    images, rows = some_images(150), np.arange(150)
    views = Views(RECIPES["byol"], SIZE)
    params = views.draw(seed=0, epoch=0, samples=rows, view=0)
    alone = views.fast(images, rows, params)
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda _: views.fast(images, rows, params), range(8)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(result, alone) for result in results)


def test_an_empty_batch_is_empty() -> None:
    views = Views(RECIPES["simclr"], SIZE)
    none = np.empty(0, np.int64)
    params = views.draw(seed=0, epoch=0, samples=none, view=0)
    assert views.fast(some_images(8), none, params).shape == (0, 3, SIZE, SIZE)
    assert views.differentiable(torch.empty(0, 3, SIZE, SIZE), params).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("images", "rows", "message"),
    [
        (some_images(8).astype(np.float32), [0, 1], "float32"),
        (some_images(8)[:, :, :, ::-1], [0, 1], "non-contiguous"),
        (some_images(8, 16, 16), [0, 1], r"for 2 images \(3, 32, 32\)"),
        (some_images(8), [0, 1, 2], r"rows \(3,\)"),
        (some_images(8), [0, 8], "rows 0 to 8"),
        (some_images(8), [-1, 0], "rows -1 to 0"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(images: Array, rows: list[int], message: str) -> None:
    views = Views(RECIPES["simclr"], SIZE)
    params = views.draw(seed=0, epoch=0, samples=np.arange(2), view=0)
    with pytest.raises(InputRefused, match=message):
        views.fast(images, np.array(rows), params)


@pytest.mark.parametrize("colours", ["random", "gray"])  # where channels are equal, the gradient is shared
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("view", [0, 1])
def test_the_compiled_gradient_is_that_of_the_batched_torch_operations(recipe: str, view: int, colours: str) -> None:
    images = torch.rand(48, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    if colours == "gray":
        images = images[:, :1].expand(-1, 3, -1, -1).contiguous()
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    views = Views(RECIPES[recipe], SIZE)
    params = views.draw(seed=5, epoch=1, samples=np.arange(48), view=view)
    compiled, batched = images.clone().requires_grad_(), images.double().requires_grad_()
    (found,) = torch.autograd.grad((views.differentiable(compiled, params) * weights).sum(), compiled)
    (wanted,) = torch.autograd.grad((views.differentiable(batched, params) * weights.double()).sum(), batched)
    assert (found - wanted).flatten(1).norm(dim=1).div(wanted.flatten(1).norm(dim=1)).max() < 1e-5


def test_the_differentiable_back_end_refuses_other_sizes() -> None:
    views = Views(RECIPES["simclr"], SIZE)
    params = views.draw(seed=0, epoch=0, samples=np.arange(2), view=0)
    for shape in ((2, 3, 16, 16), (3, 3, SIZE, SIZE), (2, 1, SIZE, SIZE)):
        with pytest.raises(InputRefused, match="draw with the images' size"):
            views.differentiable(torch.zeros(shape), params)


def test_tiny_views_are_refused() -> None:
    with pytest.raises(ConfigError, match="size 3"):
        Views(RECIPES["simclr"], 3)


def test_a_kernel_works_where_nothing_can_be_cached() -> None:
    space: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", space)  # has no file, so numba has no place for its machine code
    assert kernel()(space["double"])(21) == 42
