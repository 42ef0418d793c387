"""What does each lever of BLTO's outer problem do? To run: python -m benchmarks.levers LEARN_ON [JUDGE_ON ...]

For each entry of benchmarks/levers.yaml a trigger is learned on one frozen encoder, the first file, and judged on it
and on the others, by 2,000 of 5,000 held-out CIFAR-10 training images (BLTO_DATA); a minute or two each on one core.
What is finished is kept in benchmarks/results/levers.jsonl, so a call that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.recipe_search import HELD_OUT, SEED, merged
from blto.attacks.bilevel import OUTER_STEPS_PER_ESTIMATE, BilevelOptimisation
from blto.attacks.bilevel_spec import BilevelSpec
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.data import load
from blto.data.images import ImageSet, hold_out
from blto.data.views import RECIPES, Views
from blto.evaluation import fit_probe
from blto.evaluation.doctor import rates, view_features
from blto.evaluation.features import extract
from blto.files import append_jsonl, read_jsonl, sha256_file
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder
from blto.poisoning import Trigger, apply_to_uint8
from blto.pretraining.trainer import learning_rate_factor
from blto.runtime.device import keep_freed_memory

LEVERS = Path(__file__).parent / "levers.yaml"
RESULT = Path(__file__).parent / "results" / "levers.jsonl"
TARGET_CLASS, EPSILON = 9, 8 / 255
MEASURED, BANK, VIEWS = 2_000, 10_000, "simsiam_cifar"


def learned(lever: dict[str, Any], encoder: Encoder, images: ImageSet) -> tuple[Trigger, dict[str, float]]:
    """A trigger after its steps on a frozen encoder, and the mean similarities of the last hundred."""
    spec = BilevelSpec.model_validate(lever["bilevel"])
    trigger = fresh_generator_trigger(lever["generator"], EPSILON, "residual", seed=SEED)
    run = BilevelOptimisation(
        trigger, images, spec, target_class=TARGET_CLASS, poison_rate=0.01, seed=SEED, frozen=True
    )
    run.surrogate.method.encoder.load_state_dict(encoder.state_dict())
    steps, found = lever["steps"], []
    for number in range(steps):
        if number % OUTER_STEPS_PER_ESTIMATE == 0:
            run.estimate(number)
        factor = learning_rate_factor(number, total_steps=steps, warmup_steps=steps // 6)
        found.append(run.outer_step(number, spec.outer_lr * factor))
    names = ("triggered", "clean", "target")
    last = {name: float(np.mean([float(getattr(each, name)) for each in found[-100:]])) for name in names}
    return trigger.eval(), {name: round(value, 3) for name, value in last.items()}


class Judge:
    """One encoder with its probes, and what triggered images do there, whole and in a view of the victim's."""

    def __init__(self, encoder: Encoder, bank: ImageSet, measured: ImageSet) -> None:
        self.encoder, self.measured, self.views = encoder, measured, Views(RECIPES[VIEWS], measured.image_size)
        known = extract(encoder, bank.images, bank.labels)
        self.probes = {name: fit_probe(name, known, bank.num_classes) for name in ("linear", "knn")}
        self.clean = extract(encoder, measured.images, measured.labels)

    def __call__(self, triggered: Any) -> dict[str, float]:
        """Percent of the images of other classes that go to the target class."""
        changed = extract(self.encoder, triggered, self.measured.labels)
        found: dict[str, Any] = {
            name: rates(predict, self.clean, changed, TARGET_CLASS, self.measured.num_classes)["asr"].value
            for name, predict in self.probes.items()
        }
        seen = view_features(self.encoder, triggered[self.measured.labels != TARGET_CLASS], self.views)
        found |= {f"{name}, views": float((p(seen) == TARGET_CLASS).mean()) for name, p in self.probes.items()}
        return {name: round(100 * float(value), 1) for name, value in found.items()}


def main(files: Sequence[str]) -> None:
    """Try what is missing, print and write."""
    keep_freed_memory()
    torch.set_num_threads(1)
    given = yaml.safe_load(LEVERS.read_text())
    train, held_out = hold_out(load("cifar10", data_root=None, split="train"), HELD_OUT)
    bank, measured = train.subset(np.arange(BANK)), held_out.subset(np.arange(MEASURED))
    encoders = {sha256_file(Path(file))[:12]: load_encoder(Path(file)) for file in files}
    judges = {name: Judge(encoder, bank, measured) for name, encoder in encoders.items()}
    first = next(iter(encoders.values()))
    for name, changes in given["levers"].items():
        inputs = {"name": name, "lever": merged(given["base"], changes), "encoders": list(encoders)}
        done = read_jsonl(RESULT) if RESULT.exists() else []
        if any(inputs.items() <= line.items() for line in done):
            continue
        started = time.process_time()
        trigger, similarities = learned(inputs["lever"], first, train)
        seconds = time.process_time() - started
        triggered = apply_to_uint8(trigger, measured.images)
        asr = {encoder: judge(triggered) for encoder, judge in judges.items()}
        append_jsonl(RESULT, inputs | {"core_seconds": round(seconds, 1), "similarity": similarities, "asr": asr})
        sys.stdout.write(f"{name}: {seconds:.0f} s, {asr}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", help="encoders, the one to learn on first")
    main(parser.parse_args().files)
