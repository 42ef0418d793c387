"""The bank of small encoders that defenses are judged on: its encoders, their triggers, and what they are worth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blto.attacks import ATTACKS
from blto.attacks.base import Attack, Surroundings, poison_with
from blto.data import load
from blto.data.images import ImageSet
from blto.errors import InputRefused
from blto.evaluation import PROBES, aggregate, evaluate_backdoor
from blto.experiment import ExperimentSpec
from blto.experiment.outcome import ENCODER, TRIGGER
from blto.experiment.stages import pretraining_inputs
from blto.files import read_jsonl
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder
from blto.poisoning import PoisonedDataset, Trigger, apply_to_uint8, load_trigger
from blto.records import RunRecord, RunStore, load_record
from blto.report.wording import with_interval
from blto.runtime.seeds import numpy_generator

RESULTS = Path(__file__).parent / "results"
PARTS = ("bank_clean", "bank_poisoned", "bank_fresh")
CLEAN = "clean"
METRICS = ("clean_accuracy", "asr", "asr_clean_twin", "untriggered_rate", "lift", "clean_accuracy_clean_twin")
PROBE_IMAGES = 10_000
COLUMNS = ("ASR (linear)", "Lift", "ASR (kNN)", "Lift", "Accuracy (linear)", "Clean twin's")
Found = dict[str, dict[str, float | None]]
"""Probe -> metric -> value."""
Rows = Sequence[dict[str, Any]]


def arguments(doc: str | None, seeds: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """What a benchmark on the bank takes: where data and records lie, and, if it has any, the seeds."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    return parser


def cifar10(data_root: Path | None) -> tuple[ImageSet, ImageSet]:
    """Training and test part."""
    return load("cifar10", data_root=data_root, split="train"), load("cifar10", data_root=data_root, split="test")


def recorded(file: Path) -> list[dict[str, Any]]:
    """What a benchmark has measured."""
    return read_jsonl(file) if file.exists() else []


def table_of(file: Path, table: Callable[[Rows], str]) -> str:
    """The table of what a benchmark, after which its file is named, has measured."""
    rows = recorded(file)
    return table(rows) if rows else f"Not measured yet: `python -m benchmarks.{file.stem}`."


class Banked(NamedTuple):
    """An encoder of the bank: which attack made it ("clean": none), from which seed, and its file."""

    group: str
    seed: int
    file: Path

    @property
    def record(self) -> RunRecord:
        """Of the run that made it."""
        return load_record(self.file.parent / "record.json")

    @property
    def attack(self) -> Attack:
        """That made it."""
        return ATTACKS.build(self.record.spec["attack"])


class Bench(NamedTuple):
    """What all encoders are judged on: labeled images that the probes are fitted on, and test images."""

    probe: ImageSet
    test: ImageSet

    @classmethod
    def of(cls, train: ImageSet, test: ImageSet) -> Bench:
        """With as many of the training images as a probe needs, the same for all."""
        draw = numpy_generator(0, "probe", "repairs").choice(len(train), min(PROBE_IMAGES, len(train)), replace=False)
        return cls(train.subset(np.sort(draw)), test)


class Triggered(NamedTuple):
    """The test images with a trigger, uint8 (N, 3, S, S), and the class to which it is to send them."""

    images: npt.NDArray[np.uint8]
    target_class: int


class Victim(NamedTuple):
    """A backdoored encoder, the hash of its file, and the test images with its trigger."""

    banked: Banked
    digest: str
    triggered: Triggered


def bank(results: Path, parts: Sequence[str] = PARTS) -> Iterator[Banked]:
    """The encoders that are committed beside their records."""
    for part in parts:
        for record in RunStore(results / part).list():
            folder = next(iter((results / part).glob(f"*-s{record.spec['seed']}-{record.run_id[-10:]}")), None)
            if folder is not None and (folder / ENCODER).exists():
                yield Banked(folder.name.split("-s")[0], int(record.spec["seed"]), folder / ENCODER)


