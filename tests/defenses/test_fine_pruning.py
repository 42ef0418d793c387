"""Fine-pruning: what sleeps is silenced and stays so, a backdoor there is dead, zero share is the fine-tuning alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.defenses.base import Conditions, repair_encoder
from blto.defenses.clean_fine_tuning import CleanFineTuning
from blto.defenses.fine_pruning import FinePruning, dormant, neighbours, output_norms, share_kept, silence
from blto.errors import InputRefused
from blto.evaluation.features import extract
from blto.models import BACKBONES
from blto.models.encoder import Encoder, build_encoder
from blto.runtime.progress import Progress
from tests.defenses.tampered import Images, clean_images, same, victim
from tests.factories import TINY_METHODS

PLANTED = 5


class Plain(nn.Module):
    """Two convolutions; without the last ReLU a silenced channel has a gradient."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.a = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.b = nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.last = last

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.b(self.second(torch.relu(self.a(self.first(images))))))
        return out


def smooth() -> ImageSet:
    coarse = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    images = F.interpolate(coarse, 16, mode="bilinear", align_corners=True).mul(255).byte().numpy()
    return ImageSet(images, None, (), "smooth")


def board(images: Images) -> Images:
    """The images with a checkerboard in a corner."""
    changed = images.copy()
    changed[:, :, :8, :8] = (np.arange(8)[:, None] + np.arange(8)) % 2 * 255
    return changed


def planted(last: nn.Module | None = None) -> Encoder:
    """A feature that answers a checkerboard alone, by a channel of the first layer that does."""
    torch.manual_seed(0)
    net = Plain(last or nn.ReLU())
    sign = (torch.arange(3)[:, None] + torch.arange(3)) % 2 * 2.0 - 1
    with torch.no_grad():
        net.first.weight[PLANTED], net.first.bias[PLANTED] = sign - sign.mean(), 0.0  # type: ignore[index]
        net.a.bias[PLANTED] = -20.0
        net.second.weight[:, PLANTED], net.second.weight[PLANTED] = 0.0, 0.0
        net.second.weight[PLANTED, PLANTED], net.second.bias[PLANTED] = 50.0, 0.0  # type: ignore[index]
    return Encoder(net, image_size=16).eval()


def repaired(of: Encoder, seed: int = 0, **changes: Any) -> Encoder:
    given = {"images": 64, "epochs": 0, "batch_size": 32, "method": TINY_METHODS["simclr"], **changes}
    return repair_encoder(FinePruning(**given), of, smooth(), Conditions(seed))


def moved(of: Encoder) -> float:
    images = smooth().images
    return float((extract(of, board(images)).vectors - extract(of, images).vectors).norm(dim=1).mean())


def test_a_backdoor_that_sleeps_on_clean_images_is_silenced() -> None:
    bad = planted()
    assert extract(bad, smooth().images).vectors[:, PLANTED].max() < 0.01
    cured = repaired(bad, share=1 / 12)
    assert moved(bad) > 5 * moved(cured)
    assert not extract(cured, board(smooth().images)).vectors[:, PLANTED].any()
    assert torch.equal(cured.state_dict()["backbone.first.weight"], bad.state_dict()["backbone.first.weight"])


@pytest.mark.parametrize("last", [nn.ReLU, nn.SiLU])
def test_what_is_pruned_stays_so_in_the_fine_tuning(last: Callable[[], nn.Module]) -> None:
    cured = repaired(planted(last()), share=0.25, epochs=1)
    dead = (cured.state_dict()["backbone.b.weight"] == 0).nonzero().flatten().tolist()
    assert len(dead) == 3
    assert not extract(cured, board(smooth().images)).vectors[:, dead].any()
    assert cured.state_dict()["backbone.b.weight"].count_nonzero() == 9


def test_zero_share_is_the_fine_tuning_and_without_it_nothing() -> None:
    assert same(repaired(victim(), share=0), victim())
    options: dict[str, Any] = {"images": 64, "epochs": 1, "batch_size": 32, "method": TINY_METHODS["simclr"]}
    tuned = repair_encoder(CleanFineTuning(**options), victim(), smooth(), Conditions())
    assert same(repaired(victim(), share=0, epochs=1), tuned)
    assert not same(repaired(victim(), share=0.3, epochs=1), tuned)


def test_what_is_given_is_left_alone_and_the_same_seed_gives_the_same() -> None:
    before = deepcopy(victim())
    first = repaired(victim(), epochs=1)
    assert same(first, repaired(victim(), epochs=1))
    assert not same(first, repaired(victim(), epochs=1, seed=1))
    assert same(before, victim())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "small_resnet", "width": 4}, ["stages.2.bn2", "stages.2.shortcut.1"]),
        (
            {"name": "small_resnet", "width": 4, "blocks": 2},
            ["stages.4.bn2", "stages.4.shortcut.1", "stages.5.bn2"],
        ),
        ("torchvision/resnet18", ["layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"]),
    ],
)
def test_the_layers_whose_channels_are_the_features(spec: Any, expected: list[str]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(BACKBONES.build(spec), image_size=32).eval()
    before = deepcopy(encoder)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    names = output_norms(encoder, images)
    assert names == expected
    assert same(before, encoder)
    silence(encoder, names, torch.tensor([1, 3]))
    dead = (extract(encoder, images).vectors == 0).all(dim=0)
    assert {1, 3} <= set(dead.nonzero().flatten().tolist())
    silence(before, names[:1], torch.tensor([1, 3]))
    assert extract(before, images).vectors[:, [1, 3]].any(), "one of them is not enough"


@pytest.mark.parametrize(
    "backbone", [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid())]
)
def test_features_that_are_no_channels_of_batch_norms_are_refused(backbone: nn.Module) -> None:
    with pytest.raises(InputRefused, match="4 features are not the channels"):
        repaired(Encoder(backbone, image_size=16), share=0.5)


def test_the_least_active_go_first() -> None:
    features = torch.tensor([[3.0, 0.0, 2.0, 1.0], [3.0, 0.2, 2.0, 1.0]])
    assert dormant(features, share=0.5, keep=1.0).tolist() == [1, 3]
    assert dormant(features, share=0, keep=1.0).tolist() == []


def test_neighbours_are_the_nearest_others_by_cosine() -> None:
    angles = torch.arange(30) * 0.1
    features = torch.stack((angles.cos(), angles.sin()), dim=1) * torch.linspace(1, 9, 30)[:, None]
    found = neighbours(features)
    assert set(found[0].tolist()) == set(range(1, 11))
    assert set(found[15].tolist()) == {*range(10, 15), *range(16, 21)}
    assert share_kept(found, found) == 1
    assert share_kept(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 9], [3, 2]])) == 0.75


def test_pruning_ends_where_neighbours_get_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(200, 40, generator=generator)
    features[:, :12] *= 1e-4
    assert sorted(dormant(features, share=None, keep=0.99).tolist()) == list(range(12))
    counts = [len(dormant(features, share=None, keep=keep)) for keep in (0.99, 0.8, 0.3)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] < 40


def test_it_says_how_many_it_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    repair = FinePruning(images=64, epochs=0, share=0.25)
    repair_encoder(
        repair, build_encoder({"name": "resnet18", "width": 4}, seed=0), clean_images(), Conditions(progress=Progress())
    )
    assert capsys.readouterr().err == "fine-pruning: 8 of 32 channels pruned\n"
