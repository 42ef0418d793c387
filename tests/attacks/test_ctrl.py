"""CTRL against scipy's DCT, the definition of YUV, and the sizes that follow from them by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import torch
from torch import Tensor

from blto.attacks.base import Surroundings, poison_with
from blto.attacks.ctrl import CTRL
from blto.errors import ConfigError
from blto.poisoning import FrequencyTrigger, apply_to_uint8, load_trigger, save_trigger
from blto.poisoning.frequency import dct, inverse_dct, rgb_to_yuv, yuv_to_rgb
from tests.factories import random_images

Array = npt.NDArray[np.float64]
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
YUV = np.array([LUMA, [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])  # the same in five digits
U_SCALE, V_SCALE = 0.436 / (1 - 0.114), 0.615 / (1 - 0.299)  # U = scale (B - Y), V = scale (R - Y)
GRAY = torch.full((1, 3, 32, 32), 0.5)


def trained(size: int = 32, **options: Any) -> FrequencyTrigger:
    attack = CTRL(target_class=1, **options)
    trigger = attack.train_trigger(random_images(4, size=size), seed=0, surroundings=Surroundings()).trigger
    assert isinstance(trigger, FrequencyTrigger)
    return trigger


def middling(count: int, height: int, width: int) -> Tensor:
    """Images far enough from black and white that nothing is clipped."""
    return 0.2 + 0.6 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def by_definition(images: Tensor) -> Array:
    """YUV of RGB (B, 3, H, W), from the definition and not from a matrix."""
    r, g, b = (images[:, channel].double().numpy() for channel in range(3))
    y = LUMA[0] * r + LUMA[1] * g + LUMA[2] * b
    return np.stack([y, U_SCALE * (b - y), V_SCALE * (r - y)], axis=1)


def in_yuv(change: Tensor) -> Array:
    """A difference of RGB images in [0, 1], in YUV on the scale of 8-bit values."""
    found: Array = np.einsum("dc,bchw->bdhw", YUV, change.double().numpy() * 255)
    return found


def blocks(planes: Array, window: int) -> Array:
    """(B, C, H, W) -> (number of blocks, window, window), cut out one by one."""
    height, width = planes.shape[-2:]
    return np.array(
        [
            plane[top : top + window, left : left + window]
            for plane in planes.reshape(-1, height, width)
            for top in range(0, height, window)
            for left in range(0, width, window)
        ]
    )


@pytest.mark.parametrize("window", [1, 2, 8, 32])
def test_the_transform_is_scipy_s_block_by_block(window: int) -> None:
    planes = middling(2, 32, 64)
    found = dct(planes, window)
    assert found.shape == (2, 3, 32 // window, 64 // window, window, window)
    wanted = scipy.fft.dctn(blocks(planes.double().numpy(), window), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(found.reshape(-1, window, window).numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(inverse_dct(found).numpy(), planes.double().numpy(), atol=1e-12)


def test_the_color_transform_is_bt_601_and_comes_back() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255
    np.testing.assert_allclose(rgb_to_yuv(images).numpy(), by_definition(images), atol=0.005)  # five digits, of 255
    assert (yuv_to_rgb(rgb_to_yuv(images)) - images).abs().max() < 1e-9  # far below the 0.5 of a rounding


@pytest.mark.parametrize("magnitude", [50.0, 100.0])
def test_exactly_two_chroma_coefficients_of_every_window_change_by_the_magnitude(magnitude: float) -> None:
    images = middling(3, 64, 96)
    trigger = trained(magnitude=magnitude)
    changed = trigger.candidate(images)  # before clipping
    assert torch.equal(changed, trigger(images)), "nothing here was to be clipped"
    moved = in_yuv(changed - images)
    wanted = np.zeros((3 * 2 * 3 * 2, 32, 32))  # images, windows down, windows across, U and V
    wanted[:, 15, 15] = wanted[:, 31, 31] = magnitude
    found = scipy.fft.dctn(blocks(moved[:, 1:], 32), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    np.testing.assert_allclose(moved[:, 0], 0, atol=1e-3)


def test_the_change_has_no_gray_part() -> None:
    images = middling(2, 32, 32)
    change = (trained(magnitude=100.0).candidate(images) - images).double().numpy() * 255
    assert np.abs(change).max() > 20
    assert np.abs(np.einsum("c,bchw->bhw", LUMA, change)).max() < 1e-3


@pytest.mark.parametrize(("magnitude", "sizes"), [(50.0, (6.1, 5.2, 10.8)), (100.0, (12.1, 10.4, 21.6))])
def test_the_largest_change_of_each_channel_on_mid_gray(magnitude: float, sizes: tuple[float, ...]) -> None:
    change = (trained(magnitude=magnitude)(GRAY) - GRAY) * 255
    found = change.abs().amax(dim=(0, 2, 3)).tolist()
    assert found == pytest.approx(sizes, abs=0.05)


def test_the_euclidean_size_of_a_window() -> None:
    """A unit of magnitude on two orthonormal coefficients of a channel: sqrt(2)."""
    change = in_yuv(trained(magnitude=1.0).candidate(GRAY.double()) - GRAY)
    assert np.linalg.norm(change, axis=(2, 3))[0] == pytest.approx([0, np.sqrt(2), np.sqrt(2)], abs=1e-9)


def test_no_magnitude_is_the_identity() -> None:
    images = random_images(4, size=32).images
    trigger = trained(magnitude=0.0)
    assert np.array_equal(apply_to_uint8(trigger, images), images)
    floats = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(trigger(floats), floats)


def test_another_window_and_other_positions() -> None:
    trigger = trained(size=16, window=8, positions=(3,), magnitude=20.0)
    moved = in_yuv(trigger.candidate(middling(1, 16, 16)) - middling(1, 16, 16))
    found = scipy.fft.dctn(blocks(moved[:, 1:], 8), axes=(1, 2), norm="ortho")
    wanted = np.zeros((8, 8, 8))
    wanted[:, 3, 3] = 20
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_test_images_get_their_own_magnitude(tmp_path: Path) -> None:
    save_trigger(tmp_path / "t.safetensors", trained())  # the defaults: 50, and 100 at test
    trigger = load_trigger(tmp_path / "t.safetensors")
    on_poison, at_test = ((each(GRAY) - GRAY) for each in (trigger, trigger.at_test()))
    torch.testing.assert_close(at_test, 2 * on_poison, atol=1e-6, rtol=0)
    assert (on_poison.abs().max() * 255).item() == pytest.approx(10.8, abs=0.05)
    assert torch.equal(trigger.at_test().at_test()(GRAY), trigger.at_test()(GRAY))
    assert trigger.budget.declared is None


def test_poisons_are_of_the_target_class_and_keep_what_the_trigger_gave_them() -> None:
    images = random_images(200, size=32)
    attack, trigger = CTRL(target_class=1, poison_rate=0.1), trained()
    poisoned = poison_with(attack, trigger, images, seed=3)
    assert images.labels is not None
    assert images.labels[poisoned.mask].tolist() == [1] * 20
    assert np.array_equal(poisoned.poisoned.images[~poisoned.mask], images.images[~poisoned.mask])
    exact = trigger(torch.from_numpy(images.images[poisoned.plan.indices]).float() / 255) * 255
    assert np.abs(poisoned.replacements - exact.numpy()).max() <= 0.5 + 1e-4, "rounded, not cut off"


def test_what_does_not_fit_is_refused() -> None:
    for positions in ((15, 32), (-1,), (3, 3), ()):
        with pytest.raises(ConfigError, match=r"attack\.positions are .* give different numbers from 0 to 31"):
            CTRL(target_class=0, positions=positions)
    with pytest.raises(ConfigError, match=r"attack\.window is 32, but images of noise have 48 pixels a side"):
        CTRL(target_class=0).check_images(random_images(size=48))
    CTRL(target_class=0).check_images(random_images(size=64))
    with pytest.raises(ConfigError, match="do not tile images"):
        trained()(torch.zeros(1, 3, 32, 48))