def attacked(results: Path, seeds: Sequence[int], parts: Sequence[str] = PARTS) -> Iterator[Banked]:
    """Those that an attack has made, of some seeds, with their trigger; says which are left out for want of it."""
    for banked in bank(results, parts):
        if banked.group != CLEAN and banked.seed in seeds:
            if has_trigger(banked):
                yield banked
            else:
                sys.stdout.write(f"left out: {banked.file.parent.name}, whose trigger was not kept\n")


def has_trigger(banked: Banked) -> bool:
    """Whether its trigger is beside it, or of a kind that nothing has to learn."""
    attack = banked.record.spec["attack"]
    return (banked.file.parent / TRIGGER).exists() or "bilevel" not in attack


def trigger_of(banked: Banked, images: ImageSet) -> Trigger:
    """The trigger that lies beside an encoder, or the same made again.

    Args:
        banked: the encoder.
        images: such as it was trained on, unpoisoned.

    Raises:
        InputRefused: it is not there and would have to be learned, or it is another one than the run's.
    """
    record, file = banked.record, banked.file.parent / TRIGGER
    if not has_trigger(banked):
        raise InputRefused(f"{file}: no such trigger, and it would have to be learned; export the run again.")
    if file.exists():
        trigger = load_trigger(file)
    else:
        trigger = banked.attack.train_trigger(images, seed=banked.seed, surroundings=Surroundings("cpu")).trigger
    if trigger.identity != record.provenance["poison"]["trigger_sha256"]:
        raise InputRefused(f"{file}: not the trigger of {banked.file.parent.name}; export the run again.")
    return trigger


def twin_of(banked: Banked) -> Encoder:
    """The clean twin of a backdoored encoder, as the export has it."""
    twin = banked.record.provenance["stages"]["clean_twin"]
    return load_encoder(banked.file.parent.parent / "clean_twins" / f"{twin}.safetensors")


def poisoned_set(banked: Banked, train: ImageSet) -> PoisonedDataset:
    """What a victim was trained on. Raises InputRefused as `trigger_of`, or where it comes out as another set."""
    poisoned = poison_with(banked.attack, trigger_of(banked, train), train, seed=banked.seed)
    spec, record = ExperimentSpec.parse(dict(banked.record.spec)), banked.record
    made = RunStore.stage_name("pretrain", pretraining_inputs(spec, poisoned.training_images()))
    if made != record.provenance.get("stages", {"victim": made})["victim"]:  # old records do not say
        raise InputRefused(f"{banked.file.parent.name}: {train.name} is not what its victim was trained on.")
    return poisoned


def victim(banked: Banked, digest: str, bench: Bench) -> Victim:
    """One of the bank's, with triggered test images. Raises InputRefused as `trigger_of`."""
    images = apply_to_uint8(trigger_of(banked, bench.probe).at_test(), bench.test.images)
    return Victim(banked, digest, Triggered(images, banked.record.spec["attack"]["target_class"]))


def judge(encoder: Encoder, twin: Encoder, triggered: Triggered, bench: Bench) -> Found:
    """Both probes' metrics of an encoder beside a twin, as a run's record has them."""
    found = evaluate_backdoor(
        encoder,
        twin,
        train=bench.probe,
        test=bench.test,
        triggered=triggered.images,
        target_class=triggered.target_class,
        probes={probe: {} for probe in PROBES},
    )
    return {probe: {name: metrics[name].value for name in METRICS} for probe, metrics in found.metrics.items()}


def columns(found: Sequence[Found]) -> list[str]:
    """Means over encoders, lifts with their interval: a table's `COLUMNS`."""

    def mean(probe: str, metric: str) -> str:
        shown = with_interval(aggregate([of[probe][metric] for of in found]))
        return shown.replace("%", "", 1) if metric == "lift" else shown.split(" [")[0]

    values = [mean(probe, metric) for probe in PROBES for metric in ("asr", "lift")]
    return values + [mean("linear", metric) for metric in ("clean_accuracy", "clean_accuracy_clean_twin")]
