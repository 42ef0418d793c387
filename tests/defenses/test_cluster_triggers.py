"""Triggers of clusters: which images belong together, that a trigger leads to its cluster, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from blto.defenses import cluster_triggers
from blto.defenses.base import Conditions
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.errors import Diverged, InputRefused
from blto.models.encoder import Encoder, build_encoder
from blto.poisoning import GeneratorTrigger, apply_to_uint8
from blto.runtime.seeds import seeded
from tests.defenses.random_filters import clean
from tests.defenses.tampered import SMALL, clean_images

COUNT = 3
SEARCH = Search(epsilon=8 / 255, width=16, steps=12, batch_size=32, lr=4e-3, starts=1)
HASTY = replace(SEARCH, steps=1)
PIXELS = clean_images().images


@cache
def clusters() -> npt.NDArray[np.int64]:
    return common_clusters([vectors_of(clean(seed), PIXELS, Conditions()) for seed in (0, 1)], COUNT, 0)


def inverted(*encoders: Encoder, seed: int = 0, search: Search = SEARCH) -> list[GeneratorTrigger]:
    features = [vectors_of(each, PIXELS, Conditions()) for each in encoders]
    return list(invert_clusters(encoders, features, PIXELS, clusters(), search, Conditions(seed)))


@cache
def found() -> list[GeneratorTrigger]:
    """What is inverted on two encoders. Nobody may change it."""
    return inverted(clean(0), clean(1))


def planted() -> tuple[list[Tensor], npt.NDArray[np.int64]]:
    """Features of two encoders, of which either tells two halves apart, and both together four groups."""
    group, draw = np.arange(80) % 4, torch.Generator().manual_seed(0)
    features = []
    for half, dimensions in ((group // 2, 6), (group % 2, 9)):
        ways = torch.randn(2, dimensions, generator=draw)
        features.append(3 + 5 * ways[half] + 0.1 * torch.randn(80, dimensions, generator=draw))
    return features, group


def test_planted_clusters_are_found_whatever_the_order_and_scale_of_dimensions_and_encoders() -> None:
    features, group = planted()
    assert all(adjusted_rand_score(group, common_clusters([each], 4, 0)) < 0.7 for each in features)
    turned = [each[:, torch.randperm(each.shape[1], generator=torch.Generator().manual_seed(1))] for each in features]
    scaled = [1e-3 * features[0] + 5, 1e3 * features[1]]
    for given in (features, turned, features[::-1], scaled):
        labels = common_clusters(given, 4, 0)
        assert adjusted_rand_score(group, labels) == 1
        assert labels.dtype == np.int64
        assert set(labels) == {0, 1, 2, 3}
    assert np.array_equal(common_clusters(features, 4, 3), common_clusters(features, 4, 3))


def test_an_image_that_all_encoders_but_one_see_alike_is_where_most_see_it() -> None:
    """No encoder counts for more because its features are long or many."""
    draw, group = torch.Generator().manual_seed(0), np.arange(60) % 2
    ways = torch.randn(2, 4, generator=draw)
    two = [5 * ways[group] + 0.1 * torch.randn(60, 4, generator=draw) for _ in range(2)]
    other = 1e4 * torch.randn(2, 500, generator=draw)[np.arange(60) // 30]
    assert adjusted_rand_score(group, common_clusters([*two, other], 2, 0)) == 1


def test_too_few_images_and_collapsed_encoders_are_refused_in_one_line() -> None:
    features, _ = planted()
    with pytest.raises(InputRefused, match=r"^3 images for 4 clusters; lower the defense's option clusters\.$"):
        common_clusters([each[:3] for each in features], 4, 0)
    with pytest.raises(Diverged, match=r"^the images have fewer than 4 different features; an encoder collapsed\.$"):
        common_clusters([torch.full((80, 5), 0.1)], 4, 0)


def test_each_cluster_has_one_trigger_within_the_budget_in_8_bit_levels() -> None:
    assert len(found()) == COUNT
    for trigger in found():
        triggered = apply_to_uint8(trigger, PIXELS).astype(np.int16)
        assert 4 < np.abs(triggered - PIXELS).max() <= 8
        assert (trigger.training, next(trigger.parameters()).device.type) == (False, "cpu")
    assert len({trigger.identity for trigger in found()}) == COUNT
    smaller = inverted(clean(0), search=replace(HASTY, epsilon=2.6 / 255))
    assert all(np.abs(apply_to_uint8(each, PIXELS).astype(np.int16) - PIXELS).max() == 2 for each in smaller)


def arrived(encoder: Encoder, trigger: GeneratorTrigger, cluster: int) -> tuple[float, float]:
    """Of triggered images of other clusters, the share nearest to the cluster's mean, and the mean cosine to it."""
    features, others = vectors_of(encoder, PIXELS, Conditions()), clusters() != cluster
    centre, spread = features.mean(dim=0), features.std(dim=0)
    white = (features - centre) / spread
    means = F.normalize(torch.stack([white[clusters() == each].mean(dim=0) for each in range(COUNT)]))
    moved = vectors_of(encoder, apply_to_uint8(trigger, PIXELS[others]), Conditions())
    cosines = F.normalize((moved - centre) / spread) @ means.T
    return float((cosines.argmax(dim=1) == cluster).float().mean()), float(cosines[:, cluster].mean())


