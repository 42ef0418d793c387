"""The hourglass generator through the native kernels against plain torch: values, gradients, and when it is taken."""

from __future__ import annotations

import copy

import pytest
import torch

from blto.models.generators import HourglassGenerator, UNetGenerator, use_native
from blto.models.native import hourglass
from tests.models.test_native import error, needs_kernels

BF16 = torch.bfloat16


def generators(width: int = 16) -> tuple[HourglassGenerator, HourglassGenerator, HourglassGenerator]:
    """The same net in float64, in torch, and with the kernels switched on."""
    torch.manual_seed(0)
    plain = HourglassGenerator(width=width)
    exact, native = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    use_native(torch.nn.Sequential(native), True)
    return exact, plain, native


@needs_kernels
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(("height", "columns"), [(16, 32), (32, 32)])
def test_it_is_as_near_to_float64_as_torchs_bf16(width: int, height: int, columns: int) -> None:
    exact, plain, native = generators(width)
    images = torch.rand(64, 3, height, columns)
    weights = torch.randn_like(images) + native(images).detach().sign()  # so that the gradient is no sum of noise alone
    wanted = exact(images.double())
    (wanted * weights.double()).sum().backward()
    with torch.autocast("cpu", BF16):
        assert hourglass.supports(native, images)
        found = [plain(images), native(images)]
    assert not torch.equal(*found), "the kernels were not taken"
    for output in found:
        (output * weights).sum().backward()
    assert error(found[1], wanted) < 1.2 * error(found[0], wanted)
    for (name, p), q, r in zip(exact.named_parameters(), plain.parameters(), native.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert r.grad is not None
        assert error(r.grad, p.grad) < max(0.03, 1.5 * error(q.grad, p.grad)), name


@needs_kernels
def test_its_residual_is_added_as_by_torch() -> None:
    exact, _, native = generators()
    images = torch.rand(64, 3, 16, 16)
    images[:8], images[8:16] = 0, 1
    wanted = (images + 0.1 * exact(images.double())).clamp(0, 1)
    with torch.autocast("cpu", BF16):
        found = native.add_to(images, 0.1)
    assert 0 < (found - wanted).abs().max() < 0.005, "the kernels were not taken, or are wrong"
    assert (found - images).abs().max() <= 0.1 + 1e-7
    assert found.min() == 0
    assert found.max() == 1
    through = (images / 2 + 0.25).requires_grad_()  # the kernels have no gradient from the sum to the images: torch has
    with torch.autocast("cpu", BF16):
        (gradient,) = torch.autograd.grad(native.add_to(through, 0.0).sum(), through)
    assert torch.equal(gradient, torch.ones_like(images))


@needs_kernels
def test_outside_of_bf16_autocast_it_is_plain_torch() -> None:
    """So that a trigger is applied to images by the same function everywhere."""
    _, plain, native = generators()
    images = torch.rand(32, 3, 16, 16)
    assert torch.equal(native(images), plain(images))
    with torch.autocast("cpu", BF16):
        assert not torch.equal(native(images), plain(images))
        use_native(native, False)
        assert torch.equal(native(images), plain(images))
    use_native(UNetGenerator(width=4), True)  # has no such way, and none is asked for


@needs_kernels
def test_what_the_kernels_do_not_fit_goes_through_torch() -> None:
    generator, images = HourglassGenerator(), torch.rand(32, 3, 16, 16)
    assert not hourglass.supports(generator, images)
    with torch.autocast("cpu", torch.float16):
        assert not hourglass.supports(generator, images)
    with torch.autocast("cpu", BF16):
        assert hourglass.supports(generator, images)
        assert not hourglass.supports(generator, images[:31])
        assert not hourglass.supports(generator, images[:0])
        assert not hourglass.supports(generator, images[..., :14])
        assert not hourglass.supports(generator, images.to("meta"))
        assert not hourglass.supports(HourglassGenerator(width=24), images)
        assert not hourglass.supports(copy.deepcopy(generator).double(), images)


@pytest.mark.parametrize("size", [4, 7, 30])
def test_images_of_any_size_keep_it(size: int) -> None:
    images = torch.rand(2, 3, size, size + 1)
    found = HourglassGenerator(width=4)(images)
    assert found.shape == images.shape
    assert found.abs().max() <= 1
