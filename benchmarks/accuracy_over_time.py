"""kNN accuracy on CIFAR-10 against minutes of training. To run: make bench-accuracy

Ours is the recipe of configs/cifar10-30min.yaml, chosen by benchmarks/recipe_search.py on held-out training images. The
other is lightly's own CIFAR-10 benchmark model on the same machine, its schedule fitted to the time it gets. Both leave
snapshots, and the test set is read once, when a training is over. Needs CIFAR-10 (BLTO_DATA) and a quiet machine, about
70 minutes. A finished contender is kept in benchmarks/results/accuracy_over_time.json; a call that was cut off goes on
with the other.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Tensor, nn

from benchmarks import peers, timing
from blto.analysis.save import save_figure
from blto.analysis.style import TARGET, TWIN, legend_below, new_figure, styled
from blto.configuration import read_spec
from blto.data import load
from blto.data.images import ImageSet
from blto.evaluation import extract
from blto.evaluation.probes import knn_predict
from blto.files import read_json, write_json
from blto.models.encoder import Encoder
from blto.models.native.library import find_kernels
from blto.pretraining.loop import pretrain
from blto.pretraining.trainer import learning_rate_factor
from blto.runtime.device import keep_freed_memory, processor_name

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "cifar10-30min.yaml"
RESULT = Path(__file__).parent / "results" / "accuracy_over_time.json"
FIGURE = ROOT / "docs" / "figures" / "accuracy_over_time"
SNAPSHOTS = {"ours": 12, "lightly": 3}
"""Lightly's net takes minutes to judge."""
SEED = 0


class Snapshots:
    """Copies of a network as it trains, each with the seconds of training that it took; taking one stops the clock."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, nn.Module]] = []
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return time.monotonic() - self._started

    def take(self, network: nn.Module) -> None:
        """Keep a copy."""
        seconds = self.seconds
        self.taken.append((seconds, copy.deepcopy(network).eval()))
        self._started = time.monotonic() - seconds
        sys.stdout.write(f"  {seconds / 60:.1f} min\n")
        sys.stdout.flush()

    def __call__(self, encoder: Encoder, epoch: int) -> Mapping[str, float]:
        """As an observer of `pretrain`."""
        self.take(encoder)
        return {}


def train_ours(images: ImageSet) -> Snapshots:
    """The recipe as it stands in the configuration."""
    spec, snapshots = read_spec(RECIPE, [], None).pretraining, Snapshots()
    pretrain(images.without_labels(), spec, seed=SEED, observers=[snapshots], observations=SNAPSHOTS["ours"])
    return snapshots


def train_lightly(images: ImageSet, minutes: float) -> Snapshots:
    """Lightly's CIFAR-10 benchmark model: ResNet-18, its transform, SGD with 0.06 at a batch of 128, fp32.

    Its cosine is fitted to the time there is, which is kinder than the first minutes of 200 epochs.
    """
    torch.manual_seed(SEED)
    step, data, snapshots = peers.LightlyStep(64, bf16=False), peers.loader(images, 128, 0), Snapshots()
    limit, [group] = round(60 * minutes), step.optimizer.param_groups
    peak = group["lr"]
    due = [limit * (number + 1) / SNAPSHOTS["lightly"] for number in range(SNAPSHOTS["lightly"] - 1)]
    while (seconds := snapshots.seconds) < limit:
        if due and seconds >= due[0]:
            due.pop(0)
            snapshots.take(Normalised(step.backbone))
        group["lr"] = peak * learning_rate_factor(round(seconds), total_steps=limit, warmup_steps=0)
        step(next(data))
    snapshots.take(Normalised(step.backbone))
    return snapshots


class Normalised(nn.Module):
    """Lightly's backbone on images in [0, 1]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(IMAGENET_NORMALIZE[name]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D)."""
        out: Tensor = self.backbone((images - self.mean) / self.std).flatten(start_dim=1)
        return out


def accuracy(network: nn.Module, train: ImageSet, test: ImageSet, *, bf16: bool) -> float:
    """Percent of the test images that a vote of 200 neighbours among all training images gets right."""
    bank, queries = (extract(network, images.images, images.labels, bf16=bf16) for images in (train, test))
    assert bank.labels is not None
    found = knn_predict(bank.vectors, bank.labels, queries.vectors, num_classes=10)
    return 100 * float(np.mean(found == test.labels))


@styled
def figure(contenders: Mapping[str, list[dict[str, float]]]) -> Any:
    """Accuracy against minutes, a line a contender."""
    drawing, [axes] = new_figure(3.3)
    for (name, curve), (color, marker) in zip(contenders.items(), ((TARGET, "o"), (TWIN, "s")), strict=True):
        minutes, percent = ([point[key] for point in curve] for key in ("minutes", "knn_accuracy"))
        axes.plot(minutes, percent, color=color, marker=marker, label=name)
    axes.set(xlabel="Minutes of training on two CPU cores", ylabel="kNN accuracy on CIFAR-10 test (%)", ylim=(0, 100))
    legend_below(drawing, axes)
    return drawing


def main() -> None:
    """Train what is missing, then judge, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lightly-minutes", type=float, default=30.0, help="how long lightly's model trains")
    minutes = parser.parse_args().lightly_minutes
    keep_freed_memory()
    train, test = (load("cifar10", data_root=None, split=split) for split in ("train", "test"))
    found: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {"contenders": {}}
    contenders = {  # with bf16 for features where it takes minutes otherwise
        "blto, 30-minute recipe": (train_ours, False),
        "lightly's CIFAR-10 benchmark model": (partial(train_lightly, minutes=minutes), True),
    }
    for name, (contender, bf16) in contenders.items():
        if name in found["contenders"]:
            continue
        sys.stdout.write(f"{name}\n")
        before = timing.matmul_rates()
        busy, own = timing.cpu_seconds()
        taken = contender(train).taken
        busy_after, own_after = timing.cpu_seconds()
        found["contenders"][name] = {
            "curve": [
                {"minutes": seconds / 60, "knn_accuracy": accuracy(network, train, test, bf16=bf16)}
                for seconds, network in taken
            ],
            "foreign_core_seconds": busy_after - busy - (own_after - own),
            "matmul_gflops_before": before,
            "matmul_gflops_after": timing.matmul_rates(),
            "processor": processor_name("cpu"),
            "threads": torch.get_num_threads(),
            "engine": find_kernels()[1],
            "seed": SEED,
        }
        write_json(RESULT, found)
    curves = {name: found["contenders"][name]["curve"] for name in contenders}
    for name, curve in curves.items():
        last = curve[-1]
        sys.stdout.write(f"{name}: kNN {last['knn_accuracy']:.2f}% after {last['minutes']:.1f} minutes\n")
    points = [(name, point["minutes"], point["knn_accuracy"]) for name, curve in curves.items() for point in curve]
    FIGURE.parent.mkdir(exist_ok=True)
    columns = dict(zip(("contender", "minutes", "knn_accuracy"), zip(*points, strict=True), strict=True))
    save_figure(figure(curves), FIGURE, columns)


if __name__ == "__main__":
    main()
