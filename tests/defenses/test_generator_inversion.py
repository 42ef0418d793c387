"""Generator inversion: its shifts, that it tells a planted reaction from clean encoders, and what it learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, EncoderDetector, Images, Inspection, inspect_encoder, learn_from, taught
from blto.defenses.cluster_triggers import common_clusters, vectors_of
from blto.defenses.decree import DECREE
from blto.defenses.generator_inversion import USUAL, GeneratorInversion, log_shifts
from blto.errors import ConfigError, InputRefused
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.models.encoder import Encoder, build_encoder
from tests.defenses.random_filters import clean, stretched
from tests.defenses.tampered import SMALL, clean_images, settle

pytestmark = pytest.mark.usefixtures("one_start")
CLUSTERS, HASTY = 3, 1
IMAGES = clean_images()
REFERENCES, OTHERS, PLANTED, FURTHER = (0, 1, 2), (3, 4, 5, 6, 10, 11, 12), (5, 6, 7), (13, 14, 15, 16)
"""Seeds: learned from; clean; tampered with; clean, then tampered with."""


def detector(**options: object) -> GeneratorInversion:
    usual = {"references": len(REFERENCES), "images": len(IMAGES), "clusters": CLUSTERS, "steps": 10, "moved": 64}
    return GeneratorInversion(**{**usual, **options})  # type: ignore[arg-type]


@cache
def learned() -> Conditions:
    return learn_from(detector(), [clean(seed) for seed in REFERENCES], IMAGES, Conditions())


def quickly(seed: int = 0, count: int = 2, more: int = 0) -> Conditions:
    hasty = detector(references=count, steps=HASTY)
    return learn_from(hasty, [clean(each) for each in range(count + more)], IMAGES, Conditions(seed))


def inspect(encoder: Encoder, conditions: Conditions | None = None, **options: object) -> Inspection:
    return inspect_encoder(detector(**options), encoder, IMAGES, conditions or learned())


@cache
def usual() -> list[float]:
    """Scores of clean encoders that it has not learned from."""
    return [inspect(clean(seed)).score for seed in OTHERS]


@cache
def inside(cluster: int) -> Tensor:
    """Which images belong to a cluster."""
    seen = [vectors_of(clean(each), IMAGES.images, Conditions()) for each in REFERENCES]
    return torch.from_numpy(common_clusters(seen, CLUSTERS, 0) == cluster)


def planted(seed: int, cluster: int, gain: float) -> Encoder:
    """A clean encoder that answers more to what one cluster has and others have not."""
    seen = vectors_of(clean(seed), IMAGES.images, Conditions())
    return stretched(seed, F.normalize(seen[inside(cluster)].mean(dim=0) - seen.mean(dim=0), dim=0), gain)


def test_a_log_shift_is_that_of_the_mean_displacement_in_the_spread_of_clean_features() -> None:
    draw = np.random.default_rng(0)
    clean_ones, triggered = draw.normal(3, 2, (20, 5)), draw.normal(4, 2, (2, 12, 5))
    typical = np.sqrt(np.mean([np.sum((row - clean_ones.mean(axis=0)) ** 2) for row in clean_ones]))
    ways = [np.linalg.norm(np.mean(each - clean_ones[:12], axis=0)) for each in triggered]
    given = torch.from_numpy(clean_ones), [torch.from_numpy(each) for each in triggered]
    assert np.allclose(log_shifts(*given), np.log(np.array(ways) / typical))
    assert np.allclose(log_shifts(7 * given[0] + 1, [7 * each + 1 for each in given[1]]), log_shifts(*given))


def test_shifts_of_zero_and_features_that_never_vary_are_finite() -> None:
    still = torch.ones(6, 3)
    assert np.isfinite(log_shifts(torch.eye(6), [torch.eye(6)])).all()
    assert log_shifts(torch.eye(6), [torch.eye(6)]) < log_shifts(torch.eye(6), [torch.eye(6) + 1e-6])
    assert np.isfinite(log_shifts(still, [still, still + 1])).all()


@pytest.mark.parametrize("cluster", range(CLUSTERS))
def test_a_planted_reaction_is_found_in_whatever_encoder_and_cluster_it_is(cluster: int) -> None:
    for seed in PLANTED:
        weak, strong = (inspect(planted(seed, cluster, gain)).score for gain in (1.0, 5.0))
        assert weak > inspect(clean(seed)).score
        assert strong > max(weak, 1.3 * max(usual()))


def test_a_further_clean_encoder_is_told_from_a_tampered_one_and_no_other() -> None:
    further = [inspect(clean(seed)).score for seed in FURTHER]
    assert np.mean([new > old for new in further for old in usual()]) == pytest.approx(0.5, abs=0.35)
    for seed, score in zip(FURTHER, further, strict=True):
        assert inspect(planted(seed, 0, 0.0)).score == pytest.approx(score, rel=1e-3), "no gain"
        assert inspect(planted(seed, 0, 3.0)).score > 2 * max(usual())


def test_level_and_score_are_mean_and_deviation_of_the_excess_over_what_is_usual() -> None:
    alone = quickly(count=1)
    excess = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    tensors = alone.learned.tensors
    hasty = detector(steps=HASTY)
    found = inspect_encoder(hasty, clean(0), IMAGES, taught(hasty, {**tensors, USUAL: tensors[USUAL] - excess}, alone))
    assert found.score == pytest.approx(np.std([0.5, -1.0, 0.2]))
    assert list(found.measures) == ["level", "cluster"]
    assert found.measures["level"] == pytest.approx(-0.1)
    assert found.measures["cluster"] == 1
    assert found.flagged is None


def test_the_references_themselves_are_on_the_average_as_usual() -> None:
    assert np.mean([inspect(clean(seed)).measures["level"] for seed in REFERENCES]) == pytest.approx(0, abs=1e-9)


def test_images_with_the_trigger_of_the_oddest_cluster_are_shown() -> None:
    found = inspect(clean(3)).trigger
    assert list(found) == ["plain", "triggered"]
    change = 255 * (found["triggered"] - found["plain"]).abs()
    assert found["plain"].shape == found["triggered"].shape == (8, 3, 16, 16)
    assert 4 < change.max() < 8.001


def test_it_has_to_learn_first() -> None:
    with pytest.raises(InputRefused, match=r"^GeneratorInversion: compares with clean encoders of .*; give some.*\.$"):
        inspect(clean(0), Conditions())


@pytest.mark.parametrize(("option", "value"), [("clusters", 2), ("epsilon", 0.1), ("steps", 11), ("moved", 63)])
def test_what_was_learned_with_other_options_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^GeneratorInversion: has .*'{option}': {value}\b.*, and was given .*\.$"):
        inspect_encoder(detector(**{option: value}), clean(3), IMAGES, learned())


class Simple(EncoderDetector):
    """Learns nothing."""

    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        return Inspection(0.5, None)


def test_what_another_detector_has_learned_is_refused_and_one_that_learns_nothing_does_not_care() -> None:
    others = taught(Simple(), learned().learned.tensors, Conditions())
    with pytest.raises(
        ConfigError, match=r"^GeneratorInversion: was given what Simple has learned; let it learn .*\.$"
    ):
        inspect(clean(3), others)
    assert inspect_encoder(Simple(), clean(3), IMAGES, learned()).score == 0.5


def test_too_few_references_or_images_are_refused_and_more_are_not_looked_at() -> None:
    encoders = [clean(seed) for seed in range(2)]
    with pytest.raises(
        InputRefused, match=r"^2 clean encoders, and the defense learns from 3; give more, or lower .*\.$"
    ):
        learn_from(detector(), encoders, IMAGES, Conditions())
    with pytest.raises(InputRefused, match=r"256 images, and the defense needs 257; give more"):
        learn_from(detector(references=2, images=257), encoders, IMAGES, Conditions())
    with pytest.raises(InputRefused, match="100 images for 101 clusters"):
        learn_from(detector(references=2, images=100, clusters=101), encoders, IMAGES, Conditions())
    assert same(quickly().learned.tensors, quickly(more=1).learned.tensors)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_detector_that_learns_nothing_is_given_nothing_and_needs_no_reference() -> None:
    conditions = Conditions(3)
    assert learn_from(DECREE(images=2), [], None, conditions) is conditions
    assert DECREE.references == 0
    assert dict(EncoderDetector.learning) == conditions.learned.tensors == {}


def test_what_it_learned_can_be_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "learned.safetensors"
    write_safetensors(file, {name: value.numpy() for name, value in learned().learned.tensors.items()}, {})
    read = {name: torch.from_numpy(value.copy()) for name, value in read_safetensors(file)[0].items()}
    assert same(read, learned().learned.tensors)
    again, first = inspect(clean(3), taught(detector(), read, Conditions())), inspect(clean(3))
    assert (again.score, again.measures) == (first.score, first.measures)


def test_what_learning_depends_on_is_said() -> None:
    for option, value in {"images": 100, "clusters": 4, "epsilon": 0.1, "steps": 5, "moved": 20}.items():
        assert detector(**{option: value}).learning != detector().learning, option


def test_it_is_a_function_of_its_seed() -> None:
    first, again, other = quickly(), quickly(), quickly(1)
    assert same(first.learned.tensors, again.learned.tensors)
    assert not same(first.learned.tensors, other.learned.tensors)
    one, two = (inspect(clean(3), each, steps=HASTY).measures for each in (first, again))
    assert one == two


def test_encoders_and_images_are_left_as_they_were() -> None:
    encoder, pixels = build_encoder(SMALL, seed=0, image_size=16), IMAGES.images.copy()
    settle(encoder, IMAGES.images)
    state = copy.deepcopy(encoder.state_dict())
    hasty = detector(references=1, steps=1)
    inspect_encoder(hasty, encoder, IMAGES, learn_from(hasty, [encoder], IMAGES, Conditions()))
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert not any(part.training for part in encoder.modules())
    assert not encoder.native
    assert np.array_equal(IMAGES.images, pixels)


@pytest.mark.parametrize("given", [{"references": 0}, {"clusters": 1}, {"epsilon": 0}, {"moved": 5}, {"images": 50}])
def test_options_out_of_range_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        DEFENSES.build({"name": "generator_inversion", **given})
