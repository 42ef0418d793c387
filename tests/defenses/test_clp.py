"""CLP: the bound is the paper's, pairs are right by name or refused, a planted channel goes and nothing else does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.defenses.base import Conditions, repair_encoder
from blto.defenses.clp import CLP, channel_bounds, outliers, pair, prune
from blto.errors import ConfigError, Diverged, InputRefused
from blto.models import BACKBONES
from blto.models.encoder import Encoder, build_encoder
from blto.registry import Registry
from blto.runtime.progress import Progress

PLANTED = 3
SMALL = {"name": "small_resnet", "width": 16}


def encoder(seed: int = 0) -> Encoder:
    """A fresh net whose batch norms have statistics, scales and shifts of their own."""
    made = build_encoder(SMALL, seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, low in ((norm.running_var, 0.8), (norm.weight.data, 0.8), (norm.bias.data, -0.1)):
                assert values is not None
                values.copy_(low + torch.rand(len(values), generator=draw) * 0.2)
    return made


def planted() -> Encoder:
    """One stem channel answers a checkerboard, strongly, and nothing smooth."""
    made = encoder()
    stem, norm = made.backbone.get_submodule("stem.0"), made.backbone.get_submodule("stem.1")
    board = (torch.arange(3)[:, None] + torch.arange(3)) % 2 * 2.0 - 1
    board[board > 0] *= 5 / 4  # sums to zero
    with torch.no_grad():
        stem.weight[PLANTED], norm.weight[PLANTED], norm.bias[PLANTED] = board, 4.0, -30.0  # type: ignore[operator]
    return made


def smooth(count: int = 16) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, 32, mode="bilinear", align_corners=True)


def stamped(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[:, :, -8:, -8:] = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float()
    return changed


def features(of: Encoder, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = of(images)
    return out


def repaired(of: Encoder, u: float = 3.0, seed: int = 0) -> Encoder:
    return repair_encoder(CLP(u=u), of, None, Conditions(seed))


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (1, 1), (3, 4), (3, 8)])
def test_the_bound_is_the_largest_singular_value_times_the_scale(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, kernel, groups=groups)
    norm = nn.BatchNorm2d(16, eps=0.3)
    nn.init.normal_(norm.weight)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.0, 2.0)
    weight, scale = convolution.weight.detach().double().numpy(), norm.weight.detach().double().numpy()
    expected = [
        np.linalg.svd(weight[c].reshape(8 // groups, -1), compute_uv=False)[0]
        * abs(scale[c])
        / math.sqrt(float(norm.running_var[c]) + 0.3)
        for c in range(16)
    ]
    assert np.allclose(channel_bounds(convolution, norm).detach().numpy(), expected, rtol=1e-6)


def test_a_channel_is_lipschitz_with_the_kernel_s_side_times_the_bound() -> None:
    """The norm of a circular convolution is the largest, over frequencies, of that of its kernel's spectrum."""
    torch.manual_seed(1)
    convolution, norm = nn.Conv2d(5, 12, 3, bias=False), nn.BatchNorm2d(12, eps=0.0)
    exact = (
        torch.fft.fft2(convolution.weight.detach().double(), s=(32, 32)).abs().square().sum(dim=1).sqrt().amax((1, 2))
    )
    bounds = channel_bounds(convolution, norm).detach()
    assert (exact <= 3 * bounds + 1e-9).all()
    assert (exact > bounds).all(), "the side of the kernel is needed"


def test_a_channel_that_never_varied_has_a_finite_bound() -> None:
    convolution, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-4)
    nn.init.ones_(convolution.weight)
    assert norm.running_var is not None
    norm.running_var[2] = 0
    assert channel_bounds(convolution, norm)[2].item() == pytest.approx(math.sqrt(3) / 1e-2)


def test_outliers_lie_above_the_mean_and_u_sample_deviations() -> None:
    bounds = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)  # mean 2, sd of the sample 2: 1.5 sd above
    assert outliers(bounds, 1.49).tolist() == [False, False, False, True]
    assert not outliers(bounds, 1.51).any()
    assert not outliers(-bounds, 1.0).any(), "weak channels are kept"
    assert not outliers(torch.ones(1, dtype=torch.float64), 0.0).any()


@pytest.mark.parametrize("channels", [10, 11])
def test_ten_channels_are_too_few_for_three_deviations(channels: int) -> None:
    lone = torch.zeros(channels, dtype=torch.float64)
    lone[0] = 1e9
    assert outliers(lone, 3.0).any().item() is (channels == 11)


def test_pairs_of_our_nets_by_name() -> None:
    blocks = {f"stages.{block}.bn{i}": f"stages.{block}.conv{i}" for block in range(3) for i in (1, 2)}
    shortcuts = {f"stages.{block}.shortcut.1": f"stages.{block}.shortcut.0" for block in (1, 2)}
    assert pair(encoder().backbone) == {"stem.1": "stem.0", **blocks, **shortcuts}
    with torch.device("meta"):
        assert len(pair(BACKBONES.build("resnet18"))) == 20


@pytest.mark.parametrize(
    ("name", "count"), [("torchvision/resnet18", 20), ("torchvision/resnet50", 53), ("timm/resnet18", 20)]
)
def test_pairs_of_library_nets_by_name(name: str, count: int) -> None:
    with torch.device("meta"):
        backbone = BACKBONES.build(name)
    pairs = pair(backbone)
    assert len(pairs) == count == len([part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)])
    for norm, convolution in pairs.items():
        assert convolution == norm.replace("downsample.1", "downsample.0").replace("bn", "conv")


