"""A small labeled set and its poisoned version, with two poisons in four images of the target class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blto.data.images import ImageSet
from blto.poisoning import AdditiveTrigger, Budget, PoisonedDataset, apply_to_uint8, plan_replacement, write_poisoned
from blto.poisoning.manifest import Layout

N, SIZE = 12, 8


@pytest.fixture
def clean() -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (N, 3, SIZE, SIZE), dtype=np.uint8)
    return ImageSet(images, np.arange(N, dtype=np.int64) % 3, ("ant", "bee", "cow"), "toy")


@pytest.fixture
def trigger() -> AdditiveTrigger:
    return AdditiveTrigger(torch.linspace(-0.1, 0.1, 3 * SIZE * SIZE).reshape(3, SIZE, SIZE), Budget(8 / 255))


@pytest.fixture
def dataset(clean: ImageSet, trigger: AdditiveTrigger) -> PoisonedDataset:
    plan = plan_replacement(clean.labels, num_classes=3, target_class=1, poison_rate=2 / N, seed=7)
    return PoisonedDataset(clean, plan, apply_to_uint8(trigger, clean.images[plan.indices]))


@pytest.fixture
def write(dataset: PoisonedDataset, trigger: AdditiveTrigger, tmp_path: Path) -> Callable[[Layout], Path]:
    def written(layout: Layout) -> Path:
        write_poisoned(dataset, trigger, seeds={"select": 7}, out=tmp_path / "out", layout=layout)
        return tmp_path / "out"

    return written
