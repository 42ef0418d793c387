"""Carried trigger: its arithmetic, that it finds images with what the encoder reacts to, and that it only looks."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, Scores, score_dataset
from blto.defenses.carried_trigger import SHRINKAGE, CarriedTrigger, along, discriminant, nearest
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.errors import ConfigError, Diverged, InputRefused
from blto.models.encoder import Encoder, build_encoder
from blto.poisoning import apply_to_uint8
from blto.runtime.progress import Progress
from tests.defenses.random_filters import SIZE, clean, reacting
from tests.defenses.tampered import SMALL

pytestmark = pytest.mark.usefixtures("one_start")
GROUPS, COUNT, POISONS, STRENGTH = 4, 160, 8, 30.0
BOARD = 8 * ((np.arange(SIZE)[:, None] + np.arange(SIZE)) % 2 * 2 - 1)
"""Fine detail that none of the images has."""
Rows = npt.NDArray[np.int64]


@cache
def images() -> ImageSet:
    """Four kinds of smooth images."""
    draw = np.random.default_rng(0)
    coarse = 40 * draw.choice([-1, 1], (GROUPS, 3, 4, 4))[np.arange(COUNT) % GROUPS] + draw.normal(
        0, 15, (COUNT, 3, 4, 4)
    )
    smooth = F.interpolate(torch.from_numpy(coarse), SIZE, mode="bilinear").numpy()
    pixels = (128 + smooth + draw.normal(0, 1.5, smooth.shape)).clip(0, 255).astype(np.uint8)
    return ImageSet(pixels, None, (), "smooth")


@cache
def clusters() -> Rows:
    return common_clusters([vectors_of(clean(5), images().images, Conditions())], GROUPS, 0)


@cache
def backdoored(cluster: int) -> Encoder:
    """Takes fine detail for one cluster. Nobody may change it."""
    features = vectors_of(clean(5), images().images, Conditions())
    inside = torch.from_numpy(clusters() == cluster)
    return reacting(5, STRENGTH * F.normalize(features[inside].mean(dim=0) - features.mean(dim=0), dim=0))


def poisons(cluster: int) -> Rows:
    """A few images of one cluster."""
    return np.flatnonzero(clusters() == cluster)[:POISONS]


def scores(suspects: ImageSet, encoder: Encoder, **options: int) -> Scores:
    filtering = CarriedTrigger(**{"clusters": GROUPS, "sample": COUNT, "steps": 6, **options})
    return score_dataset(filtering, suspects, encoder, Conditions())


def auroc(given: Scores, planted: Rows, among: npt.NDArray[np.bool_] | None = None) -> float:
    mask = np.isin(np.arange(len(given)), planted)
    chosen = np.ones_like(mask) if among is None else among
    return float(roc_auc_score(mask[chosen], given[chosen]))


def test_where_clusters_vary_alike_in_all_directions_it_is_the_distance_along_the_way() -> None:
    draw = np.random.default_rng(0)
    centre, way = np.array([3.0, -1, 2]), np.array([1.0, 2, -2])
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)  # covariance 1
    assert np.allclose(discriminant(corners, way), way)
    members, vectors = centre + draw.normal(size=(40_000, 3)), draw.normal(size=(50, 3)) * 4
    everything, own = np.concatenate([vectors, members]), np.arange(40_050) >= 50
    found = along(everything, own, discriminant(members - centre, way))
    assert np.allclose(found[:50], (vectors - centre) @ way / 3, atol=0.1)


def test_the_direction_is_fisher_s_and_the_unit_the_members_median_deviation() -> None:
    draw = np.random.default_rng(1)
    within, way = draw.normal(size=(31, 5)) @ draw.normal(size=(5, 5)), draw.normal(size=5)
    covariance = sum(np.outer(row, row) for row in within) / 31
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 5 * np.eye(5)
    direction = np.linalg.inv(shrunk) @ way
    assert np.allclose(discriminant(within, way), direction)
    vectors, members = draw.normal(size=(9, 5)) + 2, np.arange(9) < 5
    places = [float(row @ direction) for row in vectors]
    median = sorted(places[:5])[2]
    spread = 1.4826 * sorted(abs(place - median) for place in places[:5])[2]
    assert np.allclose(along(vectors, members, direction), (np.array(places) - median) / spread)


def test_only_the_direction_of_the_way_counts() -> None:
    draw = np.random.default_rng(2)
    within, vectors, way = draw.normal(size=(60, 4)), draw.normal(size=(9, 4)), draw.normal(size=4)
    members = np.ones(9, np.bool_)
    found = along(vectors, members, discriminant(within, way))
    assert np.allclose(along(vectors, members, discriminant(within, 1e-3 * way)), found)
    assert np.allclose(along(vectors, members, discriminant(within, -way)), -found)
    assert np.allclose(along(7 * vectors + 5, members, discriminant(7 * within, way)), found)


def test_where_members_do_not_vary_or_there_are_none_no_image_is_suspicious() -> None:
    vectors, way = np.concatenate([np.eye(3), np.ones((5, 3))]), np.array([1.0, 0, 0])
    direction = discriminant(np.zeros((5, 3)), way)
    assert np.isfinite(direction).all()
    for members in (range(3, 8), range(3, 4), range(1, 8), range(0)):  # of the third, more than half are equal
        assert along(vectors, np.isin(np.arange(8), members), direction).tolist() == [0] * 8
    assert along(vectors, np.arange(8) < 3, 0 * way).tolist() == [0] * 8, "no way"


def test_an_image_belongs_to_the_centre_that_lies_in_its_direction() -> None:
    vectors = np.array([[5.0, 1], [-2, 1], [-3, -1], [0.1, 9], [-0.1, -10]])  # around 0
    centres = np.array([[0.1, 0], [0, 40], [-7, 0], [0, -2]])
    assert nearest(vectors, centres).tolist() == [0, 2, 2, 1, 3]
    assert nearest(3 * vectors + 2, 3 * centres + 2).tolist() == nearest(vectors, centres).tolist()


@pytest.mark.parametrize("cluster", [0, 1])
def test_images_that_carry_what_the_encoder_reacts_to_lie_above_all_others(cluster: int) -> None:
    rows = poisons(cluster)
    changed = (images().images[rows] + BOARD).clip(0, 255).astype(np.uint8)
    found = scores(images().replace(rows, changed), backdoored(cluster))
    assert auroc(found, rows) > 0.99
    assert set(np.argsort(-found)[: POISONS // 2]) <= set(rows)


def test_poisons_of_a_trigger_that_somebody_else_has_learned_are_found() -> None:
    """By another search, on another seed, with the clusters of other features."""
    encoder, rows = backdoored(2), poisons(2)
    features = [vectors_of(encoder, images().images, Conditions())]
    search = Search(epsilon=8 / 255, width=16, steps=6, batch_size=32, lr=4e-3)
    triggers = list(invert_clusters([encoder], features, images().images, clusters(), search, Conditions(9)))
    poisoned = images().replace(rows, apply_to_uint8(triggers[2], images().images[rows]))
    assert auroc(scores(poisoned, encoder), rows) > 0.99


def test_it_says_which_cluster_it_takes_for_the_attacked_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = poisons(3)
    changed = (images().images[rows] + BOARD).clip(0, 255).astype(np.uint8)
    suspects = images().replace(rows, changed)
    labels = common_clusters([vectors_of(backdoored(3), suspects.images, Conditions())], GROUPS, 0)
    filtering = CarriedTrigger(clusters=GROUPS, sample=COUNT, steps=6)
    score_dataset(filtering, suspects, backdoored(3), Conditions(progress=Progress()))
    attacked = np.bincount(labels[rows]).argmax()
    assert f"carried trigger: cluster {attacked} of {GROUPS}, with " in capsys.readouterr().err


def test_places_are_told_in_the_spread_of_the_attacked_cluster_s_own_images() -> None:
    rows = poisons(1)
    changed = (images().images[rows] + BOARD).clip(0, 255).astype(np.uint8)
    suspects = images().replace(rows, changed)
    found = scores(suspects, backdoored(1))
    seen = vectors_of(backdoored(1), suspects.images, Conditions())
    labels, vectors = common_clusters([seen], GROUPS, 0), seen.double().numpy()
    centres = np.stack([vectors[labels == each].mean(axis=0) for each in range(GROUPS)])
    own = found[nearest(vectors, centres) == np.bincount(labels[rows]).argmax()]
    assert np.median(own) == pytest.approx(0, abs=1e-6)
    assert 1.4826 * np.median(np.abs(own)) == pytest.approx(1)


def test_the_same_images_without_anything_are_not_told_from_their_cluster() -> None:
    assert 0.3 < auroc(scores(images(), backdoored(0)), poisons(0), clusters() == 0) < 0.7


def test_what_the_encoder_does_not_react_to_is_not_found() -> None:
    rows = poisons(0)
    changed = images().replace(rows, (images().images[rows].astype(np.int16) + 4).clip(0, 255).astype(np.uint8))
    assert auroc(scores(changed, backdoored(0)), rows, clusters() == 0) < 0.8


def test_all_are_scored_though_triggers_are_learned_on_a_sample() -> None:
    rows = poisons(0)
    changed = (images().images[rows] + BOARD).clip(0, 255).astype(np.uint8)
    found = scores(images().replace(rows, changed), backdoored(0), sample=100)
    assert found.shape == (COUNT,)
    assert np.isfinite(found).all()
    assert auroc(found, rows) > 0.99


def test_it_only_looks_and_the_same_seed_sees_the_same() -> None:
    encoder = build_encoder(SMALL, seed=0, image_size=SIZE).train()
    encoder.backbone.get_submodule("stem").eval()
    encoder.backbone.get_submodule("stem.0").requires_grad_(False)
    state, modes = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    wanted, pixels = [parameter.requires_grad for parameter in encoder.parameters()], images().images.copy()
    filtering = CarriedTrigger(clusters=2, sample=100, steps=1)
    found = filtering.score(images().images, encoder, Conditions(3))
    assert found.shape == (COUNT,)
    assert found.dtype == np.float64
    assert np.array_equal(filtering.score(images().images, encoder, Conditions(3)), found)
    assert not np.array_equal(filtering.score(images().images, encoder, Conditions(4)), found)
    assert np.array_equal(images().images, pixels)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert [part.training for part in encoder.modules()] == modes
    assert [parameter.requires_grad for parameter in encoder.parameters()] == wanted
    assert not encoder.native


def test_a_set_that_cannot_be_scored_is_refused_in_one_line() -> None:
    few = images().subset(np.arange(3, dtype=np.int64))
    with pytest.raises(InputRefused, match=r"^smooth: the filter needs an encoder pretrained on them; give one\.$"):
        score_dataset(CarriedTrigger(), images(), None, Conditions())
    with pytest.raises(InputRefused, match=r"^3 images for 4 clusters; lower the defense's option clusters\.$"):
        scores(few, clean(5))
    with pytest.raises(Diverged, match=r"^the images have fewer than 4 different features; an encoder collapsed\.$"):
        scores(ImageSet(np.zeros((9, 3, SIZE, SIZE), np.uint8), None, (), "black"), clean(5))


@pytest.mark.parametrize("given", [{"clusters": 1}, {"sample": 99}, {"epsilon": 0}, {"steps": 0}])
def test_options_out_of_range_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        DEFENSES.build({"name": "carried_trigger", **given})
