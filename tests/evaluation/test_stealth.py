"""Stealth against torchmetrics and against images whose distances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from blto.errors import ConfigError
from blto.evaluation.stealth import l2, linf, measure_stealth, psnr, ssim


def images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def noisy(clean: Tensor, amount: float) -> Tensor:
    return (clean + amount * (2 * images(len(clean), clean.shape[-1], seed=1) - 1)).clamp(0, 1)


@pytest.mark.parametrize("size", [16, 32, 40])
@pytest.mark.parametrize("amount", [8 / 255, 0.5])
def test_ssim_and_psnr_equal_torchmetrics(size: int, amount: float) -> None:
    clean = images(6, size)
    clean[3] = 0.2  # flat, where a wrong constant shows
    changed = noisy(clean, amount)
    expected = structural_similarity_index_measure(changed, clean, data_range=1.0, reduction="none")
    assert isinstance(expected, Tensor)
    assert torch.allclose(ssim(clean, changed), expected, atol=1e-5)
    ratio = peak_signal_noise_ratio(changed, clean, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(clean, changed), ratio, atol=1e-3)


def test_known_distances() -> None:
    clean = torch.full((2, 3, 16, 16), 0.5)
    changed = clean.clone()
    changed[1] += 8 / 255
    changed[1, 0, 0, 0] = 0.5
    values = 3 * 16 * 16
    assert linf(clean, changed).tolist() == pytest.approx([0, 8 / 255])
    assert l2(clean, changed).tolist() == pytest.approx([0, 8 / 255 * math.sqrt(values - 1)])
    expected = -10 * math.log10((8 / 255) ** 2 * (values - 1) / values)
    assert psnr(clean, changed).tolist() == pytest.approx([math.inf, expected], abs=1e-4)


def test_identical_images_are_wholly_similar_and_negatives_are_not() -> None:
    clean = images(3, 24)
    assert torch.allclose(ssim(clean, clean), torch.ones(3))
    assert (ssim(clean, 1 - clean) < 0).all()
    assert torch.allclose(ssim(clean, noisy(clean, 0.2)), ssim(noisy(clean, 0.2), clean))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_images_smaller_than_the_window_are_measured(size: int) -> None:
    clean = images(4, size)
    assert torch.allclose(ssim(clean, clean), torch.ones(4))
    assert (ssim(clean, noisy(clean, 0.5)) < 0.999).all()


def test_bytes_and_floats_agree() -> None:
    clean, changed = ((255 * x).round().byte() for x in (images(5, 16), noisy(images(5, 16), 0.1)))
    from_bytes = measure_stealth(clean.numpy(), changed.numpy(), batch_size=2)
    assert from_bytes == pytest.approx(measure_stealth(clean.float() / 255, changed.float() / 255))


def test_summary_reports_the_worst_linf_and_leaves_unchanged_images_out_of_psnr() -> None:
    clean = np.full((4, 3, 16, 16), 100, dtype=np.uint8)
    changed = clean.copy()
    changed[0] += 8
    changed[1] += 4
    found = measure_stealth(clean, changed, batch_size=3)
    assert found["changed"] == 0.5
    assert found["linf"] == pytest.approx(8 / 255)
    assert found["psnr"] == pytest.approx(-10 * (math.log10((8 / 255) ** 2) + math.log10((4 / 255) ** 2)) / 2, abs=1e-4)
    assert found["l2"] == pytest.approx(math.sqrt(768) * (8 + 4) / 255 / 4, abs=1e-5)
    assert found["ssim"] == pytest.approx(float(ssim(clean, changed).mean()), abs=1e-6)


def test_a_trigger_that_was_never_applied_shows() -> None:
    clean = images(3, 12)
    assert measure_stealth(clean, clean) == pytest.approx({"changed": 0, "linf": 0, "l2": 0, "ssim": 1}, abs=1e-6)


def test_what_are_no_pairs_of_images_is_refused() -> None:
    clean = images(3, 12)
    for wrong in (clean[:2], clean[:, :, :6], clean * 255, clean.int(), clean.where(clean < 0.9, torch.nan)):
        with pytest.raises(ConfigError):
            measure_stealth(clean, wrong)
    with pytest.raises(ConfigError):
        measure_stealth(clean[:0], clean[:0])
    with pytest.raises(ConfigError):
        linf(clean[0], clean[0])
