"""Does the fast engine learn as much as the reference? To run: make bench-learning

Six paired seeds of a small net on CIFAR-10 (10,000 images, SimCLR), the fast engine against plain torch in fp32: the
90% interval of the paired difference in kNN accuracy on 5,000 held-out training images has to lie within 2 points of 0.
Then 200 steps of ResNet-18 at width 64, whose two loss curves are kept. Needs CIFAR-10 (BLTO_DATA). Each finished
training is kept in benchmarks/results/equal_learning.json; a call that was cut off goes on there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.peers import OurData
from blto.data import load
from blto.data.images import ImageSet
from blto.evaluation import extract
from blto.evaluation.probes import knn_predict
from blto.files import read_json, write_json
from blto.models.native.library import find_kernels
from blto.pretraining.loop import build_method, pretrain
from blto.pretraining.spec import Engine, PretrainingSpec
from blto.pretraining.trainer import Trainer
from blto.runtime.device import processor_name

LIMIT = 2.0
"""Points of kNN accuracy that the interval has to stay within."""
RESULT = Path(__file__).parent / "results" / "equal_learning.json"
SEEDS = range(100, 106)
ENGINES: tuple[Engine, Engine] = ("fast", "reference")
RECIPE: dict[str, Any] = {
    "method": {"name": "simclr", "temperature": 0.2},
    "backbone": {"name": "small_resnet", "width": 32},
    "views": "simsiam_cifar",
    "batch_size": 128,
    "epochs": 10,
    "warmup_epochs": 1,
    "optimizer": {"lr": 0.12},
}


def split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """10,000 images to train on and 5,000 others to judge by, both from the training set."""
    order = np.random.default_rng(0).permutation(len(images))
    return images.subset(np.sort(order[:10_000])), images.subset(np.sort(order[10_000:15_000]))


def knn_accuracy(seed: int, engine: Engine, train: ImageSet, held_out: ImageSet) -> dict[str, float]:
    """Train once; percent of held-out images that kNN gets right, and the seconds it took."""
    started = time.monotonic()
    spec = PretrainingSpec.model_validate(RECIPE | {"engine": engine})
    encoder = pretrain(train.without_labels(), spec, seed=seed, observations=0).encoder
    seconds = time.monotonic() - started
    bank, queries = (extract(encoder, images.images, images.labels) for images in (train, held_out))
    assert bank.labels is not None
    found = knn_predict(bank.vectors, bank.labels, queries.vectors, num_classes=10)
    return {"knn_accuracy": 100 * float((found == held_out.labels).mean()), "seconds": seconds}


def losses(engine: Engine, images: ImageSet) -> list[float]:
    """200 steps of SimCLR on ResNet-18, width 64, batch 32."""
    spec = PretrainingSpec.model_validate({"method": "simclr", "backbone": "resnet18", "batch_size": 32})
    method = build_method(spec, seed=0, image_size=32)
    trainer = Trainer(method, optimizer=spec.optimizer, total_steps=200, warmup_steps=20, engine=engine)
    data = OurData(images, 32)
    return [float(trainer.train_step(next(data))["loss"]) for _ in range(200)]


def paired_interval(differences: list[float]) -> dict[str, float]:
    """Mean and 90% Student-t interval."""
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1) / len(differences) ** 0.5)
    reach = float(stats.t.ppf(0.95, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": len(differences)}


def main() -> None:
    """Train what is missing, print and write."""
    images = load("cifar10", data_root=None, split="train")
    train, held_out = split(images)
    conditions = {"recipe": RECIPE, "engine": find_kernels()[1], "processor": processor_name("cpu")}
    found: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {**conditions, "runs": {}, "losses": {}}
    if {key: found[key] for key in conditions} != conditions:
        sys.exit(f"{RESULT} was begun with another recipe, engine or processor; remove it to start again.")
    for seed in SEEDS:
        for engine in ENGINES:
            key = f"{engine}/{seed}"
            if key not in found["runs"]:
                found["runs"][key] = knn_accuracy(seed, engine, train, held_out)
                write_json(RESULT, found)
            sys.stdout.write(f"{key}: kNN {found['runs'][key]['knn_accuracy']:.2f}%\n")
            sys.stdout.flush()
    accuracy = {key: run["knn_accuracy"] for key, run in found["runs"].items()}
    found["difference"] = paired_interval([accuracy[f"fast/{seed}"] - accuracy[f"reference/{seed}"] for seed in SEEDS])
    for engine in ENGINES:
        found["losses"].setdefault(engine, None)
        if found["losses"][engine] is None:
            found["losses"][engine] = losses(engine, images)
            write_json(RESULT, found)
    found["equal"] = found["difference"]["low"] >= -LIMIT and found["difference"]["high"] <= LIMIT
    write_json(RESULT, found)
    sys.stdout.write("fast - reference: {mean:+.2f} points [{low:+.2f}, {high:+.2f}]\n".format(**found["difference"]))
    curves = torch.tensor([found["losses"][engine] for engine in ENGINES])
    sys.stdout.write(f"within {LIMIT:g} points: {found['equal']}\n")
    sys.stdout.write(f"largest gap of the two loss curves: {float((curves[0] - curves[1]).abs().max()):.3f}\n")


if __name__ == "__main__":
    main()