class Net(nn.Module):
    """Four layers, declared so that the order and the names mislead: a pairs with y, b with x."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.x, self.a = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.y, self.b = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.then = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.then(self, images)


def test_pairs_are_those_of_the_computation_and_not_of_the_declaration() -> None:
    net = Net(lambda net, images: net.a(net.y(images)) + net.b(nn.Identity()(net.x(images))))
    assert pair(net) == {"a": "y", "b": "x"}
    with torch.no_grad():
        net.y.weight[7] *= 1000
    assert prune(net, 3.0) == {"a": [7], "b": []}
    assert net.a.weight[7] == net.a.bias[7] == 0
    assert net.b.weight[7] == 1


def in_place(net: Net, images: Tensor) -> Tensor:
    """As pre-activation nets are often written: the sum lies in the convolution's own tensor."""
    first = net.x(images)
    first += net.y(images)
    return torch.add(net.a(first), net.b(net.y(images)))


REFUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "sum": lambda net, images: net.a(net.x(images) + net.y(images)) + net.b(net.y(images)),
    "sum in place": in_place,
    "concatenation": lambda net, images: net.a(torch.cat([net.x(images)[:, :6], net.y(images)[:, 6:]], 1)),
    "after a batch norm": lambda net, images: net.a(net.b(net.x(images))),
    "one norm of two convolutions": lambda net, images: net.b(net.a(net.x(images)) + net.a(net.y(images))),
    "one norm of a convolution and of a sum": lambda net, images: net.b(net.y(images)) + net.a(net.a(net.x(images))),
    "never used": lambda net, images: net.b(net.y(images)),
}


@pytest.mark.parametrize("forward", REFUSED.values(), ids=REFUSED)
def test_where_pairs_cannot_be_told_nothing_is_changed(forward: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(forward)
    before = state(net)
    with pytest.raises(InputRefused, match=r"batch norm [ab] of the backbone does not follow one convolution"):
        prune(net, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_backbones_that_it_does_not_apply_to_are_refused() -> None:
    with pytest.raises(InputRefused, match="no 2-D batch norm"):
        pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    for norm in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)):
        with pytest.raises(InputRefused, match="batch norm 1 of the backbone has no scale or no running variance"):
            pair(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    with pytest.raises(InputRefused, match="batch norm 1 of the backbone does not follow"):
        pair(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(InputRefused, match="does not take images of 224 pixels"):
        pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)))
    broken = encoder()
    broken.backbone.get_submodule("stem.0").weight.data[0] = math.nan  # type: ignore[operator]
    with pytest.raises(Diverged, match="nothing to repair"):
        repaired(broken)
    with pytest.raises(ConfigError, match="u"):
        Registry("defense", {"clp": "blto.defenses.clp:CLP"}).build({"name": "clp", "u": -1})


def test_the_planted_channel_is_pruned_and_no_other_and_the_trigger_is_dead() -> None:
    victim, images = planted(), smooth()
    cured = repaired(victim)
    changed = {
        (name, int(channel))
        for name, value in cured.state_dict().items()
        for channel in (value != victim.state_dict()[name]).flatten(1 if value.ndim > 1 else 0).nonzero()
    }
    assert changed == {("backbone.stem.1.weight", PLANTED), ("backbone.stem.1.bias", PLANTED)}

    def moved(of: Encoder) -> float:
        return float((features(of, stamped(images)) - features(of, images)).norm(dim=1).mean())

    assert moved(victim) > 10 * moved(cured)
    assert torch.equal(features(victim, images), features(cured, images)), "clean images never had that channel"


def test_a_clean_encoder_stays_nearly_as_it_was() -> None:
    for seed in range(3):
        clean, images = encoder(seed), smooth()
        kept = F.cosine_similarity(features(clean, images), features(repaired(clean), images))
        assert kept.min() > 0.99


def test_a_large_u_is_the_identity_and_a_small_one_is_not() -> None:
    victim, images = planted(), smooth()
    for u in (8.0, 1e30):  # a layer of 64 channels has none further than 63 / 8 = 7.9 deviations
        same = repaired(victim, u)
        assert all(torch.equal(value, victim.state_dict()[name]) for name, value in same.state_dict().items())
        assert torch.equal(features(same, images), features(victim, images))
    pruned = [sum(map(len, prune(copy.deepcopy(victim.backbone), u).values())) for u in (0.0, 1.0, 2.0, 3.0)]
    assert pruned == sorted(pruned, reverse=True)
    assert pruned[0] > 50 * pruned[-1] > 0


def test_what_is_given_is_left_alone_and_a_seed_changes_nothing() -> None:
    victim = planted().train()
    victim.native = True
    before = state(victim)
    modes = [part.training for part in victim.modules()]
    first, second = repaired(victim, seed=0), repaired(victim, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    assert [part.training for part in victim.modules()] == modes
    assert first.native
    assert not any(part.training for part in first.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in first.modules())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert {value.device.type for value in first.state_dict().values()} == {"cpu"}
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_it_needs_no_image_and_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert CLP.images == CLP(u=1.0).images == 0
    repair_encoder(CLP(), planted(), None, Conditions(progress=Progress()))
    assert capsys.readouterr().err == "CLP: 1 of 336 channels pruned\n"
