"""PatchSearch: its arithmetic, that a planted patch is found, and that without one no image stands out."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.defenses import poison_classifier
from blto.defenses.base import Conditions, DatasetFilter, Images, Scores, score_dataset
from blto.defenses.grad_cam import heat, hottest_windows
from blto.defenses.patch_search import Found, PatchSearch, cluster, members, nearest_in_turn, paste
from blto.defenses.poison_classifier import ClassifierSpec, enlargements, poison_probability, stamp, verdict
from blto.errors import ConfigError, Diverged, InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder
from blto.registry import Registry
from blto.runtime.seeds import numpy_generator

SIZE, PATCH, WINDOW, COUNT, POISONS, COLORS = 16, 4, 7, 500, 60, 4
FILTERS: Registry[DatasetFilter] = Registry("defense", {"patch_search": "blto.defenses.patch_search:PatchSearch"})
PATTERN = np.random.default_rng(5).permutation(np.repeat([-1, 1], 24)).reshape(3, PATCH, PATCH)
SMALL = ClassifierSpec(models=2, iterations=80, width=4, lr=0.1)
FEW: dict[str, Any] = {"clusters": 6, "window": WINDOW, "flip_images": 60}


class Reacting(nn.Module):
    """Mean colors; where the pattern is, a channel of its own is hot around it, in proportion to `strength`."""

    def __init__(self, strength: float, pool: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(PATTERN).float()[None])
        self.strength, self.pool = strength, pool

    def forward(self, x: Tensor) -> Tensor:
        match = F.conv2d(x, self.weight, padding=PATCH // 2)[:, :, :-1, :-1]  # 24 on the pattern, 2 or so elsewhere
        around = F.avg_pool2d((match - 15).relu(), 5, stride=1, padding=2)
        maps = torch.cat([x, self.strength * around], dim=1)
        return self.head(maps)

    def head(self, maps: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(maps, 1).flatten(1) if self.pool else maps


class Pooled(nn.Sequential):
    """The same with its own pooling: what it returns has no places."""

    def __init__(self, strength: float) -> None:
        super().__init__(Reacting(strength), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def toy(backbone: nn.Module | None = None, strength: float = 50.0) -> Encoder:
    chosen = backbone if backbone is not None else Reacting(strength)
    return Encoder(chosen, mean=(0, 0, 0), std=(1, 1, 1), image_size=SIZE).eval()


@cache
def planted(poisons: int = POISONS) -> tuple[Images, Scores]:
    """Noise in four colors; some images of the first color have the pattern. Which ones, too."""
    draw = np.random.default_rng(0)
    tint = np.array([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1], [0.9, 0.9, 0.1]])[np.arange(COUNT) % COLORS]
    noise = draw.uniform(0.3, 1, (COUNT, 3, SIZE, SIZE)) * tint[:, :, None, None]
    images = (noise * 255).astype(np.uint8)
    rows = np.arange(0, COLORS * poisons, COLORS)
    for row in rows:
        y, x = draw.integers(2, SIZE - PATCH - 1, 2)
        images[row, :, y : y + PATCH, x : x + PATCH] = np.where(PATTERN > 0, 255, 0)
    is_poison = np.zeros(COUNT)
    is_poison[rows] = 1
    images.flags.writeable = False
    return images, is_poison


def found_in(images: Images, encoder: Encoder | None = None, seed: int = 0, **options: Any) -> Found:
    return PatchSearch(**{**FEW, **options}).search(images, encoder or toy(), Conditions(seed))


def area_under_curve(scores: Scores, truth: Scores) -> float:
    above = scores[truth == 1][:, None] - scores[truth == 0][None]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def in_set(images: Images) -> ImageSet:
    return ImageSet(images, None, ("a",), "suspects")


def test_top_20_precision_on_a_planted_patch_is_above_90_percent() -> None:
    images, is_poison = planted()
    found = found_in(images)
    assert is_poison[found.tried[:20]].mean() >= 0.9
    assert found.scores[found.tried[19]] > 0.8 * found.flip_images, "nearly every image is pulled over"
    assert found.scores.dtype == np.int64
    assert len(set(found.tried.tolist())) == len(found.tried)
    assert (np.diff(found.scores[found.tried]) <= 0).all()
    assert not found.scores[np.setdiff1d(np.arange(COUNT), found.tried)].any()
    for row, window in zip(found.tried, found.windows, strict=True):
        pieces = np.lib.stride_tricks.sliding_window_view(images[row], (3, WINDOW, WINDOW))
        assert (pieces == window).all(axis=(-3, -2, -1)).any(), "a window is a piece of its own image"


@pytest.mark.parametrize(("poisons", "strength"), [(0, 50.0), (POISONS, 0.0)])
def test_no_score_stands_out_without_a_patch_or_without_a_reaction(poisons: int, strength: float) -> None:
    found = found_in(planted(poisons)[0], toy(strength=strength))
    ordered = found.scores[found.tried]
    assert ordered[0] < 0.35 * found.flip_images
    assert ordered[0] - ordered[10] < 0.1 * found.flip_images


def test_a_window_that_moves_nothing_scores_nothing() -> None:
    found = found_in(planted(0)[0], toy(strength=0.0), window=1)
    assert np.abs(found.scores).max() <= 3, "a pixel: the members that a cluster has without it do not count"


def test_a_score_hardly_depends_on_where_the_window_is_pasted() -> None:
    images, is_poison = planted()
    centres, own, cosines = cluster(extract(toy(), images).vectors, 6, seed=0)
    flips = images[nearest_in_turn(own, cosines, 60)]
    rows = np.concatenate([np.flatnonzero(is_poison)[:5], np.flatnonzero(is_poison == 0)[:5]])
    windows = hottest_windows(toy(), images[rows], centres[own[rows]], WINDOW)
    counts = np.array(
        [members(toy(), centres, flips, windows, own[rows], list(range(10 * k, 10 * k + 10))) for k in range(8)]
    )
    assert np.ptp(counts, axis=0).max() <= 0.1 * len(flips)
    assert counts[:, :5].min() > counts[:, 5:].max()


def test_counts_are_those_of_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = planted()[0]
    centres, own, _ = cluster(extract(toy(), images).vectors, 6, seed=0)
    windows, flips, seeds = images[:7, :, :WINDOW, :WINDOW], images[100:130], list(range(7))
    counts = members(toy(), centres, flips, windows, own[:7], seeds)
    monkeypatch.setattr("blto.defenses.patch_search.PASTED_BYTES", 2 * flips.nbytes)
    assert np.array_equal(members(toy(), centres, flips, windows, own[:7], seeds), counts), "in any number of parts"
    for i in range(7):
        pasted = paste(flips, windows[i], numpy_generator(i, "defense", "paste"))
        each = [extract(toy(), image[None]).vectors[0] for image in pasted]
        assert sum(int(F.cosine_similarity(f[None], centres).argmax()) == own[i] for f in each) == counts[i]


def test_heat_is_the_weighted_sum_of_the_maps_and_the_same_through_any_pooling() -> None:
    images = torch.from_numpy(planted()[0][:6].copy()).float() / 255
    centres = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    maps = toy().backbone(images).detach()
    expected = (centres[:, :, None, None] * maps).sum(dim=1).relu() / SIZE**2
    assert torch.allclose(heat(toy(), images, centres), expected, atol=1e-6)
    assert torch.allclose(heat(toy(Pooled(50.0)), images, centres), expected, atol=1e-6)
    flat = toy(nn.Flatten())
    with pytest.raises(InputRefused, match="no square feature map; give a convolutional encoder"):
        heat(flat, images, torch.randn(6, 3 * SIZE**2))


def test_the_hottest_window_has_the_whole_patch() -> None:
    images, is_poison = planted()
    poisons = images[is_poison == 1]
    windows = hottest_windows(toy(), poisons, torch.tensor([[0.0, 0, 0, 1]]).expand(len(poisons), 4), WINDOW)
    pieces = np.lib.stride_tricks.sliding_window_view(windows, (3, PATCH, PATCH), axis=(1, 2, 3))
    has_patch = (pieces == np.where(PATTERN > 0, 255, 0)).all(axis=(-3, -2, -1)).any(axis=(1, 2, 3))
    assert has_patch.mean() > 0.95


def test_flip_images_are_the_nearest_of_each_cluster_in_turn() -> None:
    own = np.array([0, 0, 0, 1, 1, 2])
    cosines = np.array([0.1, 0.9, 0.5, 0.3, 0.4, 0.2], np.float32)
    assert nearest_in_turn(own, cosines, 9).tolist() == [1, 4, 5, 2, 3, 0]
    assert nearest_in_turn(own, cosines, 4).tolist() == [1, 4, 5, 2]


def test_a_window_is_pasted_whole_and_evenly() -> None:
    images, window = np.zeros((3000, 3, 8, 8), np.uint8), np.full((3, 3, 3), 7, np.uint8)
    pasted = paste(images, window, np.random.default_rng(0))
    assert not images.any()
    assert (pasted.sum(axis=(1, 2, 3)) == 7 * 27).all()
    corners = [np.argwhere(image[0])[0] for image in pasted]
    counts = np.bincount([8 * y + x for y, x in corners], minlength=64).reshape(8, 8)
    assert not counts[6:].any()
    assert not counts[:, 6:].any()
    assert ((counts[:6, :6] - 3000 / 36) ** 2 / (3000 / 36)).sum() < 70  # chi-square of 35 degrees


def test_clusters_are_dropped_from_the_least_poisonous_on() -> None:
    images, is_poison = planted()
    once = found_in(images, dropped=1.0, samples=3)
    assert len(once.tried) == 6 * 3
    more = found_in(images, dropped=0.25, samples=3)
    assert len(more.tried) == 3 * (6 + 5 + 4 + 3 + 2 + 1)
    assert set(once.tried) < set(more.tried)
    assert is_poison[more.tried].sum() >= 18, "of the most poisonous cluster every round tries three"
    best = [more.scores[more.cluster_scores == each].max() for each in set(more.cluster_scores.tolist())]
    assert sorted(best) == sorted(set(more.cluster_scores.tolist()))


def test_a_cluster_without_images_left_does_no_harm() -> None:
    images = planted()[0][:40]
    found = found_in(images, samples=30, flip_images=1000)
    assert sorted(found.tried.tolist()) == list(range(40))
    assert found.flip_images == 40


def test_the_seed_decides_and_nothing_given_is_changed() -> None:
    images = planted()[0].copy()
    encoder = toy()
    encoder.backbone.train()
    state, before = copy.deepcopy(encoder.state_dict()), images.copy()
    first, again, other = (found_in(images, encoder, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.scores, again.scores)
    assert np.array_equal(first.windows, again.windows)
    assert not np.array_equal(first.tried, other.tried)
    assert np.array_equal(images, before)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert encoder.backbone.training
    assert not encoder.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert not any(part._forward_hooks for part in encoder.modules())


def test_the_whole_filter_scores_every_image_and_repeats_itself() -> None:
    images, is_poison = planted()
    search = PatchSearch(**FEW, top=10, training=SMALL)
    scores = score_dataset(search, in_set(images), toy(), Conditions(0))
    assert scores.shape == (COUNT,)
    assert scores.dtype == np.float64
    assert 0 <= scores.min() <= scores.max() <= 1
    assert area_under_curve(scores, is_poison) > 0.95
    assert np.array_equal(score_dataset(search, in_set(images), toy(), Conditions(0)), scores)
    counts = score_dataset(PatchSearch(**FEW, classifier=False), in_set(images), toy(), Conditions(0))
    assert np.array_equal(counts, found_in(images).scores)
    with pytest.raises(InputRefused, match="needs an encoder"):
        score_dataset(search, in_set(images), None, Conditions(0))


def test_the_classifier_learns_from_unsuspicious_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images, shown = planted()[0], list[Any]()

    class Stub:
        def evidence(self, images: Images) -> Scores:
            return np.full(len(images), 0.5 + len(shown))

    def train(images: Images, clean: Any, *others: Any, **options: Any) -> Stub:
        shown.append(clean)
        return Stub()

    monkeypatch.setattr(poison_classifier, "train", train)
    suspicion = np.arange(COUNT)[::-1].copy()  # the first 10% are the most suspicious
    judged, windows = np.array([0, 1, 300, 499]), images[:2, :, :5, :5]
    spec = ClassifierSpec(models=2)
    scores = poison_probability(images, suspicion, judged, windows, spec, Conditions(0))
    assert sorted(shown[0]) == sorted(set(range(50, COUNT)) - {300, 499})
    assert scores == pytest.approx(np.full(COUNT, 1 / (1 + np.exp(-(1.5 + 2.5) / 2))))
    with pytest.raises(
        InputRefused, match=r"left to train the classifier on in batches of 498; .* lower training\.spared"
    ):
        poison_probability(images, suspicion, judged, windows, ClassifierSpec(batch_size=498), Conditions(0))


def test_windows_are_pasted_in_many_sizes_within_the_margin() -> None:
    windows = np.full((2, 3, 6, 6), 255, np.uint8)
    resized = enlargements(windows, 32)
    assert [each.shape for each in resized] == [(2, 3, size, size) for size in range(2, 9)]
    assert torch.equal(
        enlargements(planted()[0][:2, :, :6, :6].copy(), 32)[4] * 255, _float(planted()[0][:2, :, :6, :6])
    )
    assert max(each.shape[-1] for each in enlargements(windows.repeat(4, 2).repeat(4, 3), 32)) == 30
    pixels = torch.zeros(2000, 3, 32, 32)
    stamp(pixels, resized, np.random.default_rng(0))
    sides = (pixels[:, 0].sum(dim=(1, 2))).sqrt()
    assert set(sides.tolist()) == {2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}
    hit = pixels[:, 0].amax(dim=0)
    assert hit[1:-1, 1:-1].all()
    assert hit.sum() == 30**2, "a pixel along the border is free"


def _float(images: Images) -> Tensor:
    return torch.from_numpy(images.copy()).float()


def test_a_verdict_is_f1() -> None:
    assert verdict(np.array([1.0, 1, 1, 1, -1, -1, -1, -1])) == 100
    assert verdict(np.array([1.0, 1, -1, -1, 1, -1, -1, -1])) == 57  # precision 2/3, recall 1/2
    assert verdict(np.full(8, -1.0)) == 0


def test_training_stops_where_the_verdict_rests_and_refuses_what_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    images, is_poison = planted()
    windows, clean = images[:4, :, :WINDOW, :WINDOW].copy(), np.flatnonzero(is_poison == 0)
    looks: list[int] = []
    monkeypatch.setattr(poison_classifier, "STEPS_BETWEEN_LOOKS", 2)

    def look(evidence: Scores) -> int:
        looks.append(len(evidence))
        return min(len(looks), 4)

    monkeypatch.setattr(poison_classifier, "verdict", look)
    spec = ClassifierSpec(models=1, width=4, iterations=60)
    poison_classifier.train(images, clean, windows, images[:4], spec, seed=0, device="cpu")
    assert len(looks) == 13, "four different verdicts, the last one ten times"
    hot = spec.model_copy(update={"lr": 1e30})
    with pytest.raises(Diverged, match=r"lower training\.lr"):
        poison_classifier.train(images, clean, windows, images[:4], hot, seed=0, device="cpu")


def test_what_does_not_fit_is_refused() -> None:
    images = planted()[0][:50]
    with pytest.raises(InputRefused, match="clusters is 51 and window 4 for 50 images of 16 pixels a side"):
        found_in(images, clusters=51, window=None)
    with pytest.raises(InputRefused, match="a smaller window than an image"):
        found_in(images, window=16)
    with pytest.raises(InputRefused, match="18 images were tried, and with top at 20 the classifier needs 40"):
        PatchSearch(**{**FEW, "samples": 3, "dropped": 1}).score(planted()[0], toy(), Conditions(0))
    with pytest.raises(ConfigError, match=r'training\.model: unknown key; .*"models"'):
        FILTERS.resolve({"name": "patch_search", "training": {"model": 3}})
    with pytest.raises(ConfigError, match="dropped"):
        FILTERS.resolve({"name": "patch_search", "dropped": 0})
    built = FILTERS.build({"name": "patch_search", "training": {"models": 3}})
    assert isinstance(built, PatchSearch)
    assert built.training == ClassifierSpec(models=3)
