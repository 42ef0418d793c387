"""Which small net and schedule learns most in a given time? To run: python -m benchmarks.recipe_search [NAME ...]

Each candidate of benchmarks/recipes.yaml trains SimCLR on 45,000 CIFAR-10 training images for as many epochs as fit the
budget on one core (its speed is measured first), and kNN judges it on the 5,000 others; the test set is never read.
Needs CIFAR-10 (BLTO_DATA). Each finished training is kept in benchmarks/results/recipe_search.jsonl, so a call that was
cut off goes on there, and two calls, each pinned to a core of its own, share the work if given different names.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from blto.data import load
from blto.data.images import ImageSet, hold_out
from blto.data.views import Views
from blto.evaluation import extract
from blto.evaluation.probes import knn_predict
from blto.files import append_jsonl, read_jsonl
from blto.pretraining.loop import build_method, pretrain
from blto.pretraining.spec import PretrainingSpec
from blto.pretraining.trainer import Trainer
from blto.runtime.device import keep_freed_memory

CANDIDATES = Path(__file__).parent / "recipes.yaml"
RESULT = Path(__file__).parent / "results" / "recipe_search.jsonl"
HELD_OUT = 5_000
SEED = 100


def images_per_second(images: ImageSet, spec: PretrainingSpec, *, steps: int = 24) -> float:
    """The speed of a training step with its augmentation, after a warm-up of a third of the steps."""
    trainer = Trainer(
        build_method(spec, seed=0, image_size=32), optimizer=spec.optimizer, total_steps=steps, engine=spec.engine
    )
    views, seconds = Views(spec.views, 32), []
    for step in range(steps):
        started = time.process_time()
        rows = np.arange(step * spec.batch_size, (step + 1) * spec.batch_size) % len(images)
        drawn = (views.draw(seed=0, epoch=0, samples=rows, view=view) for view in (0, 1))
        trainer.train_step([views.fast(images.images, rows, parameters) for parameters in drawn])
        seconds.append(time.process_time() - started)
    return spec.batch_size / float(np.median(seconds[steps // 3 :]))


def train_and_judge(overrides: dict[str, Any], core_minutes: float, images: ImageSet) -> dict[str, Any]:
    """One candidate: what it was, how long it took, and the percent of held-out images that kNN gets right."""
    train, held_out = hold_out(images, HELD_OUT)
    spec = PretrainingSpec.model_validate(overrides)
    speed = images_per_second(train, spec)
    epochs = max(1, round(core_minutes * 60 * speed / len(train)))
    spec = spec.model_copy(update={"epochs": epochs})
    started = time.process_time()
    encoder = pretrain(train.without_labels(), spec, seed=SEED, observations=0).encoder
    seconds = time.process_time() - started
    bank, queries = (extract(encoder, part.images, part.labels) for part in (train, held_out))
    assert bank.labels is not None
    found = knn_predict(bank.vectors, bank.labels, queries.vectors, num_classes=10)
    return {
        "epochs": epochs,
        "core_seconds": seconds,
        "images_per_core_second": epochs * len(train) / seconds,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "knn_accuracy": 100 * float((found == held_out.labels).mean()),
    }


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; where both have a mapping these are merged, everything else is replaced."""
    shared = {key: (base[key], changes[key]) for key in base.keys() & changes}
    both = {key: merged(*pair) for key, pair in shared.items() if all(isinstance(value, dict) for value in pair)}
    return {**base, **changes, **both}


def main() -> None:
    """Train what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="candidates of recipes.yaml; all of them where none is given")
    names = parser.parse_args().names
    given = yaml.safe_load(CANDIDATES.read_text())
    if unknown := set(names) - set(given["candidates"]):
        sys.exit(f"no candidate {sorted(unknown)}; {CANDIDATES.name} has {sorted(given['candidates'])}.")
    keep_freed_memory()
    torch.set_num_threads(1)
    images = load("cifar10", data_root=None, split="train")
    for name in names or given["candidates"]:
        changes = dict(given["candidates"][name])
        minutes = changes.pop("core_minutes", given["core_minutes"])
        inputs = {"name": name, "core_minutes": minutes, "recipe": merged(given["base"], changes)}
        done = read_jsonl(RESULT) if RESULT.exists() else []
        if any(inputs.items() <= line.items() for line in done):
            continue
        run = train_and_judge(inputs["recipe"], minutes, images)
        append_jsonl(RESULT, inputs | run)
        sys.stdout.write(
            f"{name}: kNN {run['knn_accuracy']:.2f}% in {run['epochs']} epochs, {run['core_seconds'] / 60:.1f} min\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
