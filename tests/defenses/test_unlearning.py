"""Unlearning: reactions shrink and plain features stay, batch norm is left alone, nothing found changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blto.data import load
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, Images, repair_encoder
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.defenses.unlearning import Unlearning
from blto.errors import ConfigError, Diverged, InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder, build_encoder
from blto.poisoning import apply_to_uint8
from tests.defenses.tampered import SMALL, clean_images, same, settle, stamped, victim

pytestmark = pytest.mark.usefixtures("one_start")
TEST = load({"name": "synthetic", "train_size": 256, "test_size": 64, "image_size": 16}, split="test").images
NOTHING = {"images": 64, "clusters": 0, "patch_epochs": 0}
CLUSTERS = {"images": 128, "clusters": 3, "epsilon": 16 / 255, "patch_epochs": 0, "search_steps": 15, "lr": 0.1}
PATCH = {"images": 64, "clusters": 0, "patch_epochs": 20, "steps": 100, "lr": 0.05}
HASTY = {**CLUSTERS, "images": 64, "clusters": 2, "search_steps": 1, "steps": 2}


def repaired(options: Mapping[str, float], seed: int = 0) -> Encoder:
    repair = Unlearning(**{"batch_size": 32, "steps": 80, **options})  # type: ignore[arg-type]
    return repair_encoder(repair, victim(), clean_images(), Conditions(seed))


@cache
def of_clusters() -> Encoder:
    return repaired(CLUSTERS)


@cache
def of_a_patch() -> Encoder:
    return repaired(PATCH)


def moved(encoder: Encoder, images: Images, changed: Images) -> float:
    """How far features move, in the spread of those of images as they are."""
    before, after = (extract(encoder, each).vectors for each in (images, changed))
    return float((after - before).norm(dim=1).mean() / (before - before.mean(dim=0)).norm(dim=1).mean())


def kept(encoder: Encoder) -> float:
    """Mean cosine of features of images that were never shown, before and after."""
    return float(F.cosine_similarity(extract(victim(), TEST).vectors, extract(encoder, TEST).vectors).mean())


def test_a_planted_patch_that_was_searched_for_moves_features_less_and_plain_features_stay() -> None:
    before, after = (moved(each, TEST, stamped(TEST)) for each in (victim(), of_a_patch()))
    assert before > 5
    assert after < 0.7 * before
    assert kept(of_a_patch()) > 0.98


def test_triggers_that_somebody_else_inverts_move_features_less_and_plain_features_stay() -> None:
    images = clean_images().images
    features = [vectors_of(victim(), images, Conditions())]
    search = Search(epsilon=16 / 255, width=16, steps=20, batch_size=32, lr=4e-3)
    clusters = common_clusters(features, 3, 5)
    shares = []
    for trigger in invert_clusters([victim()], features, images, clusters, search, Conditions(5)):
        changed = apply_to_uint8(trigger, TEST)
        shares.append(moved(of_clusters(), TEST, changed) / moved(victim(), TEST, changed))
    assert max(shares) < 0.95
    assert np.mean(shares) < 0.8
    assert kept(of_clusters()) > 0.98


def test_where_nothing_is_searched_for_the_encoder_comes_back_as_it_was() -> None:
    found = repaired(NOTHING)
    assert found is not victim()
    assert same(found, victim())
    assert not same(of_clusters(), victim())


def test_a_patch_that_is_not_found_changes_nothing() -> None:
    sound = build_encoder(SMALL, seed=0, image_size=16)
    settle(sound, clean_images().images)
    repair = Unlearning(images=64, clusters=0, patch_epochs=1)
    assert same(repair_encoder(repair, sound, clean_images(), Conditions()), sound)


def test_batch_norm_and_what_is_given_are_left_alone() -> None:
    before, modes = deepcopy(victim()), [part.training for part in victim().modules()]
    found = repaired(HASTY)
    assert same(before, victim())
    assert [part.training for part in victim().modules()] == modes
    norms = {name for name, part in victim().named_modules() if isinstance(part, torch.nn.BatchNorm2d)}
    changed = {
        name.rpartition(".")[0]
        for name, value in found.state_dict().items()
        if not torch.equal(value, victim().state_dict()[name])
    }
    assert norms
    assert changed
    assert not norms & changed
    assert not any(part.training for part in found.modules())
    assert not found.native
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_the_same_seed_gives_the_same_encoder_and_another_another() -> None:
    first = repaired(HASTY)
    torch.rand(3)  # the global generator is none of its business
    assert same(first, repaired(HASTY))
    assert not same(first, repaired(HASTY, seed=1))


def test_the_patch_is_shown_as_often_as_all_other_triggers_together() -> None:
    images = clean_images().images[:64]
    repair = Unlearning(images=64, clusters=3, search_steps=1, patch_epochs=20)
    features = vectors_of(victim(), images, Conditions())
    found = repair._triggered(deepcopy(victim()), features, images, Conditions())
    assert len(found) == 6
    changes = [np.abs(each.astype(np.int16) - images).max() for each in found]
    assert max(changes[:3]) <= 8
    assert min(changes[3:]) > 100
    assert all(np.array_equal(found[3], each) for each in found[4:])


def test_more_images_a_step_than_there_are_means_all_of_them() -> None:
    assert same(repaired({**HASTY, "batch_size": 64}), repaired({**HASTY, "batch_size": 1000}))


def test_bad_input_is_refused_in_one_line() -> None:
    with pytest.raises(InputRefused, match="256 images, and the defense needs 5000; give more"):
        repair_encoder(Unlearning(), victim(), clean_images(), Conditions())
    with pytest.raises(InputRefused, match=r"^64 images for 65 clusters; lower the defense's option clusters\.$"):
        repaired({**HASTY, "clusters": 65})
    with pytest.raises(Diverged, match="lower its learning rate"):
        repaired({**HASTY, "lr": 1e30, "steps": 9})


@pytest.mark.parametrize("given", [{"clusters": 1}, {"clusters": -1}, {"patch_epochs": -1}, {"lr": 0}, {"images": 1}])
def test_options_out_of_range_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        DEFENSES.build({"name": "unlearning", **given})
