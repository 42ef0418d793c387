"""The native kernels against plain torch: every operation on its own, then whole nets with gradients and statistics."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.models import generators
from blto.models.backbones import ResNet
from blto.models.encoder import Encoder
from blto.models.native import images as native_images
from blto.models.native import library, ops, resnet
from blto.models.native.batch_norm import batch_norm_affine

_, WORDS = library.find_kernels()
needs_kernels = pytest.mark.skipif(WORDS != "AMX kernels", reason=WORDS)


def blocked(x: Tensor) -> Tensor:
    """(N, C, H, W) -> the kernels' layout, rounded to bf16."""
    n, c, h, w = x.shape
    parts = x.detach().bfloat16().reshape(n // 32, 2, 16, c // 2, 2, h * w)
    return parts.permute(0, 5, 1, 3, 2, 4).contiguous()


def unblocked(x: Tensor, height: int) -> Tensor:
    """The way back, float32."""
    blocks, pixels, _, half, _, _ = x.shape
    return x.float().permute(0, 2, 4, 3, 5, 1).reshape(blocks * 32, 2 * half, height, pixels // height)


def images_of_cells(x: Tensor, cell: int) -> Tensor:
    """(N, 4 cell^2, h, w) in the order of packed cells -> (N, 3, cell h, cell w)."""
    n, _, height, width = x.shape
    by_colour = x.reshape(n, cell * cell, 4, height, width)[:, :, :3].transpose(1, 2)
    return F.pixel_shuffle(by_colour.reshape(n, -1, height, width), cell)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal, and exact in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


CASES = [  # kernel, stride, inputs, outputs, height, width
    (3, 1, 32, 32, 8, 8),
    (3, 2, 32, 64, 8, 8),
    (1, 2, 64, 128, 8, 8),
    (1, 1, 32, 96, 4, 4),
    (3, 1, 16, 16, 8, 8),
    (3, 2, 16, 32, 6, 10),
    (3, 1, 32, 16, 5, 3),  # odd sides
    (3, 2, 128, 64, 7, 7),
    (3, 1, 64, 64, 1, 1),
]


@needs_kernels
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "inputs", "outputs", "height", "width"), CASES)
def test_a_convolution_and_all_its_gradients_are_torchs(
    kernel: int, stride: int, inputs: int, outputs: int, height: int, width: int, activated: bool
) -> None:
    x, weight = numbers(64, inputs, height, width), numbers(outputs, inputs, kernel, kernel, seed=1) / 8
    scale, shift = numbers(inputs, seed=2), numbers(inputs, seed=3)
    leaves = [x, weight, scale, shift]
    for leaf in leaves:
        leaf.requires_grad_()
    taken = F.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)) if activated else x
    expected = F.conv2d(taken, weight, stride=stride, padding=(kernel - 1) // 2)
    dy, d_sums = numbers(*expected.shape, seed=4), numbers(2, outputs, seed=5) / 4
    sums = torch.stack((expected.sum((0, 2, 3)), expected.square().sum((0, 2, 3))))
    extra = numbers(*x.shape, seed=6)
    wanted = torch.autograd.grad(
        (expected * dy).sum() + (sums * d_sums).sum() + (x * extra).sum(), leaves if activated else leaves[:2]
    )

    place = ops.geometry(height, width, kernel, stride)
    packed = blocked(x).requires_grad_()
    own = [packed, weight, scale, shift] if activated else [packed, weight]
    affine = (scale, shift) if activated else (None, None)
    y, found_sums, same = ops._Convolution.apply(packed, *affine, weight, place)
    assert error(unblocked(y, expected.shape[2]), expected) < 5e-3
    assert error(found_sums, sums) < 5e-3
    objective = (y.float() * blocked(dy).float()).sum() + (found_sums * d_sums).sum()
    got = torch.autograd.grad(objective + (same.float() * blocked(extra).float()).sum(), own)
    assert error(unblocked(got[0], height), wanted[0]) < 1.5e-2
    for one, other in zip(got[1:], wanted[1:], strict=True):
        assert error(one, other) < 1.5e-2


@needs_kernels
@pytest.mark.parametrize("shortcut", ["none", "identity", "normalised"])
def test_a_merge_and_all_its_gradients_are_torchs(shortcut: str) -> None:
    y, r = numbers(32, 48, 4, 4).requires_grad_(), numbers(32, 48, 4, 4, seed=1).requires_grad_()
    vectors = [numbers(48, seed=seed).requires_grad_() for seed in range(2, 6)]
    scale, shift, scale_r, shift_r = (vector.view(1, -1, 1, 1) for vector in vectors)
    rest = {"none": torch.zeros(()), "identity": r, "normalised": r * scale_r + shift_r}[shortcut]
    expected = F.relu(y * scale + shift + rest)
    d_out = numbers(*expected.shape, seed=7)
    used = {
        "none": [y, *vectors[:2]],
        "identity": [y, *vectors[:2], r],
        "normalised": [y, *vectors[:2], r, *vectors[2:]],
    }
    wanted = torch.autograd.grad((expected * d_out).sum(), used[shortcut])

    leaves = [blocked(leaf).requires_grad_() if leaf.ndim == 4 else leaf for leaf in used[shortcut]]
    out = ops._Merge.apply(*leaves, *[None] * (6 - len(leaves)))
    assert error(unblocked(out, 4), expected) < 5e-3
    got = torch.autograd.grad((out.float() * blocked(d_out).float()).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert error(unblocked(one, 4) if one.ndim > 1 else one, other) < 1e-2


@needs_kernels
def test_pooling_is_torchs() -> None:
    x = numbers(64, 32, 4, 4)
    packed = blocked(x).requires_grad_()
    features = ops.pool(ops.Map(packed, 4, 4))
    assert error(features, x.mean((2, 3))) < 1e-5
    d_out = numbers(64, 32, seed=1)
    (got,) = torch.autograd.grad((features * d_out).sum(), packed)
    assert error(unblocked(got, 4), (d_out / 16)[:, :, None, None].expand(64, 32, 4, 4)) < 5e-3


@needs_kernels
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cell", [1, 2, 4])
def test_images_are_packed_cell_by_cell_and_their_gradient_comes_back(cell: int, memory: torch.memory_format) -> None:
    images = torch.rand(64, 3, 8, 16).contiguous(memory_format=memory).requires_grad_()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    normalised = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    packed = native_images.pack_images(images, mean, std, cell=cell)
    assert (packed.height, packed.width) == (8 // cell, 16 // cell)
    found = unblocked(packed.y, packed.height)
    assert error(images_of_cells(found, cell), normalised) < 5e-3
    assert not found[:, 3::4].any()
    d_out = numbers(*packed.y.shape)
    (got,) = torch.autograd.grad(packed.y, images, d_out.bfloat16())
    by_pixel = images_of_cells(unblocked(d_out, packed.height), cell)
    assert error(got, by_pixel / std.view(1, 3, 1, 1)) < 1e-6
    assert got.is_contiguous(memory_format=memory)


@needs_kernels
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_squashing_is_the_generators_with_its_gradient(memory: torch.memory_format) -> None:
    cells = numbers(64, 16, 4, 8)
    cells[:, 3::4] = 0
    raw = images_of_cells(cells, 2).requires_grad_()
    expected = generators.squash(raw, 2.0)
    d_out = torch.randn_like(expected).contiguous(memory_format=memory)
    (wanted,) = torch.autograd.grad(expected, raw, d_out)
    packed = blocked(cells).requires_grad_()
    found = native_images.squash(ops.Map(packed, 4, 8), 2.0, cell=2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (got,) = torch.autograd.grad(found, packed, d_out)
    assert error(images_of_cells(unblocked(got, 4), 2), wanted) < 5e-3
    assert not unblocked(got, 4)[:, 3::4].any()


@needs_kernels
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_squashed_residual_is_added_and_clipped_with_its_gradient(memory: torch.memory_format) -> None:
    cells = numbers(64, 16, 4, 8)
    cells[:, 3::4] = 0
    raw = images_of_cells(cells, 2).requires_grad_()
    images = torch.rand(64, 3, 8, 16).mul(1.4).sub(0.2).clamp(0, 1)  # many at the ends of the range
    expected = (images + 0.3 * generators.squash(raw, 2.0)).clamp(0, 1)
    assert 0.1 < ((expected == 0) | (expected == 1)).float().mean() < 0.9
    d_out = torch.randn_like(expected).contiguous(memory_format=memory)
    (wanted,) = torch.autograd.grad(expected, raw, d_out)
    packed = blocked(cells).requires_grad_()
    given = images.contiguous(memory_format=memory)
    found = native_images.squash(ops.Map(packed, 4, 8), 2.0, cell=2, images=given, epsilon=0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (got,) = torch.autograd.grad(found, packed, d_out)
    assert error(images_of_cells(unblocked(got, 4), 2), wanted) < 5e-3


@needs_kernels
@pytest.mark.parametrize(("stride", "enlarged"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_with_bias_sees_the_map_enlarged(stride: int, enlarged: int) -> None:
    x, bias = numbers(32, 32, 4, 6).requires_grad_(), numbers(16, seed=2).requires_grad_()
    weight = (numbers(16, 32, 3, 3, seed=1) / 8).requires_grad_()
    larger = F.interpolate(x, scale_factor=enlarged, mode="nearest")
    expected = F.relu(F.conv2d(larger, weight, bias, stride=stride, padding=1))
    d_out = numbers(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, [x, weight, bias], d_out)
    packed = blocked(x).requires_grad_()
    found, _ = ops.convolve(ops.Map(packed, 4, 6), weight, bias, stride=stride, enlarged=enlarged)
    assert (found.height, found.width) == expected.shape[2:]
    out = ops.activate(found).y
    assert error(unblocked(out, found.height), expected) < 1e-2
    got = torch.autograd.grad(out, [packed, weight, bias], blocked(d_out))
    for one, other in zip((unblocked(got[0], 4), *got[1:]), wanted, strict=True):
        assert error(one, other) < 0.05  # a rounded value near 0 may fall on the other side of the ReLU


def nets(widths: tuple[int, ...], stem_stride: int) -> tuple[Encoder, Encoder, Encoder]:
    """The same net in float64, in bf16 torch and through the kernels."""
    torch.manual_seed(0)
    exact = Encoder(ResNet((1,) * len(widths), widths, stem_stride))
    rounded, native = (Encoder(ResNet((1,) * len(widths), widths, stem_stride)) for _ in range(2))
    for other in (rounded, native):
        other.load_state_dict(exact.state_dict())
    native.native = True
    return exact.double(), rounded, native


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("widths", "stem_stride"), [((32, 64), 2), ((16, 32), 1)])
def test_a_net_is_as_near_to_float64_as_torchs_bf16(widths: tuple[int, ...], stem_stride: int, threads: int) -> None:
    exact, rounded, native = nets(widths, stem_stride)
    weights = torch.randn(64, widths[-1])
    images = torch.rand(64, 3, 16, 16)
    assert resnet.supports(native.backbone, images)
    leaves = [images.double().requires_grad_(), *(images.clone().requires_grad_() for _ in range(2))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = exact(leaves[0])
        (wanted * weights.double()).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            found = [rounded(leaves[1]), native(leaves[2])]
        for features in found:
            (features.float() * weights).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert error(found[1], wanted) < 1.2 * error(found[0], wanted)
    for (name, p), q, r in zip(exact.named_parameters(), rounded.parameters(), native.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert r.grad is not None
        assert error(r.grad, p.grad) < max(0.02, 1.5 * error(q.grad, p.grad)), name
    by_image = [leaf.grad for leaf in leaves]
    assert by_image[0] is not None
    assert by_image[1] is not None
    assert by_image[2] is not None
    assert error(by_image[2], by_image[0]) < max(0.02, 1.2 * error(by_image[1], by_image[0]))
    for (name, wanted_buffer), buffer in zip(exact.named_buffers(), native.buffers(), strict=True):
        assert error(buffer, wanted_buffer) < 0.01, name
    for net in (exact, native):
        net.eval()
    with torch.no_grad():
        assert error(native(images), exact(images.double())) < 0.02


@needs_kernels
def test_what_the_kernels_do_not_fit_goes_through_torch() -> None:
    net, images = ResNet((1, 1), (32, 64), 1), torch.rand(32, 3, 16, 16)
    assert resnet.supports(net, images)
    assert not resnet.supports(net, images[:31])
    assert not resnet.supports(net, images[:0])
    assert not resnet.supports(net, torch.rand(32, 3, 15, 15))
    assert not resnet.supports(net, images.to("meta"))
    assert not resnet.supports(ResNet((1, 1), (24, 48), 1), images)
    assert not resnet.supports(nn.Identity(), images)
    assert not resnet.supports(net, images[:, :1])
    assert not resnet.supports(copy.deepcopy(net).double(), images)

    class Other(ResNet):
        pass

    assert not resnet.supports(Other((1, 1), (32, 64), 1), images)


def test_a_processor_without_amx_takes_the_plain_path_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    library.find_kernels.cache_clear()
    try:
        assert library.find_kernels() == (None, "plain torch: this processor has no AMX-BF16")
        assert not resnet.supports(ResNet((1,), (32,), 1), torch.rand(32, 3, 16, 16))
        with pytest.raises(RuntimeError, match="no AMX-BF16"):
            library.kernels()
    finally:
        library.find_kernels.cache_clear()


@needs_kernels
def test_gradients_to_the_images_alone_are_the_same_as_with_the_weights() -> None:
    _, _, native = nets((32, 64), 2)
    native.eval()
    images = torch.rand(32, 3, 16, 16).requires_grad_()
    (with_weights,) = torch.autograd.grad(native(images).sum(), images)
    native.requires_grad_(False)
    (alone,) = torch.autograd.grad(native(images).sum(), images)
    assert torch.equal(alone, with_weights)


def test_batch_norm_from_sums_is_torchs_with_its_gradients_and_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    other = copy.deepcopy(norm)
    x, d_out = (2 * torch.randn(8, 5, 3, 3).double() + 1).requires_grad_(), torch.randn(8, 5, 3, 3).double()
    wanted = torch.autograd.grad((norm(x) * d_out).sum(), [x, norm.weight, norm.bias])
    sums = torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
    scale, shift = batch_norm_affine(other, sums, 72)
    out = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    for one, two in zip(torch.autograd.grad((out * d_out).sum(), [x, other.weight, other.bias]), wanted, strict=True):
        assert torch.allclose(one, two)
    for one, two in zip(other.buffers(), norm.buffers(), strict=True):
        assert torch.allclose(one, two)


@needs_kernels
@pytest.mark.parametrize("part", ["stem.0", "stages.0.conv1", "stages.0.conv2"])
def test_nan_in_a_weight_reaches_the_features(part: str) -> None:
    _, _, native = nets((32, 64), 2)
    nn.init.constant_(native.backbone.get_submodule(part).get_parameter("weight"), torch.nan)
    assert native(torch.rand(32, 3, 16, 16)).isnan().all()


@needs_kernels
def test_a_norm_trains_where_everything_before_it_is_frozen() -> None:
    exact, _, native = nets((32, 64), 2)
    images, weights = torch.rand(64, 3, 16, 16), torch.randn(64, 64)
    for net, given in ((exact, images.double()), (native, images)):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("stages.0.bn1" in name)
        (net(given) * weights).sum().backward()
    wanted, found = (net.get_parameter("backbone.stages.0.bn1.weight").grad for net in (exact, native))
    assert wanted is not None
    assert found is not None
    assert error(found, wanted) < 0.3


@needs_kernels
def test_a_gradient_that_has_to_be_copied_first_outlives_the_copy() -> None:
    _, _, native = nets((32, 64), 2)
    images = torch.rand(1024, 3, 16, 16)
    found = []
    for d_out in (torch.ones(()).expand(1024, 64), torch.ones(1024, 64)):
        native.zero_grad()
        native(images).backward(d_out)
        found.append(native.get_parameter("backbone.stem.0.weight").grad)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])


SHORT_OF_MEMORY = """
import gc, resource, sys
import torch
from blto.models.native import ops

def room(mebibytes):
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = -1 if mebibytes is None else pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))

def convolve():
    return ops._Convolution.apply(x, scale, scale, weight, ops.geometry(64, 64, 1, 1))[0]

torch.set_num_threads(int(sys.argv[1]))
x = torch.zeros(2, 64 * 64, 2, 128, 16, 2, dtype=torch.bfloat16)  # working memory of 64 MiB a thread
scale = torch.ones(256)
weight = torch.ones(32, 256, 1, 1, requires_grad=True)
y = convolve() if sys.argv[2] == "backward" else None
d_out = torch.ones(2, 64 * 64, 2, 16, 16, 2, dtype=torch.bfloat16)
room(48)
try:
    y.backward(d_out) if y is not None else convolve()
except MemoryError as error:
    print(error)
room(None)
convolve().backward(d_out)
print(float(weight.grad.sum()))
"""


@needs_kernels
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_without_working_memory_is_a_memory_error_and_not_the_end(direction: str, threads: str) -> None:
    command = [sys.executable, "-c", SHORT_OF_MEMORY, threads, direction]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    sum_of_gradients = float(64 * 64**2 * 256 * 32)  # images, pixels, weights: of ones throughout
    assert done.stdout.splitlines() == ["the AMX kernels found no working memory", str(sum_of_gradients)]
