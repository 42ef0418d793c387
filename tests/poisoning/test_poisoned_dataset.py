"""Only the planned images change, and a victim sees images and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning import Perturbation, PoisonedDataset, PoisonPlan


def test_only_planned_images_change(clean: ImageSet, dataset: PoisonedDataset) -> None:
    changed = (dataset.poisoned.images != clean.images).any(axis=(1, 2, 3))
    assert changed.sum() == dataset.n_poisoned == 2
    assert np.array_equal(changed, dataset.mask)
    assert np.array_equal(np.flatnonzero(dataset.mask), dataset.plan.indices)
    assert np.array_equal(dataset.poisoned.images[dataset.mask], dataset.replacements)


def test_a_victim_sees_no_label_class_name_or_mask(dataset: PoisonedDataset) -> None:
    seen = dataset.training_images()
    assert seen.labels is None
    assert seen.class_names == ()
    assert set(vars(seen)) <= {"images", "labels", "class_names", "name", "content_hash"}
    assert np.array_equal(seen.images, dataset.poisoned.images)


def test_the_clean_set_is_not_written_to(clean: ImageSet, dataset: PoisonedDataset) -> None:
    before = clean.images.tobytes()
    dataset.training_images()
    assert clean.images.tobytes() == before


def test_perturbation_in_closed_form() -> None:
    clean = ImageSet(np.full((3, 3, 2, 2), 100, dtype=np.uint8), np.zeros(3, dtype=np.int64), ("a",), "flat")
    replacements = np.full((2, 3, 2, 2), 100, dtype=np.uint8)
    replacements[0, 0] = 103  # 4 of 12 values by +3
    replacements[1, 0, 0, 0] = 95  # 1 of 12 values by -5
    dataset = PoisonedDataset(clean, PoisonPlan(np.array([0, 2]), 0, 3), replacements)
    assert dataset.epsilon_reached == pytest.approx(5 / 255)
    found = dataset.perturbation
    assert found.linf_min == pytest.approx(3 / 255)
    assert found.linf_mean == pytest.approx(4 / 255)
    assert found.l2_mean == pytest.approx((6 + 5) / 2 / 255)
    assert found.changed_mean == pytest.approx(5 / 24)


def test_nothing_poisoned_is_the_clean_set(clean: ImageSet) -> None:
    none = PoisonedDataset(clean, PoisonPlan(np.array([], dtype=np.int64), 0, len(clean)), clean.images[:0])
    assert none.poisoned.content_hash == clean.content_hash
    assert none.perturbation == Perturbation()
    assert not none.mask.any()


def test_a_plan_for_another_set_is_refused(dataset: PoisonedDataset) -> None:
    with pytest.raises(ConfigError, match="plan again"):
        replace(dataset, plan=PoisonPlan(dataset.plan.indices, 1, 13))


def test_replacements_that_do_not_fit_are_refused(dataset: PoisonedDataset) -> None:
    for replacements in (dataset.replacements[:1], dataset.replacements[..., :4], dataset.replacements.astype(float)):
        with pytest.raises(ConfigError, match="one per planned image"):
            replace(dataset, replacements=replacements)
