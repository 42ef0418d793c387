"""Geometry against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import gamma, iv
from torch import Tensor

from blto.errors import ConfigError, Diverged
from blto.evaluation import geometry
from blto.evaluation.geometry import alignment, displacement, similarity, uniformity


def normal(n: int, dim: int, *, seed: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


E1, E2, E3 = torch.eye(3)


def sets(triggered: Tensor) -> dict[str, Tensor]:
    """Clean images point to e1, target images to e2 (with e3 of either sign), of various lengths."""
    target = torch.stack([E2 + 0.5 * E3, 2 * E2 - E3])
    return {
        "triggered": triggered,
        "clean": torch.stack([E1, 3 * E1]),
        "target": target,
        "references": torch.stack([5 * E2, E2]),
    }


def test_similarity_equals_the_hand_computed_case() -> None:
    # The centroid is e2; cos(target, e2) = 1 / sqrt(1.25), cos(clean, e2) = 0, cos(e1 + e2, e2) = 1 / sqrt(2).
    found = similarity(**sets(torch.stack([E1 + E2, 4 * E1 + 4 * E2])))
    assert found["raw"] == pytest.approx(math.sqrt(0.5))
    assert found["normalised"] == pytest.approx(math.sqrt(0.5) * math.sqrt(1.25))
    # Centred on 2 e1: references (-2, 5) and (-2, 1), triggered (-1, 1) and (2, 4).
    centroid = (torch.tensor([-2.0, 5]) / math.sqrt(29) + torch.tensor([-2.0, 1]) / math.sqrt(5)) / 2
    centroid = centroid / centroid.norm()
    cosines = [torch.tensor([-1.0, 1]) @ centroid / math.sqrt(2), torch.tensor([2.0, 4]) @ centroid / math.sqrt(20)]
    assert found["centred"] == pytest.approx(float(sum(cosines)) / 2)


def test_normalised_is_one_for_the_target_and_zero_for_no_effect() -> None:
    clean, target, references = (normal(40, 16, seed=s, mean=m) for s, m in ((0, 0.2), (1, 1.0), (2, 1.0)))
    common = {"clean": clean, "target": target, "references": references}
    assert similarity(triggered=target, **common)["normalised"] == 1
    assert similarity(triggered=clean, **common)["normalised"] == 0
    assert 0 < similarity(triggered=(clean + target) / 2, **common)["normalised"] < 1


def test_centring_removes_the_direction_that_all_images_share() -> None:
    # Everything lies in a narrow cone, as features after a ReLU do: raw cosines near 1 for any image at all.
    cone = 10.0
    clean, other, target, references = (normal(400, 16, seed=s) + cone for s in range(4))
    target, references = target + 2 * torch.eye(16)[0], references + 2 * torch.eye(16)[0]
    unaffected = similarity(triggered=other, clean=clean, target=target, references=references)
    assert unaffected["raw"] > 0.97
    assert abs(unaffected["centred"]) < 0.06
    moved = similarity(triggered=other + 2 * torch.eye(16)[0], clean=clean, target=target, references=references)
    assert moved["centred"] > 0.35


def test_normalised_is_missing_where_the_scale_means_nothing() -> None:
    same = torch.ones(4, 3)
    assert set(similarity(triggered=same, clean=same, target=same, references=same)) == {"raw", "centred"}
    assert "normalised" not in similarity(**{**sets(E1[None]), "target": -E2[None]})


def test_similarity_refuses_what_is_no_set_of_features() -> None:
    for wrong in (torch.ones(0, 3), torch.ones(3), torch.ones(2, 4)):
        with pytest.raises(ConfigError):
            similarity(**sets(wrong))
    with pytest.raises(Diverged):
        similarity(**sets(torch.full((2, 3), torch.nan)))


def spread(n: int, *scales: float, seed: int = 0) -> Tensor:
    """Features that vary by `scales` in the directions of the axes, around (1, 1, ...)."""
    return 1 + normal(n, len(scales), seed=seed) * torch.tensor(scales)


def test_displacement_equals_the_hand_computed_case() -> None:
    bank, clean = spread(200_000, 1, 4), spread(8, 1, 4, seed=1)
    references = torch.tensor([[1.0, 5], [1, 9]])  # the target class lies 6 up the second axis: 1.5 of its spread
    moved = torch.tensor([3.0, 0])
    found = displacement(triggered=clean + moved, clean=clean, bank=bank, references=references)
    assert found["shift"] == pytest.approx(3 / math.sqrt(2), rel=0.01)
    assert found["common"] == pytest.approx(1)
    assert found["heading"] == pytest.approx(0, abs=0.01)
    assert found["advance"] == pytest.approx(0, abs=0.01)
    found = displacement(triggered=clean + torch.tensor([3.0, 12]), clean=clean, bank=bank, references=references)
    assert found["shift"] == pytest.approx(3, rel=0.01)  # 3 spreads along both axes
    assert found["heading"] == pytest.approx(math.sqrt(0.5), abs=0.01)
    assert found["advance"] == pytest.approx(2, abs=0.01)  # 12 of 6


def test_directions_in_which_nothing_varies_do_not_shorten_the_shift() -> None:
    bank, clean, references = spread(5000, 1, 4), spread(50, 1, 4, seed=1), spread(9, 1, 4, seed=2)
    sets = {"triggered": clean + 1, "clean": clean, "bank": bank, "references": references}
    expected = displacement(**sets)
    dead = {name: torch.cat([features, torch.zeros(len(features), 6)], dim=1) for name, features in sets.items()}
    assert displacement(**dead)["shift"] == pytest.approx(expected["shift"], rel=0.01)


def test_displacement_in_any_basis_is_the_same() -> None:
    bank, clean, references = spread(4000, 1, 3, 0.5), spread(50, 1, 3, 0.5, seed=1), spread(9, 1, 3, 0.5, seed=2)
    triggered = clean + torch.tensor([0.5, 1.0, -2]) + 0.1 * normal(50, 3, seed=3)
    turned = torch.linalg.qr(normal(3, 3, seed=4))[0]
    sets = {"triggered": triggered, "clean": clean, "bank": bank, "references": references}
    expected = displacement(**sets)
    assert 0.9 < expected["common"] < 1
    found = displacement(**{name: 7 * features @ turned for name, features in sets.items()})
    assert found == pytest.approx(expected, rel=1e-4)


def test_images_that_move_apart_have_little_in_common() -> None:
    bank, clean = spread(1000, 1, 1), spread(400, 1, 1, seed=1)
    found = displacement(triggered=clean + normal(400, 2, seed=2), clean=clean, bank=bank, references=bank[:9])
    assert found["common"] < 0.02


def test_what_does_not_move_has_no_heading_and_what_does_not_vary_no_displacement() -> None:
    bank = spread(50, 1, 1)
    still = displacement(triggered=bank, clean=bank, bank=bank, references=bank[:5])
    assert still == {"shift": 0, "advance": 0}
    nowhere = displacement(triggered=bank + 1, clean=bank, bank=bank, references=bank.double().mean(dim=0)[None])
    assert nowhere.keys() == {"shift", "common"}  # the class lies in the middle of all
    same = torch.ones(4, 3)
    for rounding in (0, 1e-7 * normal(4, 3, seed=1)):  # a collapsed encoder
        assert displacement(triggered=2 * same, clean=same, bank=same + rounding, references=same) == {}


def test_displacement_refuses_what_is_no_set_of_pairs() -> None:
    good = torch.ones(3, 2)
    with pytest.raises(ConfigError, match="not pairs"):
        displacement(triggered=good, clean=good[:2], bank=good, references=good)
    with pytest.raises(ConfigError, match="one encoder"):
        displacement(triggered=good, clean=good, bank=torch.ones(3, 4), references=good)
    with pytest.raises(Diverged):
        displacement(triggered=good, clean=good, bank=good * torch.inf, references=good)


def test_identical_features_are_aligned_and_not_uniform() -> None:
    same = normal(1, 12, seed=0).expand(50, -1)
    assert alignment(same, 3 * same) == pytest.approx(0, abs=1e-12)
    assert uniformity(same) == pytest.approx(0, abs=1e-12)


def test_alignment_equals_closed_forms() -> None:
    features = normal(64, 8, seed=1)
    assert alignment(features, -features) == pytest.approx(4)
    assert alignment(E1[None], E2[None]) == pytest.approx(2)
    # Independent directions: E ||u - v||^2 = 2 - 2 E u.v = 2.
    assert alignment(normal(20_000, 8, seed=2), normal(20_000, 8, seed=3)) == pytest.approx(2, abs=0.02)


def test_uniformity_equals_hand_computed_case() -> None:
    # Squared distances 2, 2, 4: e1 to e2, e2 to -e1, e1 to -e1.
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(torch.stack([E1, E2, -E1])) == pytest.approx(expected)


@pytest.mark.parametrize(("dim", "t"), [(3, 2.0), (32, 2.0), (8, 3.0)])
def test_uniformity_of_isotropic_directions_equals_the_bessel_form(dim: int, t: float) -> None:
    # E exp(-t ||u - v||^2) = e^(-2t) E exp(2t u.v), and E exp(k u.v) = gamma(d/2) (2/k)^(d/2-1) I_(d/2-1)(k).
    order = dim / 2 - 1
    expected = -2 * t + math.log(gamma(dim / 2) * (2 / (2 * t)) ** order * iv(order, 2 * t))
    assert uniformity(normal(3000, dim, seed=4), t=t) == pytest.approx(expected, abs=0.02)


def test_uniformity_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normal(57, 6, seed=5)
    whole = uniformity(features)
    monkeypatch.setattr(geometry, "_CHUNK", 57 * 10)
    assert uniformity(features) == pytest.approx(whole, abs=1e-12)


def test_pairs_are_required() -> None:
    with pytest.raises(ConfigError):
        alignment(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ConfigError):
        uniformity(torch.ones(1, 2))
    with pytest.raises(ConfigError):
        uniformity(torch.ones(2, 2), t=0)
    with pytest.raises(Diverged):
        uniformity(torch.full((2, 2), torch.inf))
