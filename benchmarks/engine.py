"""Speed of the pretraining engine against lightly, as ratios of interleaved runs. To run: make bench-engine

Needs CIFAR-10 (BLTO_DATA) and a quiet machine: a turn during which other processes used more than a quarter of a core
does not count, and fewer than three undisturbed rounds give no verdict. Writes benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn
from torch import nn

from benchmarks import peers, timing
from blto.attacks.bilevel import OUTER_STEPS_PER_ESTIMATE, BilevelOptimisation
from blto.attacks.bilevel_spec import BilevelSpec
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.data import load
from blto.data.images import ImageSet
from blto.evaluation import extract
from blto.evaluation.probes import knn_predict
from blto.files import write_json
from blto.files.yaml import load_yaml
from blto.models.encoder import build_encoder
from blto.models.native.library import find_kernels
from blto.runtime.device import processor_name

RESULT = Path(__file__).parent / "results" / "engine.json"
CONFIGS = Path(__file__).parents[1] / "configs"


def training(images: ImageSet, width: int, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """End to end, SimCLR on ResNet-18: ours, lightly as it ships, and lightly's model in bf16 on our data path."""
    candidates = {
        "ours": peers.ours(images, width, batch_size, 4 * steps),
        "lightly": peers.lightly_as_shipped(images, width, batch_size, steps),
        "lightly's model in bf16 on our data": peers.lightly_on_our_data(images, width, batch_size, 2 * steps),
    }
    turns = timing.interleave(candidates, rounds=rounds)
    return summary(f"ResNet-18 width {width}, batch {batch_size}", turns)


def training_with_workers(images: ImageSet, width: int, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """The same with two loader processes for lightly, which it may keep."""
    candidates = {
        "ours": peers.ours(images, width, batch_size, 4 * steps),
        "lightly with 2 workers": peers.lightly_as_shipped(images, width, batch_size, steps, workers=2),
    }
    turns = timing.interleave(candidates, rounds=rounds, pause=3)
    return summary(f"ResNet-18 width {width}, batch {batch_size}", turns)


def views(images: ImageSet, threads: int, rounds: int) -> dict[str, Any]:
    """Augmentation alone in one process; lightly's transform is PIL, which knows one thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    turns = timing.interleave(peers.augmentation(images, 256), rounds=rounds)
    torch.set_num_threads(before)
    return summary(f"augmentation alone, one process, threads: {threads}", turns)


def bilevel(images: ImageSet, config: str, rounds: int) -> dict[str, Any]:
    """What a BLTO round costs (inner and outer step of a recipe, batches of one size), in inner steps alone."""
    recipe = load_yaml(CONFIGS / config)["attack"]
    generator = recipe["generator"]
    batch_size = recipe["bilevel"]["surrogate"]["batch_size"]
    alternating = {"rounds": 10**6, "reinitialise_every": 10**6, "inner_steps": 1, "outer_steps": 1}
    spec = BilevelSpec.model_validate({**recipe["bilevel"], **alternating, "outer_batch_size": batch_size})

    def new_run() -> BilevelOptimisation:
        trigger = fresh_generator_trigger(generator, 8 / 255, "residual", seed=0)
        attack = {"target_class": recipe["target_class"], "poison_rate": recipe["poison_rate"]}
        return BilevelOptimisation(trigger, images, spec, **attack, seed=0)

    alternation, surrogate = new_run(), new_run()

    def both() -> int:
        for _ in range(2 * OUTER_STEPS_PER_ESTIMATE):  # so that each turn has its share of estimates
            alternation.step()
        return OUTER_STEPS_PER_ESTIMATE

    def inner() -> int:
        for _ in range(OUTER_STEPS_PER_ESTIMATE):
            surrogate.inner_step()
        return OUTER_STEPS_PER_ESTIMATE

    turns = timing.interleave({"ours": inner, "BLTO round": both}, rounds=rounds)
    return summary(f"step of the surrogate alone (a second; {config}, generator {generator['name']})", turns)


def features_and_knn(train: ImageSet, test: ImageSet, rounds: int) -> dict[str, Any]:
    """Features of 60,000 images and a kNN vote on 10,000, fp32 both, the same small encoder."""
    encoder = build_encoder({"name": "small_resnet", "width": 32}, seed=0).eval()
    assert train.labels is not None
    labels = torch.from_numpy(train.labels)

    def own() -> int:
        bank, queries = extract(encoder, train.images), extract(encoder, test.images)
        knn_predict(bank.vectors, labels, queries.vectors, num_classes=10)
        return len(train) + len(test)

    @torch.no_grad()
    def lightly() -> int:
        def vectors(images: ImageSet) -> torch.Tensor:
            parts = [torch.from_numpy(images.images[i : i + 512]).float() / 255 for i in range(0, len(images), 512)]
            return torch.cat([nn.functional.normalize(encoder(part), dim=1) for part in parts])

        bank = vectors(train).t().contiguous()
        for queries in vectors(test).split(512):
            lightly_knn(queries, bank, labels, 10, 200, 0.1)
        return len(train) + len(test)

    return summary(
        "features and kNN over 60,000 images, fp32", timing.interleave({"ours": own, "lightly": lightly}, rounds=rounds)
    )


def summary(title: str, turns: dict[str, list[timing.Turn]]) -> dict[str, Any]:
    """Rates, the ratio of ours to each other candidate, and every turn."""
    others = [name for name in turns if name != "ours"]
    return {
        "title": title,
        "rates": {name: timing.rate(of_name) for name, of_name in turns.items()},
        "ratios": [timing.compare(turns, "ours", other) for other in others],
        "turns": timing.rows(turns),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    started = time.monotonic()
    train, test = (load("cifar10", data_root=None, split=split) for split in ("train", "test"))
    words = find_kernels()[1]
    found: dict[str, Any] = {
        "machine": {"processor": processor_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "engine": words,
        "matmul_gflops_before": timing.matmul_rates(),
    }
    parts = []
    for measure in (
        lambda: training(train, 64, 64, 3, given.rounds),
        lambda: training_with_workers(train, 64, 64, 8, 3),
        lambda: training(train, 16, 256, 3, given.rounds),
        lambda: training_with_workers(train, 16, 256, 10, 3),
        lambda: views(train, 1, given.rounds),
        lambda: views(train, 2, given.rounds),
        lambda: bilevel(train, "cifar10-blto.yaml", given.rounds),
        lambda: bilevel(train, "cifar10-cpu.yaml", given.rounds),
        lambda: features_and_knn(train, test, given.rounds),
    ):
        part = measure()
        parts.append(part)
        for ratio in part["ratios"]:
            shown = (
                f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if "ratio" in ratio else "no verdict"
            )
            sys.stdout.write(f"{part['title']}: ours / {ratio['other']} = {shown} ({ratio['clean_rounds']} rounds)\n")
            sys.stdout.flush()
    found |= {"parts": parts, "matmul_gflops_after": timing.matmul_rates(), "seconds": time.monotonic() - started}
    write_json(given.out, found)


if __name__ == "__main__":
    main()