@pytest.mark.parametrize("seed", [0, 1, 2])  # the third was not there when triggers were learned
def test_triggers_lead_to_their_clusters_further_than_an_untrained_generator(seed: int) -> None:
    encoder, untrained = clean(seed), SEARCH.fresh(0)
    gains = np.array(
        [
            np.subtract(arrived(encoder, trigger, each), arrived(encoder, untrained, each))
            for each, trigger in enumerate(found())
        ]
    )
    assert (gains > 0.05).all(), "of shares and cosines"


def test_it_is_a_function_of_its_seed() -> None:
    first = inverted(clean(0), search=HASTY)
    with seeded(123):  # the global generator is none of its business
        again = inverted(clean(0), search=HASTY)
    other = inverted(clean(0), search=HASTY, seed=1)
    assert [each.identity for each in first] == [each.identity for each in again]
    assert not {each.identity for each in first} & {each.identity for each in other}


def test_all_encoders_have_a_say() -> None:
    assert not {each.identity for each in inverted(clean(0))} & {each.identity for each in found()}


def test_encoders_and_images_are_as_they_were_whenever_a_trigger_is_handed_out() -> None:
    encoder, pixels = build_encoder(SMALL, seed=0, image_size=16).train(), PIXELS.copy()
    encoder.backbone.get_submodule("stem").eval()
    encoder.backbone.get_submodule("stem.0").requires_grad_(False)
    state, modes = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    wanted = [parameter.requires_grad for parameter in encoder.parameters()]
    features = [vectors_of(encoder, PIXELS, Conditions())]
    for _ in invert_clusters([encoder], features, PIXELS, clusters(), HASTY, Conditions()):
        assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
        assert [part.training for part in encoder.modules()] == modes
        assert [parameter.requires_grad for parameter in encoder.parameters()] == wanted
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert not encoder.native
    assert np.array_equal(PIXELS, pixels)


@pytest.mark.parametrize(
    ("paths", "last", "taken"),
    [
        (([0.9, 0.0, 0.0], [0.0, 0.9, 0.9]), 2, 2),
        (([0.0, 0.0, 0.0],) * 3, 2, 3),
        (([0.0], [0.5]), 10, 2),  # fewer steps than those that count
    ],
)
def test_triggers_are_trained_until_one_moves(
    monkeypatch: pytest.MonkeyPatch, paths: tuple[list[float], ...], last: int, taken: int
) -> None:
    begun: list[tuple[int, str]] = []

    def towards(goals: object, trigger: GeneratorTrigger, *rest: Any) -> Iterator[float]:
        begun.append((rest[-1], trigger.identity))
        yield from paths[(len(begun) - 1) % taken]

    monkeypatch.setattr(cluster_triggers, "_towards", towards)
    monkeypatch.setattr(cluster_triggers, "LAST", last)
    found = inverted(clean(0), search=replace(SEARCH, starts=3))
    assert len(begun) == len(set(begun)) == COUNT * taken
    assert [trigger.identity for trigger in found] == [identity for _, identity in begun[taken - 1 :: taken]]


def test_a_search_that_diverges_is_named_in_one_line() -> None:
    broken = clean(0)
    torch.nn.init.constant_(broken.backbone.weight, torch.nan)  # type: ignore[arg-type]
    features = [vectors_of(clean(0), PIXELS, Conditions())]
    with pytest.raises(Diverged, match=r"^the trigger of a cluster became NaN or Inf; give an encoder .* seed\.$"):
        list(invert_clusters([broken], features, PIXELS, clusters(), HASTY, Conditions()))
