"""How far does an ASR depend on the images of its probe? To run: python -m benchmarks.probe_draws STORE RUN ...

For each run of a store, its victim and its clean twin are judged by probes fitted on several random draws of training
images; the intervals in every table are over test images and say nothing of this. A minute or two a run, which needs
its data (BLTO_DATA). What is finished is kept in benchmarks/results/probe_draws.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blto.evaluation import Features, extract, fit_probe
from blto.evaluation.doctor import rates
from blto.experiment import Environment, ExperimentSpec, load_data
from blto.experiment.outcome import ENCODER, TRIGGER
from blto.files import append_jsonl, read_jsonl
from blto.models.checkpoints import load_encoder
from blto.poisoning import apply_to_uint8, load_trigger
from blto.records import RunRecord, RunStore
from blto.runtime.seeds import numpy_generator

RESULT = Path(__file__).parent / "results" / "probe_draws.jsonl"
DRAWS = {10_000: 3, 20_000: 3}
"""Images of a draw -> how many draws; and once all of them."""


def draws(
    bank: Features, clean: Features, changed: Features, probes: Mapping[str, Mapping[str, Any]], target_class: int
) -> dict[str, dict[str, list[float]]]:
    """Probe -> number of images -> percent of the triggered images of other classes, a number a draw.

    Args:
        bank: of all images that a probe may be fitted on.
        clean, changed: of the test images without and with the trigger.
        probes: name -> options.
        target_class: the attack's.
    """
    assert bank.labels is not None  # the runs of a store have classes
    classes = int(bank.labels.max()) + 1
    found: dict[str, dict[str, list[float]]] = {}
    for size, number in {**{size: n for size, n in DRAWS.items() if size < len(bank)}, len(bank): 1}.items():
        for draw in range(number):
            order = numpy_generator(draw, "select", "draw", str(size)).permutation(len(bank))
            rows = torch.from_numpy(order[:size].copy())
            part = Features(bank.vectors[rows], bank.labels[rows], rows)
            for probe, options in probes.items():
                asr = rates(fit_probe(probe, part, classes, **options), clean, changed, target_class, classes)["asr"]
                assert asr.value is not None  # there are images of other classes
                found.setdefault(probe, {}).setdefault(str(size), []).append(round(100 * asr.value, 1))
    return found


def measured(record: RunRecord, store: RunStore) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Encoder -> what `draws` says of it."""
    spec = ExperimentSpec.parse(record.spec)
    data = load_data(spec, Environment(store))
    trigger = load_trigger(store.folder(record.run_id) / TRIGGER)
    triggered = apply_to_uint8(trigger.at_test(), data.test.images)
    encoders = {
        "victim": store.folder(record.run_id) / ENCODER,
        "clean twin": store.root / "stages" / record.provenance["stages"]["clean_twin"] / ENCODER,
    }
    found = {}
    for name, file in encoders.items():
        encoder = load_encoder(file)
        bank = extract(encoder, data.train.images, data.train.labels)
        clean, changed = (extract(encoder, images, data.test.labels) for images in (data.test.images, triggered))
        found[name] = draws(bank, clean, changed, spec.probes, spec.attack["target_class"])
    return found


def main(folder: str, runs: list[str]) -> None:
    """Judge what is missing, print and write."""
    store = RunStore(Path(folder))
    for run in runs:
        inputs: dict[str, Any] = {"run": run}
        done = read_jsonl(RESULT) if RESULT.exists() else []
        if not any(inputs.items() <= line.items() for line in done):
            record = store.load(run)
            line = inputs | {"attack": record.spec["attack"]["name"], "asr": measured(record, store)}
            append_jsonl(RESULT, line)
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    given = parser.parse_args()
    main(given.store, given.runs)
