"""How far does an ASR depend on the images of its probe? To run: python -m benchmarks.probe_draws STORE RUN ...

For each run of a store, its victim and its clean twin are judged by probes fitted on several random draws of training
images; the intervals in every table are over test images and say nothing of this. A minute or two a run, which needs
its data (BLTO_DATA). What is finished is kept in benchmarks/results/probe_draws.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from blto.evaluation import Features, extract, fit_probe
from blto.evaluation.doctor import rates
from blto.experiment import Environment, ExperimentSpec, load_data
from blto.files import append_jsonl, read_jsonl
from blto.models.checkpoints import load_encoder
from blto.outcome import ENCODER, TRIGGER
from blto.poisoning import apply_to_uint8, load_trigger
from blto.records import RunRecord, RunStore
from blto.runtime.seeds import numpy_generator

RESULT = Path(__file__).parent / "results" / "probe_draws.jsonl"
DRAWS = {10_000: 3, 20_000: 3}
"""Images of a draw -> how many draws; and once all of them."""


def measured(record: RunRecord, store: RunStore) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Encoder -> probe -> number of images -> percent of the triggered images of other classes, a number a draw."""
    spec = ExperimentSpec.parse(record.spec)
    data = load_data(spec, Environment(store))
    trigger = load_trigger(store.folder(record.run_id) / TRIGGER)
    triggered = apply_to_uint8(trigger.at_test(), data.test.images)
    encoders = {
        "victim": store.folder(record.run_id) / ENCODER,
        "clean twin": store.root / "stages" / record.provenance["stages"]["clean_twin"] / ENCODER,
    }
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, file in encoders.items():
        encoder = load_encoder(file)
        bank = extract(encoder, data.train.images, data.train.labels)
        clean, changed = (extract(encoder, images, data.test.labels) for images in (data.test.images, triggered))
        assert bank.labels is not None
        draws = {size: number for size, number in DRAWS.items() if size < len(bank)}
        for probe in spec.probes:
            for size, number in {**draws, len(bank): 1}.items():
                values = []
                for draw in range(number):
                    rows = torch.from_numpy(
                        numpy_generator(draw, "select", "draw").permutation(len(bank))[:size].copy()
                    )
                    part = Features(bank.vectors[rows], bank.labels[rows], rows)
                    predict = fit_probe(probe, part, data.train.num_classes, **spec.probes[probe])
                    asr = rates(predict, clean, changed, spec.attack["target_class"], data.train.num_classes)["asr"]
                    assert asr.value is not None  # there are images of other classes
                    values.append(round(100 * asr.value, 1))
                found.setdefault(name, {}).setdefault(probe, {})[str(len(rows))] = values
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
