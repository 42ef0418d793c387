"""What each stage of a whole experiment costs per unit, in the sizes of configs/cifar10-cpu.yaml; see `scaling`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from blto.attacks import ATTACKS
from blto.attacks.base import poison_with
from blto.attacks.bilevel import BilevelOptimisation
from blto.attacks.bilevel_spec import BilevelSpec
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.configuration import read_spec
from blto.data import load
from blto.evaluation import extract
from blto.evaluation.probes import LinearProbe, knn_predict
from blto.pretraining.loop import pretrain

CONFIG = Path(__file__).parent.parent / "configs" / "cifar10-cpu.yaml"
CLASSES = 10


def stage_costs(images: int, steps: int) -> dict[str, dict[str, Any]]:
    """Seconds a unit of every stage, by name, on synthetic images of CIFAR-10's size.

    Args:
        images: to train on, and a fifth of them to test on; the poisons are 1% of them.
        steps: of the bi-level loop's inner and outer problem each, after two that do not count.
    """
    spec = read_spec(CONFIG, ["pretraining.epochs=1", "pretraining.warmup_epochs=0"], None)
    source = {"name": "synthetic", "train_size": images, "test_size": images // 5, "image_size": 32}
    train, test = (load(source, split=split) for split in ("train", "test"))
    attack = ATTACKS.build(spec.attack)
    trigger = fresh_generator_trigger(spec.attack["generator"], 8 / 255, "residual", seed=0)
    options = BilevelSpec.model_validate(spec.attack["bilevel"])
    run = BilevelOptimisation(trigger, train, options, target_class=9, poison_rate=0.01, seed=0)
    found: dict[str, dict[str, Any]] = {}

    def timed(stage: str, unit: str, units: float, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[stage] = {"unit": unit, "seconds": (time.perf_counter() - started) / units, "units": units}
        return result

    def inner(count: int) -> None:
        for _ in range(count):
            run.inner_step()

    def outer(first: int, count: int) -> None:
        for number in range(first, first + count):
            run.outer_step(number, 1e-3)

    inner(2)
    outer(0, 2)
    timed("crafting, inner", f"step of {options.surrogate.batch_size} images", steps, lambda: inner(steps))
    timed("crafting, outer", f"step of {options.outer_batch_size} images", steps, lambda: outer(2, steps))
    poisons = round(attack.poison_rate * images)
    timed("poisoning", "poisoned image", poisons, lambda: poison_with(attack, trigger, train, seed=0))
    recipe, unlabeled = spec.pretraining, train.without_labels()
    trained = images // recipe.batch_size * recipe.batch_size
    train_once = partial(pretrain, unlabeled, recipe, seed=0, observations=0)
    encoder = timed("pretraining", "1,000 images and epoch", trained / 1000, train_once).encoder
    bank = timed(
        "feature extraction", "1,000 images", images / 1000, partial(extract, encoder, train.images, train.labels)
    )
    queries = extract(encoder, test.images, test.labels)
    fit = partial(LinearProbe().fit, bank.vectors, bank.labels, CLASSES)
    timed("linear probe", "1,000 training features", images / 1000, fit)
    vote = partial(knn_predict, bank.vectors, bank.labels, queries.vectors, num_classes=CLASSES)
    timed("kNN", f"1,000 queries of {images:,} features", len(test) / 1000, vote)
    return found
